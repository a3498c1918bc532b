"""AlignGuard-LoRA: penalties on the part of the drift that safety feels, and a weaker one on the rest.

Source: AlignGuard-LoRA (arXiv:2508.02079), lambda_A ||F^(1/2) Delta_A||^2 + lambda_T ||H^(1/2) Delta_T||^2 with Delta_A
the drift in the top eigenvectors of F and Delta_T the rest. Its collision terms are left out: the geodesic one is zero
identically, and the other keeps the two parts apart that are orthogonal by construction. H is a multiple of one here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tiltmeter.errors import UnsupportedModel
from tiltmeter.geometry.space import dot
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee, require_examples

#: Numbers that the eigenvectors may take: 2 GB in float32.
MOST = 2**29


@dataclass(frozen=True)
class AlignGuard:
    """Settings of AlignGuard.

    Attributes:
        strength: weight lambda_A, in multiples of the KL's second-order share.
        stability: lambda_T H, as a share of lambda_A times the largest eigenvalue.
        rank: eigenvectors.
    """

    strength: float = 10.0
    stability: float = 1e-3
    rank: int = 8
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Measure the eigenvectors. Cost: a Gram matrix, `rank` backward passes and rank + 1 copies."""
        require_strength("alignguard", self.strength, None)
        require_examples(model.safety, 2, "alignguard")
        if self.rank * model.whole.size > MOST:
            raise UnsupportedModel(
                f"alignguard keeps {self.rank} vectors of {model.whole.size} parameters: train with LoRA, or lower rank"
            )
        found = model.safety.sensitivity(self.rank)
        columns = torch.stack([found.lift(unit) for unit in torch.eye(found.rank, dtype=torch.float64)])
        self.memory.tensors.update(anchor=model.vector(), columns=columns, eigenvalues=found.eigenvalues.clone())

    def shape_gradient(self, model: Trainee) -> None:
        """Add the slopes of both penalties. Cost: k inner products."""
        tensors = self.memory.tensors
        drift, values = model.moved(tensors["anchor"]), tensors["eigenvalues"].tolist()
        rest = self.stability * values[0]
        pull = drift * rest
        for value, column in zip(values, tensors["columns"], strict=True):
            pull.add_(column.to(pull), alpha=(value - rest) * dot(column, drift))
        model.write_gradient(model.gradient().add_(pull, alpha=self.strength))

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""
