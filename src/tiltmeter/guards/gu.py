"""GU: project the gradient so that what Adam makes of it leaves the safety gradients alone, to first order.

Source: GU (arXiv:2511.17100): g - U (U'MU)^-1 U'M g with M the optimiser's preconditioner, so that U'M g vanishes.
Adam's momentum still carries older gradients, measured in older metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tiltmeter.geometry.space import dot
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee, require_examples


@dataclass(frozen=True)
class MetricGradientProjection:
    """Settings of GU.

    Attributes:
        strength: share of the component that is removed.
        references: mean safety gradients, each of an equal part of the examples.
        refresh: steps between two measurements of them.
    """

    strength: float = 1.0
    references: int = 2
    refresh: int = 30
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Measure the references; the optimiser must be one whose metric is known."""
        require_strength("gu", self.strength)
        require_examples(model.safety, self.references, "gu")
        model.require_metric()
        self._measure(model)

    def shape_gradient(self, model: Trainee) -> None:
        """Project. Cost: k^2 inner products, and k backward passes over the safety examples at a refresh."""
        if model.step and model.step % self.refresh == 0:
            self._measure(model)
        gradient, metric = model.gradient(), model.preconditioner()
        columns = self.memory.tensors["references"]
        k = len(columns)
        gram, felt = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        for i, column in enumerate(columns):
            moved = column if metric is None else column * metric
            felt[i] = dot(moved, gradient)
            for j in range(k):
                gram[i, j] = dot(moved, columns[j])
        weights = torch.linalg.pinv((gram + gram.T) / 2, rtol=1e-10, hermitian=True) @ felt
        for weight, column in zip(weights.tolist(), columns, strict=True):
            gradient.add_(column.to(gradient), alpha=-self.strength * weight)
        model.write_gradient(gradient)

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""

    def _measure(self, model: Trainee) -> None:
        scores = model.safety.scores
        rows = []
        for part in range(self.references):
            weights = torch.zeros(scores.m, dtype=torch.float64)
            weights[part :: self.references] = 1.0
            rows.append(scores.gradient(weights / weights.sum()))
        self.memory.tensors["references"] = torch.stack(rows)
        self.memory.note(model.step, "reference gradients measured", f"{self.references} over {scores.m} examples")
