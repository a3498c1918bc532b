"""Safe LoRA: keep of every update what lies in the space that alignment moved the weights in.

Source: Safe LoRA (Hsu et al. 2024, arXiv:2405.16833): with V = W_aligned - W_base and C = V V' / ||V||_F, an update dW
is replaced by C dW where the two are less similar than a threshold. C is no projector: it scales with the size of V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.geometry.space import dot
from tiltmeter.guards.alignment import matrices_of, targets_of
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee


def similarity(v: Tensor, left: Tensor, right: Tensor | None = None) -> float:
    """Cosine between C dW and dW, with dW = left right (or left alone); 1 where dW is zero.

    Cost: products of V' with `left`; neither C nor, for a LoRA pair, dW is formed.
    """
    seen = v.T @ left  # C dW = V (V' left) right / ||V||
    moved = v @ seen
    gram = None if right is None else right @ right.T

    def inner(a: Tensor, b: Tensor) -> float:
        return dot(a.reshape(-1), (b if gram is None else b @ gram).reshape(-1).contiguous())

    own, other = inner(left, left), inner(moved, moved)
    if own <= 0:
        return 1.0
    return 0.0 if other <= 0 else inner(left, moved) / math.sqrt(own * other)


def onto_alignment(v: Tensor, left: Tensor) -> Tensor:
    """C left [o, r], with C = V V' / ||V||_F."""
    size = float(v.norm())
    return torch.zeros_like(left) if size == 0 else v @ (v.T @ left) / size


@dataclass(frozen=True)
class SafeLora:
    """Settings of Safe LoRA, as a guard that acts once, after training.

    Attributes:
        alignment: V of every weight matrix, by its name in the model without adapters.
        strength: share of the difference between dW and C dW that is applied.
        threshold: cosine at or below which an update is replaced.
    """

    alignment: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    strength: float = 1.0
    threshold: float = 0.35
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def start(self, model: Trainee) -> None:
        """Find the matrices; full fine-tuning keeps a copy of the anchor."""
        require_strength("safe_lora", self.strength)
        if not -1 <= self.threshold <= 1:
            raise InputError(f"guard safe_lora: threshold is a cosine, from -1 to 1, got {self.threshold}")
        for target in targets_of(model.space, self.alignment, "Safe LoRA"):
            rows, columns = self.alignment[target.weight].shape
            b = model.parameters[target.names[0]]
            if b.shape[0] != rows or (len(target.names) == 1 and b.shape[1] != columns):
                raise InputError(
                    f"alignment of {target.weight} has shape {(rows, columns)}, the update {tuple(b.shape)}: give the "
                    "base model of this very model"
                )
            if len(target.names) == 1:
                self.memory.tensors[f"anchor.{target.weight}"] = b.detach().clone()

    def shape_gradient(self, model: Trainee) -> None:
        """Nothing."""

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Replace the updates that do not lie in the alignment."""
        targets = targets_of(model.space, self.alignment, "Safe LoRA")
        replaced = 0
        with torch.no_grad():
            for target in targets:
                b = model.parameters[target.names[0]]
                v = self.alignment[target.weight].to(b.device, b.dtype)
                anchor = self.memory.tensors.get(f"anchor.{target.weight}")
                left = b.detach() if anchor is None else b.detach() - anchor.to(b)
                right = model.parameters[target.names[1]].detach() if anchor is None else None
                if similarity(v, left, right) <= self.threshold:
                    b.add_(onto_alignment(v, left) - left, alpha=self.strength)
                    replaced += 1
        why = f"{replaced} of {len(targets)} updates had a cosine of at most {self.threshold:g}"
        if left_out := len(matrices_of(model.space)) - len(targets):
            why += f"; {left_out} trained matrices are as they are: what alignment changed in them is not known"
        self.memory.note(model.step, "updates projected onto the alignment", why)
