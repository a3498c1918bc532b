"""Flow time: how far a learning-rate schedule has carried the run after each optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.errors import RecipeError


@dataclass(frozen=True)
class Clock:
    """Learning rates of every optimiser step.

    Attributes:
        rates: [steps], float64; the rate used by step 1, 2, ... (linear warm-up starts at 0, as transformers does).
    """

    rates: Tensor

    def __post_init__(self) -> None:
        rates = self.rates
        if rates.ndim != 1 or rates.numel() == 0 or not bool(torch.isfinite(rates).all()) or bool((rates < 0).any()):
            raise RecipeError("expected a non-empty list of finite learning rates >= 0, one per optimiser step")

    @classmethod
    def constant(cls, rate: float, steps: int) -> Clock:
        """The same rate at every step."""
        return cls(torch.full((steps,), rate, dtype=torch.float64))

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return int(self.rates.numel())

    @property
    def flow_time(self) -> Tensor:
        """Sum of learning rates after 0, 1, ..., steps updates, [steps + 1]."""
        return torch.cat([self.rates.new_zeros(1), self.rates.cumsum(0)])

    @property
    def squared_rates(self) -> Tensor:
        """Sum of squared rates after 0, 1, ..., steps updates, [steps + 1]; gradient noise adds up like this."""
        return torch.cat([self.rates.new_zeros(1), self.rates.square().cumsum(0)])

    def grid(self, points: int) -> list[int]:
        """At most `points` steps from 1 to the last, about evenly spaced in the logarithm."""
        # the end point is added by name: rounding may miss it, and in float32 it once lay beyond the last step
        spread = torch.logspace(0, math.log10(self.steps), points, dtype=torch.float64)[:-1]
        return sorted({int(step) for step in spread.round()} | {self.steps})
