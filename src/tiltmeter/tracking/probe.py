"""Do safety and task pull against each other? The commutator of one step on each, without a Hessian.

One gradient step on the safety batch S and then one on the task batch T ends elsewhere than T and then S:

    theta_ST - theta_TS = eta^2 (H_T g_S - H_S g_T) + O(eta^3)

The defect is its length over that of the two steps; it is large where one loss's curvature turns the other's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.objective import Objective
from tiltmeter.geometry.sensitivity import Basis
from tiltmeter.geometry.space import norm
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.template import UNSUPERVISED

#: Length of the longer of the two steps where no rate is given, parameter units.
STEP = 1e-2


@dataclass(frozen=True)
class Commutator:
    """What two exchanged steps leave behind.

    Attributes:
        vector: (theta_ST - theta_TS) / eta^2, [n], an estimate of H_T g_S - H_S g_T.
        defect: its norm over ||g_S|| ||g_T||, per parameter unit.
        safety_share: share of its squared norm inside the safety subspace, or None without one.
        rate: the step used.
    """

    vector: Tensor
    defect: float
    safety_share: float | None
    rate: float


def measure_commutator(
    safety: Objective, task: Objective, rate: float | None = None, basis: Basis | None = None
) -> Commutator:
    """Exchange one step on each of two losses.

    Args:
        safety: safety loss with a gradient at the anchor, such as minus the margin (the KL has none there).
        task: fine-tuning loss in the same parameters.
        rate: step eta, small enough for eta times the curvature to stay below one; None makes the longer of the two
            steps `STEP` long.
        basis: the safety subspace, to project on.

    Raises:
        SpaceMismatch: the objectives have different parameters.
        DegenerateError: a gradient is zero, so there is no step to exchange.

    Cost: four gradients, two of each loss.
    Error: O(eta); rounding below, so float32 needs a rate at which the step is seen.
    Source: arXiv:2602.16746, there for grokking; projecting on the safety subspace is ours.
    """
    safety.space.require_same(task.space)
    g_safety, g_task = safety.gradient(), task.gradient()
    sizes = norm(g_safety), norm(g_task)
    if not min(sizes) > 0:
        raise DegenerateError(
            f"the gradients of safety and task have norms {sizes[0]:g} and {sizes[1]:g}; a commutator needs two steps"
        )
    rate = STEP / max(sizes) if rate is None else rate
    # theta_ST - theta_TS = -eta [g_T(theta - eta g_S) - g_T - (g_S(theta - eta g_T) - g_S)]
    turned_task = task.gradient(displacement=g_safety * -rate) - g_task
    turned_safety = safety.gradient(displacement=g_task * -rate) - g_safety
    vector = (turned_safety - turned_task) / rate
    length = norm(vector)
    share = None
    if basis is not None and length > 0:
        share = float(torch.linalg.vector_norm(basis.coordinates(vector).double())) ** 2 / length**2
    return Commutator(vector, length / (sizes[0] * sizes[1]), share, rate)


def batch_examples(batches: Sequence[Mapping[str, Any]]) -> tuple[list[Example], str]:
    """The rows of a step's micro-batches, as a model was given them, without their padding.

    Args:
        batches: each with `input_ids` [b, t], `labels` [b, t] and, where rows are padded, `attention_mask` [b, t].

    Returns: the examples, and where there are none why not.
    """
    if not batches:
        return [], "the training loop did not tell its batch"
    out: list[Example] = []
    for batch in batches:
        tokens, labels, mask = (batch.get(key) for key in ("input_ids", "labels", "attention_mask"))
        if tokens is None or labels is None:
            return [], "the model was not given input_ids and labels"
        positions = batch.get("position_ids")
        if positions is not None and bool((positions[..., 1:] <= positions[..., :-1]).any()):
            return [], "rows were packed into one, and cannot be taken apart"
        mask = torch.ones_like(tokens) if mask is None else mask
        for row, target, seen in zip(tokens.tolist(), labels.tolist(), mask.bool().tolist(), strict=True):
            held = [(t, y) for t, y, here in zip(row, target, seen, strict=True) if here]
            # nothing predicts the first token
            marks = (UNSUPERVISED, *(y for _, y in held[1:]))
            if any(mark != UNSUPERVISED for mark in marks):
                out.append(Example(tuple(t for t, _ in held), marks, len(out)))
    return out, "" if out else "no token of the batch is supervised"
