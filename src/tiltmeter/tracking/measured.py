"""From what was measured at one step to a row of plain values, every null with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tiltmeter.lm.measurement import Measurement
from tiltmeter.tracking.drift import Drift
from tiltmeter.tracking.probe import Commutator
from tiltmeter.tracking.rows import Row


@dataclass(frozen=True)
class Measured:
    """What was found at one step.

    Attributes:
        kl: safety KL of every prompt, [m], nats per token.
        margin: refusal margin of every prompt, [m], nats.
        drift: where the weights are.
        overlap: of the refreshed subspace with the anchor's, or None.
        no_overlap: why there is none.
        refusals: refusal rate, or None where nothing was generated.
        task_loss: of the step's batch, nats per token, or None.
        commutator: of a safety step and a task step, or None.
        no_commutator: why there is none.
    """

    kl: Tensor
    margin: Tensor
    drift: Drift
    overlap: float | None
    no_overlap: str
    refusals: Measurement | None
    task_loss: float | None
    commutator: Commutator | None
    no_commutator: str


def row_of(step: int, found: Measured, rates: Sequence[float]) -> Row:
    """The row of a step.

    Args:
        step: optimiser steps taken.
        found: what was measured.
        rates: learning rates of the steps that were seen; flow time is their sum only if none is missing.
    """
    drift, refusals, loss, turn = found.drift, found.refusals, found.task_loss, found.commutator
    flow = math.fsum(rates) if len(rates) == step else None
    no_loss = "no step was taken yet" if step == 0 else "the training loop did not tell it"
    no_rate = "not measured at this step, since generation is dear"
    ends = None
    if refusals is not None:
        no_rate = refusals.reason or no_rate
        if refusals.low is not None and refusals.high is not None:
            ends = [refusals.low, refusals.high]
    no_drift = drift.reason or "the sketch was made on another kind of device"
    no_share = found.no_commutator or "there is no safety subspace to project on"
    values = {
        "flow_time": (flow, f"the learning rates of {step - len(rates)} steps were not seen"),
        "safety_kl": (float(found.kl.mean()), ""),
        "margin": (float(found.margin.mean()), ""),
        "refusal_rate": (None if refusals is None else refusals.value, no_rate),
        "refusal_interval": (ends, no_rate),
        "drift_energy": (drift.energy, no_drift),
        "drift_outside": (drift.outside, no_drift),
        "drift_coordinates": (None if drift.coordinates is None else drift.coordinates.tolist(), no_drift),
        "subspace_overlap": (found.overlap, found.no_overlap),
        "weight_change": (drift.weight_change, "the sketch was made on another kind of device"),
        "commutator_defect": (None if turn is None else turn.defect, found.no_commutator),
        "commutator_inside": (None if turn is None else turn.safety_share, no_share),
        "task_loss": (float(loss) if loss is not None and math.isfinite(loss) else None, no_loss),
    }
    return {
        "step": step,
        **{name: value for name, (value, _) in values.items()},
        "per_prompt": {"safety_kl": found.kl.tolist(), "margin": found.margin.tolist()},
        "reasons": {name: reason for name, (value, reason) in values.items() if value is None},
    }
