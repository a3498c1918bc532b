"""When to measure: densely at the start, because ten steps can do the damage, then at a fixed interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Share of the training time that measuring may take, at its interval.
OVERHEAD = 0.05

#: Interval where nothing is known of the cost of a step.
UNKNOWN = 64

#: The interval is chosen from counted tokens; one pass over a few hundred tokens costs more than its tokens say.
MARGIN = 1.6


@dataclass(frozen=True)
class Schedule:
    """Steps 0, 1, 2, 4, 8, ... below `every`, then every multiple of it.

    Attributes:
        every: the interval, optimiser steps.
        also: further steps.
    """

    every: int
    also: frozenset[int] = frozenset()

    def due(self, step: int) -> bool:
        """Whether to measure after a step."""
        if step < self.every:
            return step & (step - 1) == 0 or step in self.also
        return step % self.every == 0 or step in self.also


def interval(measuring_tokens: float, step_tokens: float, *, frozen: bool) -> int:
    """Smallest interval at which measuring costs less than `OVERHEAD` of training.

    Counted, not timed, so that a run that is killed and resumed measures at the same steps as one that is not.

    Args:
        measuring_tokens: tokens of the forward passes of one measurement.
        step_tokens: tokens of one optimiser step.
        frozen: whether most weights are frozen (LoRA): a backward pass then costs about half as much.
    """
    if step_tokens <= 0:
        return UNKNOWN
    cost = measuring_tokens * MARGIN / (step_tokens * (2.0 if frozen else 3.0))
    return max(1, math.ceil(cost / OVERHEAD))
