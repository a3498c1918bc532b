"""A low-rank adapter solved exactly: W = W_0 + s B A with B = 0 at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.objective import FunctionObjective, SoftmaxFunction
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.geometry.systems import DOUBLE, exact_kl


@dataclass(frozen=True)
class Lora:
    """L = <M, s B A> + h/2 ||s B A||^2 over theta = (A, B), watched through logits (W_0 + s B A) x for a few inputs x.

    With M = U S V' and h = 0, gradient flow from B = 0 is solved by

        A(t) = A_0 V cosh(s S t) V',     B(t) = -U sinh(s S t) V' A_0'

    so the first motion is in B alone (-t s M A_0'), and A follows at second order (t^2/2 s^2 A_0 M'M).

    Attributes:
        start: A_0 [r, i].
        pull: M [o, i], gradient of the loss in W.
        scale: s, LoRA's alpha / r.
        base: W_0 [o, i].
        inputs: x [m, i], one answer distribution over o outcomes each.
        stiffness: h, curvature of the loss in W; the trajectory is known for h = 0 only.
    """

    start: Tensor
    pull: Tensor
    scale: float
    base: Tensor
    inputs: Tensor
    stiffness: float = 0.0

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

        def losses(theta: Tensor) -> Tensor:
            update = self._update(theta)
            return ((self.pull * update).sum() + self.stiffness / 2 * update.square().sum()).expand(4)

        return FunctionObjective(losses, self.anchor, self.space)

    @property
    def safety(self) -> SoftmaxFunction:
        """One distribution per input."""
        return SoftmaxFunction(lambda theta: self.inputs @ (self.base + self._update(theta)).T, self.anchor)

    def displacement(self, flow_time: float) -> Tensor:
        """theta(t) - anchor by gradient flow, exact; for h = 0."""
        if self.stiffness:
            raise DegenerateError("the trajectory of the adapter is known for a loss linear in W only")
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
        """H g at the anchor: s^2 A_0 M'M in A, h s^3 M A_0' A_0 A_0' in B."""
        b = self.stiffness * self.scale**3 * self.pull @ self.start.T @ self.start @ self.start.T
        return self.space.flatten({"A": self.scale**2 * self.start @ self.pull.T @ self.pull, "B": b})

    @property
    def second_in_weights(self) -> Tensor:
        """Second derivative of s B A along the flow at t = 0: h s^4 M (A_0'A_0)^2, zero for a loss linear in W."""
        gram = self.start.T @ self.start
        return self.stiffness * self.scale**4 * self.pull @ gram @ gram

    def kl(self, flow_time: float) -> Tensor:
        """Exact KL [m] along gradient flow, nats."""
        moved = self.space.split(self.displacement(flow_time))
        change = self.inputs @ (self.scale * moved["B"] @ (self.start + moved["A"])).T
        return exact_kl(torch.softmax(self.inputs @ self.base.T, -1), change)
