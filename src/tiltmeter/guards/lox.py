"""LoX: before the fine-tune, go on a little in the directions that alignment took.

Source: LoX (arXiv:2506.15606): W + alpha Proj_k(V), V = W_aligned - W_base and Proj_k onto its top k left singular
vectors. Needs the weights themselves to be trained: under LoRA they are not, and `lox_checkpoint` extrapolates the
checkpoint before the adapter is put on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from tiltmeter.errors import InputError, UnsupportedModel
from tiltmeter.guards.alignment import targets_of
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee


def top_part(v: Tensor, rank: int) -> Tensor:
    """Proj_k(V) = U_k U_k' V [o, i], float32 or better."""
    u = torch.linalg.svd(v if v.dtype == torch.float64 else v.float(), full_matrices=False)[0][:, :rank]
    part: Tensor = u @ (u.T @ v.to(u))
    return part


@dataclass(frozen=True)
class Extrapolation:
    """Settings of LoX, as a guard that acts once, before training.

    Attributes:
        alignment: V of every weight matrix, by its name in the model.
        strength: alpha, how far to go beyond the aligned weights.
        rank: k, singular directions; all of a smaller matrix.
    """

    alignment: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    strength: float = 1.0
    rank: int = 6
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Extrapolate, unless training is being resumed. Cost: one singular value decomposition a matrix."""
        require_strength("lox", self.strength, None)
        if self.rank < 1:
            raise InputError(f"guard lox: rank must be at least 1, got {self.rank}")
        model.require_whole("LoX takes every weight matrix apart")
        targets = targets_of(model.space, self.alignment, "LoX")
        if any(len(target.names) == 2 for target in targets):
            raise UnsupportedModel(
                "LoX extrapolates the weights themselves, and under LoRA these are not trained: extrapolate the "
                "checkpoint with lox_checkpoint, and put the adapter on the result"
            )
        if model.step:
            return
        with torch.no_grad():
            for target in targets:
                p = model.parameters[target.names[0]]
                p.add_(top_part(self.alignment[target.weight], self.rank).to(p), alpha=self.strength)
        self.memory.note(0, f"{len(targets)} matrices extrapolated", f"{self.strength:g} times the alignment delta")

    def shape_gradient(self, model: Trainee) -> None:
        """Nothing."""

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""
