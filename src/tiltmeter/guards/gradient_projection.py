"""Gradient projection: take the mean safety gradients out of the task gradient, tensor by tensor.

Source: OGPSA (arXiv:2602.07892), which protects general ability while safety is trained, mirrored: per tensor
g' = g - U U'g with U the orthonormalised reference gradients, refreshed at intervals. Under Adam the promise is not
kept, since the update is not the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee, require_examples


@dataclass(frozen=True)
class GradientProjection:
    """Settings of the projection.

    Attributes:
        strength: share of the component that is removed.
        references: mean gradients, each of an equal part of the examples.
        refresh: steps between two measurements of the references.
    """

    strength: float = 1.0
    references: int = 2
    refresh: int = 30
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Check that there is a gradient for every reference."""
        require_strength("gradient", self.strength)
        model.require_whole("gradient projection works tensor by tensor")
        require_examples(model.safety, self.references, "gradient projection")
        self._measure(model)

    def shape_gradient(self, model: Trainee) -> None:
        """Project. Cost: k inner products, and k backward passes over the safety examples at a refresh."""
        if model.step and model.step % self.refresh == 0:
            self._measure(model)
        gradient = model.gradient()
        for name, part in model.space.split(gradient).items():
            flat, basis = part.view(-1), self.memory.tensors[name].to(part)
            flat.sub_(basis.T @ (basis @ flat), alpha=self.strength)
        model.write_gradient(gradient)

    def shape_update(self, model: Trainee) -> None:
        """Nothing: that is its weakness."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""

    def _measure(self, model: Trainee) -> None:
        """Orthonormal reference gradients of every tensor, [<= k, size]."""
        scores = model.safety.scores
        gradients = []
        for part in range(self.references):
            weights = torch.zeros(scores.m, dtype=torch.float64)
            weights[part :: self.references] = 1.0
            gradients.append(model.space.split(scores.gradient(weights / weights.sum())))
        for name in model.space.names:
            rows = torch.stack([gradient[name].reshape(-1) for gradient in gradients]).double()
            vectors, values = torch.linalg.svd(rows.T, full_matrices=False)[:2]
            keep = values > 1e-6 * values[0].clamp_min(1e-300)
            self.memory.tensors[name] = vectors[:, keep].T.contiguous().to(gradients[0][name].dtype)
        self.memory.note(model.step, "reference gradients measured", f"{self.references} over {scores.m} examples")
