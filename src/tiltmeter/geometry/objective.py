"""The only door between the mathematics and a model: losses and three products of their derivatives.

Everything in `geometry` is written against `Objective`, so systems solved by hand, small networks and language models
are interchangeable, and the formulas can be proved without a language model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.func import jvp as _jvp

from tiltmeter.errors import SpaceMismatch
from tiltmeter.geometry.space import ParameterSpace


def jvp(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a function at a point and its derivative along a direction, by forward-mode differentiation."""
    value, derivative = _jvp(function, (at,), (along,))[:2]
    return value, derivative


class Objective(Protocol):
    """Losses of m examples near an anchor, and the products of their derivatives.

    G [m, n] is the Jacobian of the losses, H [n, n] the Hessian of their mean; both at anchor + displacement, where a
    displacement of None means the anchor itself.
    """

    @property
    def space(self) -> ParameterSpace:
        """The parameters, n of them."""
        ...

    @property
    def m(self) -> int:
        """Number of examples."""
        ...

    @property
    def work(self) -> int:
        """Size of one forward pass over all examples, in tokens (examples, where there are no tokens)."""
        ...

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Losses [m], nats. Cost: one forward pass."""
        ...

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """G v, shape [m]: how fast each loss changes along v [n]. Cost: one JVP."""
        ...

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """G' w, shape [n], for weights w [m]; by default the mean gradient. Cost: one forward and backward."""
        ...

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """H v, shape [n], with H the Hessian of the weighted losses; of their mean by default. Cost: one HVP."""
        ...


