"""SafeGrad: where the task gradient would raise the safety loss, remove that component.

Source: SafeGrad (arXiv:2508.07172), gradient surgery with the KL to the aligned model as safety loss, on 20 examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tiltmeter.errors import InputError
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.safety import draw
from tiltmeter.guards.surgery import remove_conflict
from tiltmeter.guards.trainee import Trainee, require_examples


@dataclass(frozen=True)
class SafeGrad:
    """Settings of SafeGrad.

    Attributes:
        strength: share of the conflicting component that is removed.
        examples: safety examples a step.
    """

    strength: float = 1.0
    examples: int = 20
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Check that there are examples."""
        require_strength("safegrad", self.strength)
        if self.examples < 1:
            raise InputError(f"guard safegrad: examples must be at least 1, got {self.examples}")
        require_examples(model.safety, 1, "safegrad")

    def shape_gradient(self, model: Trainee) -> None:
        """Project where the two conflict. Cost: one backward pass over the examples."""
        divergence = model.safety.divergence
        safety = divergence.gradient(draw(divergence.m, self.examples, model.seed + model.step))
        gradient = model.gradient()
        if remove_conflict(gradient, safety, self.strength):
            model.write_gradient(gradient)
            self.memory.numbers["conflicts"] = self.memory.numbers.get("conflicts", 0) + 1

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Say how often the two conflicted."""
        count = self.memory.numbers.get("conflicts", 0)
        self.memory.note(model.step, "finished", f"task and safety conflicted in {count:g} of {model.step} steps")
