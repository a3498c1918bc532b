"""EMA of weights: train as usual, keep the moving average.

Source: averaging the weights for safety (arXiv:2508.12531).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tiltmeter.errors import InputError
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee


@dataclass(frozen=True)
class AverageWeights:
    """Settings of the average.

    Attributes:
        strength: share of the average that stays at each step, below 1.
    """

    strength: float = 0.98
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Begin at the anchor. Cost: one copy of the trained parameters."""
        require_strength("ema", self.strength)
        if self.strength == 1:
            raise InputError("guard ema: at strength 1 the average never leaves the anchor; give less than 1")
        self.memory.tensors["average"] = model.vector()

    def shape_gradient(self, model: Trainee) -> None:
        """Take the weights as the last step left them into the average."""
        if model.step:
            self._take(model)

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """The average becomes the model."""
        self._take(model)
        model.write(self.memory.tensors["average"])
        self.memory.note(model.step, "weights replaced by their average", f"decay {self.strength:g} a step")

    def _take(self, model: Trainee) -> None:
        self.memory.tensors["average"].lerp_(model.vector(), 1 - self.strength)
