"""No guard: what every other one is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiltmeter.guards.contract import Memory
from tiltmeter.guards.trainee import Trainee


@dataclass(frozen=True)
class NoGuard:
    """Does nothing. Source: the fine-tune as it is."""

    strength: float = 0.0
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Nothing."""

    def shape_gradient(self, model: Trainee) -> None:
        """Nothing."""

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""
