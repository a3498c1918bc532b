"""The contract of a predictor: from what was measured at the anchor to one number, higher for more harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.forecast import PathValues
from tiltmeter.geometry.metric import Metric
from tiltmeter.geometry.motion import Coupling
from tiltmeter.geometry.objective import FORWARD_BACKWARD, Objective
from tiltmeter.geometry.sensitivity import Sensitivity

#: Share of a run that a canary may really train.
CANARY_SHARE = 0.05

#: Names of the rehearsals: the one that is reported, and the one with half as many looks at the gradient.
REHEARSED, FEWER = "rehearsed", "fewer looks"


@dataclass(frozen=True)
class Trend:
    """A predicted quantity over optimiser steps."""

    steps: tuple[int, ...]
    value: tuple[float, ...]


@dataclass(frozen=True)
class Risk:
    """What one predictor says of one tuning set.

    Attributes:
        value: higher means more harm; None where it is not known, never zero.
        unit: of the value.
        passes: forward+backward passes over the tuning sample that it takes by itself.
        curve: the value over steps, for predictors that have one.
        reason: why there is no value.
    """

    value: float | None
    unit: str
    passes: float
    curve: Trend | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Measured:
    """What an assessment has measured already.

    Attributes:
        paths: name -> KL and margin per prompt along the predicted path.
        overlap_groups: products g_i' F g_j of groups of batches, [m, J, J], or None.
        no_overlap: why not.
        coupling: overlap and curvature coupling under gradient flow, or None.
        no_coupling: why not.
        tuning_loss: mean loss, nats per token; NaN if it was not measured.
        gradient_norm: norm of the mean gradient.
        projected: its norm inside the safety subspace, or None.
        random_kl: KL [m] after a random displacement as long as the forecast's, or None where none was asked for.
        covered: multiple of the initial direction after 0, 1, ... steps, [steps + 1].
        rehearsal_passes: gradients of the reported rehearsal, in gradients of the whole sample.
        margin_noise: standard deviation of the mean margin by the luck of one run's batches and of the sample, nats,
            [steps + 1].
        kl_noise: standard deviation of the KL's root as a share of it, [steps + 1].
        margin_doubt: standard deviation of the rehearsal itself by the rows it was made from, nats, [steps + 1].
        kl_doubt: the same of the KL's root as a share of it, [steps + 1].
        margin_apart: standard deviation of its difference from the one with fewer looks by the rows of both, nats,
            [steps + 1].
        kl_apart: the same of the KL's root as a share of it, [steps + 1].
        kl_factor: path name -> what its KL is multiplied by for one run's noise, [steps + 1].
    """

    paths: Mapping[str, PathValues]
    overlap_groups: Tensor | None
    no_overlap: str | None
    coupling: Coupling | None
    no_coupling: str | None
    tuning_loss: float
    gradient_norm: float
    projected: float | None
    random_kl: Tensor | None
    covered: Tensor
    rehearsal_passes: float
    margin_noise: Tensor
    kl_noise: Tensor
    margin_doubt: Tensor
    kl_doubt: Tensor
    margin_apart: Tensor
    kl_apart: Tensor
    kl_factor: Mapping[str, Tensor]


@dataclass(frozen=True)
class Canary:
    """A few optimiser steps that were really run, at their end.

    Attributes:
        steps: how many.
        length: norm of the displacement, parameter units.
        margin: refusal margin [m], nats.
        kl: safety KL [m], nats per token.
    """

    steps: int
    length: float
    margin: Tensor
    kl: Tensor


@dataclass(frozen=True)
class States:
    """Hidden states of the aligned model, [rows, width] each.

    Attributes:
        task: at the end of the tuning prompts.
        alignment: at the end of the safety prompts.
        task_answers: mean over the tuning answers.
        refusals: mean over the refusal openings of the safety prompts.
        compliances: mean over their compliance openings.
    """

    task: Tensor
    alignment: Tensor
    task_answers: Tensor
    refusals: Tensor
    compliances: Tensor


@dataclass(frozen=True)
class Case:
    """One model, safety set, tuning set and recipe, as predictors see them.

    Attributes:
        divergence: safety KL.
        negative_margin: minus the refusal margin, a loss.
        anchor_margin: refusal margins of the aligned model, [m], nats.
        margin_gradient: gradient of minus the mean margin, [n].
        sensitivity: the safety subspace, or None.
        no_sensitivity: why there is none.
        tuning: loss over the tuning sample.
        batches: [B, examples], weights that make a trainer's batch loss.
        metric: the optimiser.
        clock: learning rates of the recipe.
        measured: what the assessment knows.
        clip: largest gradient norm of a batch, or None.
        seed: of random directions.
        gradient: mean gradient of the tuning loss [n], where it is known already.
        canary: a canary that was run already.
        anchors: gradients [n] of the likelihood loss of compliant and of refusing openings, or None.
        states: hidden states, or None.
        no_states: why there are none.
    """

    divergence: Objective
    negative_margin: Objective
    anchor_margin: Tensor
    margin_gradient: Tensor
    sensitivity: Sensitivity | None
    no_sensitivity: str | None
    tuning: Objective
    batches: Tensor
    metric: Metric
    clock: Clock
    measured: Measured
    clip: float | None = None
    seed: int = 0
    gradient: Tensor | None = field(default=None, repr=False)
    canary: Canary | None = None
    anchors: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    states: States | None = field(default=None, repr=False)
    no_states: str | None = None


class Predictor(Protocol):
    """From a case to a risk."""

    def __call__(self, case: Case) -> Risk:
        """Tell the risk. Cost: in the predictor's own docstring; what the case holds already costs nothing."""
        ...


def passes(
    case: Case,
    *,
    tuning: Mapping[str, float] | None = None,
    safety: Mapping[str, float] | None = None,
    margin: Mapping[str, float] | None = None,
) -> float:
    """Cost in forward+backward passes over the tuning sample, from numbers of passes by kind over each set."""
    parts = ((case.tuning, tuning), (case.divergence, safety), (case.negative_margin, margin))
    tokens = sum(FORWARD_BACKWARD[kind] * n * part.work for part, held in parts for kind, n in (held or {}).items())
    return tokens / case.tuning.work


def gradient_of(case: Case) -> Tensor:
    """Mean gradient of the tuning batches [n]. Cost: one forward+backward, where the case does not hold it."""
    return case.tuning.gradient(case.batches.mean(0)) if case.gradient is None else case.gradient


def known(value: float, unit: str, cost: float, why: str, curve: Trend | None = None) -> Risk:
    """A risk whose value is None with a reason where it is not finite."""
    if math.isfinite(value):
        return Risk(float(value), unit, cost, curve)
    return Risk(None, unit, cost, curve, why)


def root_of_mean(squares: Tensor, unit: str, cost: float) -> Risk:
    """Root of a mean of squares over prompts [m] that are free of noise bias, and so can come out below zero."""
    value = float(squares.double().mean())
    if value > 0:
        return Risk(math.sqrt(value), unit, cost)
    return Risk(None, unit, cost, reason="its square came out below zero: not to be told from zero at this sample size")


def trend(values: PathValues, quantity: Tensor) -> Trend | None:
    """The curve of a quantity [s] along a path, or None where it is not finite."""
    if not bool(torch.isfinite(quantity).all()):
        return None
    return Trend(values.steps, tuple(quantity.tolist()))
