"""Replay: learn a few of the aligned model's own safety answers beside every batch.

Source: mixing safety examples into the tuning set, Bianchi et al. 2024 (Safety-Tuned LLaMAs, arXiv:2309.07875) and
Qi et al. 2024 (arXiv:2310.03693); here as a second gradient, so that the tuning data stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tiltmeter.errors import InputError
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.safety import draw
from tiltmeter.guards.trainee import Trainee, require_examples


@dataclass(frozen=True)
class Replay:
    """Settings of replay.

    Attributes:
        strength: weight of the safety loss, as a multiple of the task's.
        examples: safety examples a step.
    """

    strength: float = 1.0
    examples: int = 4
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Check that there are examples."""
        require_strength("replay", self.strength, None)
        if self.examples < 1:
            raise InputError(f"guard replay: examples must be at least 1, got {self.examples}")
        require_examples(model.safety, 1, "replay")

    def shape_gradient(self, model: Trainee) -> None:
        """Add the gradient of the safety loss. Cost: one backward pass over the examples."""
        replay = model.safety.replay
        safety = replay.gradient(draw(replay.m, self.examples, model.seed + model.step))
        gradient = model.gradient()
        model.write_gradient(gradient.add_(safety.to(gradient), alpha=self.strength))

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""
