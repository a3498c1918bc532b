"""Lisa: steps on safety and steps on the task in turn, each held near where the other left off.

Source: Lisa (Huang et al. 2024, arXiv:2405.18641): bi-state optimisation with a proximal term. Both states share one
optimiser here, since a callback cannot bring its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tiltmeter.errors import InputError
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.safety import draw
from tiltmeter.guards.trainee import Trainee, require_examples


@dataclass(frozen=True)
class Alternation:
    """Settings of the alternation.

    Attributes:
        strength: weight rho of the proximal term rho/2 ||theta - where the other state left off||^2.
        task_steps: steps on the task in turn.
        safety_steps: steps on safety in turn; the batch of such a step is not learned from.
        examples: safety examples a step.
    """

    strength: float = 1.0
    task_steps: int = 9
    safety_steps: int = 1
    examples: int = 8
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Begin with the task. Cost: one copy of the trained parameters."""
        require_strength("lisa", self.strength, None)
        if min(self.task_steps, self.safety_steps, self.examples) < 1:
            raise InputError("guard lisa: task_steps, safety_steps and examples must be at least 1")
        require_examples(model.safety, 1, "lisa")
        self.memory.tensors["centre"] = model.vector()

    def shape_gradient(self, model: Trainee) -> None:
        """Choose the state, and add the proximal term."""
        place = model.step % (self.task_steps + self.safety_steps)
        if place in (0, self.task_steps):
            self.memory.tensors["centre"] = model.vector()
        gradient = model.gradient()
        if place >= self.task_steps:
            replay = model.safety.replay
            gradient = replay.gradient(draw(replay.m, self.examples, model.seed + model.step)).to(gradient)
        pull = model.moved(self.memory.tensors["centre"])
        model.write_gradient(gradient.add_(pull, alpha=self.strength))

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""