class SoftmaxObjective(Objective, Protocol):
    """An objective whose examples are distributions p(y | theta), with the exact expectation over y.

    Its losses are KL(p_anchor || p_theta) in nats: they and their slopes vanish at the anchor, where H is the Fisher
    matrix F. Derivatives of log p(y) along a path need no Hessian and no sampling.
    """

    def fisher_form(self, directions: Sequence[Tensor]) -> Tensor:
        """v_i' F_e v_j for every example e, shape [m, k, k], for k directions [n]. Cost: k JVPs."""
        ...

    def path_form(self, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """Covariance of the first two derivatives of log p along t -> t velocity + t^2/2 acceleration, [m, 2, 2].

        The first is s.velocity, the second s.acceleration + velocity' A velocity, with A the Hessian of log p.
        Cost: one second-order directional pass.
        """
        ...


@dataclass(frozen=True)
class FunctionObjective:
    """An `Objective` from a differentiable function of the parameter vector; dense, for systems and tests.

    Attributes:
        function: maps a vector [n] to losses [m].
        anchor: the point [n] where derivatives are taken.
        names: parameter space, if the vector is made of named tensors.
    """

    function: Callable[[Tensor], Tensor]
    anchor: Tensor
    names: ParameterSpace | None = None

    @property
    def space(self) -> ParameterSpace:
        """The given space, or one tensor called theta."""
        return self.names or ParameterSpace(("theta",), (tuple(self.anchor.shape),))

    @property
    def m(self) -> int:
        """Number of examples; one forward pass."""
        return int(self.function(self.anchor).shape[0])

    @property
    def work(self) -> int:
        """One unit per example."""
        return self.m

    def _at(self, displacement: Tensor | None) -> Tensor:
        return self.anchor if displacement is None else self.anchor + self.space.check(displacement)

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Losses [m]."""
        return self.function(self._at(displacement)).detach()

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """G v [m] by forward-mode differentiation."""
        return jvp(self.function, self._at(displacement), self.space.check(v))[1].detach()

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """G' w [n] by reverse-mode differentiation."""
        value, pullback = vjp(self.function, self._at(displacement))[:2]
        w = torch.full_like(value, 1.0 / value.shape[0]) if weights is None else weights.to(value)
        if w.shape != value.shape:
            raise SpaceMismatch(f"expected {value.shape[0]} weights, one per example, got shape {tuple(w.shape)}")
        gradient: Tensor = pullback(w)[0]
        return gradient.detach()

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """H v [n], forward over reverse."""

        def weighted(theta: Tensor) -> Tensor:
            value = self.function(theta)
            return value.mean() if weights is None else (weights.to(value) * value).sum()

        mean_gradient = grad(weighted)
        return jvp(mean_gradient, self._at(displacement), self.space.check(v))[1].detach()


@dataclass(frozen=True)
class SoftmaxFunction:
    """A `SoftmaxObjective` from a function giving logits; dense, for systems and tests.

    Attributes:
        logits: maps a vector [n] to logits [m, y] of m distributions over y outcomes.
        anchor: the aligned model [n].
    """

    logits: Callable[[Tensor], Tensor]
    anchor: Tensor

    def log_probability(self, theta: Tensor) -> Tensor:
        """Log p(y | theta), shape [m, y]."""
        return torch.log_softmax(self.logits(theta), -1)

    @property
    def _kl(self) -> FunctionObjective:
        reference = self.log_probability(self.anchor).detach()
        return FunctionObjective(
            lambda theta: (reference.exp() * (reference - self.log_probability(theta))).sum(-1), self.anchor
        )

    @property
    def space(self) -> ParameterSpace:
        """One tensor called theta."""
        return self._kl.space

    @property
    def m(self) -> int:
        """Number of distributions."""
        return self._kl.m

    @property
    def work(self) -> int:
        """One unit per distribution."""
        return self.m

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """KL(p_anchor || p_theta) [m], nats."""
        return self._kl.losses(displacement)

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """Slope of the KL along v [m]."""
        return self._kl.directional(v, displacement)

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """Gradient of the weighted KL [n]."""
        return self._kl.gradient(weights, displacement)

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """Hessian of the mean KL times v [n]: F v at the anchor."""
        return self._kl.hvp(v, weights, displacement)

    def fisher_form(self, directions: Sequence[Tensor]) -> Tensor:
        """v_i' F_e v_j [m, k, k]."""
        slopes = torch.stack([jvp(self.log_probability, self.anchor, v)[1] for v in directions])
        return covariance_over_outcomes(slopes, self.log_probability(self.anchor))

    def path_form(self, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """Covariance of the first two path derivatives of log p, [m, 2, 2]."""

        def along(t: Tensor) -> Tensor:
            return self.log_probability(self.anchor + t * velocity + t**2 / 2 * acceleration)

        def slope(t: Tensor) -> Tensor:
            return jvp(along, t, torch.ones_like(t))[1]

        zero = self.anchor.new_zeros(())
        first, second = jvp(slope, zero, torch.ones_like(zero))
        return covariance_over_outcomes(torch.stack([first, second]), self.log_probability(self.anchor))


def covariance_over_outcomes(derivatives: Tensor, log_probability: Tensor) -> Tensor:
    """Cov_y of k quantities under p(y): derivatives [k, m, y], log p [m, y] -> [m, k, k].

    Adding a constant over y to a derivative changes nothing, so derivatives of raw logits serve as well.
    """
    p = log_probability.detach().exp()
    centred = derivatives - (p * derivatives).sum(-1, keepdim=True)
    return torch.einsum("kmy,my,lmy->mkl", centred, p, centred).detach()


#: Cost of each pass in forward+backward equivalents of the same data, measured on a 135 M-parameter Llama on a CPU
#: (`benchmarks/performance.py` measures them again).
FORWARD_BACKWARD = {
    "forward": 1 / 3,
    "forward_backward": 1.0,
    "gram": 1.5,
    "jvp": 1.1,
    "tangent": 2 / 3,
    "path": 2.2,
    "hvp": 3.5,
    "hvp_difference": 2.0,
}


@dataclass
class Passes:
    """Counts passes by kind, each weighted by the tokens it went over.

    Attributes:
        calls: number of passes, a pass over each micro-batch counted once.
        tokens: tokens they went over.
        listener: called after every count, for progress bars.
    """

    calls: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    listener: Callable[[], None] | None = None

    def add(self, kind: str, tokens: int, calls: int = 1) -> None:
        """Count `calls` passes of a kind, `tokens` tokens in all."""
        self.calls[kind] += calls
        self.tokens[kind] += tokens
        if self.listener is not None:
            self.listener()

    def equivalents(self, tokens: int) -> float:
        """All passes so far as forward+backward passes over data of `tokens` tokens."""
        return sum(FORWARD_BACKWARD[kind] * count for kind, count in self.tokens.items()) / tokens


@dataclass(frozen=True)
class Counted:
    """An objective that counts what it is asked for; results are untouched."""

    inner: Objective
    passes: Passes = field(default_factory=Passes)

    @property
    def space(self) -> ParameterSpace:
        """That of the counted objective."""
        return self.inner.space

    @property
    def m(self) -> int:
        """That of the counted objective."""
        return self.inner.m

    @property
    def work(self) -> int:
        """That of the counted objective."""
        return self.inner.work

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Counted as one forward pass."""
        self.passes.add("forward", self.work)
        return self.inner.losses(displacement)

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """Counted as one JVP."""
        self.passes.add("jvp", self.work)
        return self.inner.directional(v, displacement)

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """Counted as one forward and backward."""
        self.passes.add("forward_backward", self.work)
        return self.inner.gradient(weights, displacement)

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """Counted as one Hessian-vector product."""
        self.passes.add("hvp", self.work)
        return self.inner.hvp(v, weights, displacement)
