"""A low-rank adapter solved exactly: W = W_0 + s B A with B = 0 at the start, and a loss linear in W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.geometry.objective import FunctionObjective, SoftmaxFunction
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.geometry.systems import DOUBLE, exact_kl


@dataclass(frozen=True)
class Lora:
    """L = <M, s B A> over theta = (A, B), watched through logits W_0 x + s B A x for a few inputs x.

    With M = U S V', gradient flow from B = 0 is solved by

        A(t) = A_0 V cosh(s S t) V',     B(t) = -U sinh(s S t) V' A_0'

    so the first motion is in B alone (-t s M A_0'), and A follows at second order (t^2/2 s^2 A_0 M'M).

    Attributes:
        start: A_0 [r, i].
        pull: M [o, i], gradient of the loss in W.
        scale: s, LoRA's alpha / r.
        base: W_0 [o, i].
        inputs: x [m, i], one answer distribution over o outcomes each.
    """

    start: Tensor
    pull: Tensor
    scale: float
    base: Tensor
    inputs: Tensor

    @classmethod
    def random(cls, seed: int, rank: int = 2, size: int = 4, scale: float = 1.0) -> Lora:
        """Normal draws."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=DOUBLE, generator=generator)

        pull = draw(size, size)
        pull = pull / torch.linalg.matrix_norm(pull, 2)
        return cls(draw(rank, size), pull, scale, draw(size, size), draw(3, size))

    @property
    def space(self) -> ParameterSpace:
        """(A, B)."""
        rank, width = self.start.shape
        return ParameterSpace(("A", "B"), ((rank, width), (self.pull.shape[0], rank)))

    @property
    def anchor(self) -> Tensor:
        """A_0 and B = 0, flat."""
        return self.space.flatten({"A": self.start, "B": self.pull.new_zeros(self.space.shapes[1])})

    def _update(self, theta: Tensor) -> Tensor:
        part = self.space.split(theta)
        return self.scale * part["B"] @ part["A"]

    @property
    def tuning(self) -> FunctionObjective:
        """Four examples alike."""
        return FunctionObjective(
            lambda theta: (self.pull * self._update(theta)).sum().expand(4), self.anchor, self.space
        )

    @property
    def safety(self) -> SoftmaxFunction:
        """One distribution per input."""
        return SoftmaxFunction(lambda theta: self.inputs @ (self.base + self._update(theta)).T, self.anchor)

    def displacement(self, flow_time: float) -> Tensor:
        """theta(t) - anchor, exact."""
        left, values, right = torch.linalg.svd(self.pull)
        angle = self.scale * values * flow_time
        # cosh - 1 = 2 sinh^2(half) keeps the digits of a small motion
        a = self.start @ (right.T * (2 * torch.sinh(angle / 2).square())) @ right
        b = -(left * torch.sinh(angle)) @ right @ self.start.T
        return self.space.flatten({"A": a, "B": b})

    @property
    def first(self) -> Tensor:
        """Gradient at the anchor: zero in A, s M A_0' in B."""
        return self.space.flatten({"A": torch.zeros_like(self.start), "B": self.scale * self.pull @ self.start.T})

    @property
    def second(self) -> Tensor:
        """H g at the anchor: s^2 A_0 M'M in A, zero in B."""
        b = self.pull.new_zeros(self.space.shapes[1])
        return self.space.flatten({"A": self.scale**2 * self.start @ self.pull.T @ self.pull, "B": b})

    def kl(self, flow_time: float) -> Tensor:
        """Exact KL [m] along gradient flow, nats."""
        moved = self.space.split(self.displacement(flow_time))
        change = self.inputs @ (self.scale * moved["B"] @ (self.start + moved["A"])).T
        return exact_kl(torch.softmax(self.inputs @ self.base.T, -1), change)
