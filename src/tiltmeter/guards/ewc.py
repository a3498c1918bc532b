"""Elastic weight consolidation: a spring to the anchor, stiff where the safety answers are sharp.

Source: Kirkpatrick et al. 2017 (arXiv:1612.00796), with the diagonal of the Fisher matrix of the safety answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee, require_examples


@dataclass(frozen=True)
class ElasticWeights:
    """Settings of EWC.

    Attributes:
        strength: weight of the penalty 1/2 sum F_i (theta_i - anchor_i)^2, which is the diagonal's share of the KL.
    """

    strength: float = 10.0
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Measure the diagonal. Cost: one backward pass for each example, two copies of the trained parameters."""
        require_strength("ewc", self.strength, None)
        require_examples(model.safety, 1, "ewc")
        scores = model.safety.scores
        anchor = model.vector()
        diagonal = torch.zeros_like(anchor)
        for unit in torch.eye(scores.m, dtype=torch.float64):
            diagonal.add_(scores.gradient(unit).to(anchor).square_(), alpha=1 / scores.m)
        self.memory.tensors.update(anchor=anchor, diagonal=diagonal)

    def shape_gradient(self, model: Trainee) -> None:
        """Add the slope of the penalty."""
        pull = model.moved(self.memory.tensors["anchor"]).mul_(self.memory.tensors["diagonal"])
        model.write_gradient(model.gradient().add_(pull, alpha=self.strength))

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""
