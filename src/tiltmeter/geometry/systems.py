"""Small systems whose behaviour is known: a tuning loss with an exact trajectory, a safety model with an exact KL.

The formulas in `geometry` are proved against these (`tiltmeter theory`, docs/theory.md). Everything is float64, the
anchor is the origin unless said otherwise, and what is expected is computed here without automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.errors import SpaceMismatch
from tiltmeter.geometry.objective import FunctionObjective, SoftmaxFunction

DOUBLE = torch.float64


def exact_kl(probability: Tensor, change: Tensor) -> Tensor:
    """KL(p || p') in nats for outcomes [..., y] whose logits change by `change` [..., y]; returns [...].

    With d = log p' - log p, the KL is the sum of p (exp(d) - 1 - d): every term is positive, so a KL of 1e-25 keeps
    its digits where -sum(p d) has lost them all.
    """
    d = change - torch.log1p((probability * torch.expm1(change)).sum(-1, keepdim=True))
    # exp(d) - 1 - d from its series where the difference would cancel
    series = d.square() / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    excess = torch.where(d.abs() < 1e-2, series, torch.expm1(d) - d)
    return (probability * excess).sum(-1)


def rotation(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix [n, n], so that nothing stands along the axes."""
    generator = torch.Generator().manual_seed(seed)
    frame: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))[0]
    return frame


def batches(count: int) -> Tensor:
    """Weights [count, count] of batches of one example each."""
    return torch.eye(count, dtype=DOUBLE)


@dataclass(frozen=True)
class Quadratic:
    """Fine-tuning loss of B examples, L_i = (g + n_i)' x + x'(H + N_i) x / 2.

    Attributes:
        slope: g [n], nats per parameter unit.
        hessian: H [n, n], symmetric.
        slope_noise: n_i [B, n], what sets an example's gradient apart.
        hessian_noise: N_i [B, n, n], symmetric.
    """

    slope: Tensor
    hessian: Tensor
    slope_noise: Tensor
    hessian_noise: Tensor

    def __post_init__(self) -> None:
        n, b = self.slope.numel(), self.slope_noise.shape[0]
        if self.hessian.shape != (n, n) or self.slope_noise.shape != (b, n) or self.hessian_noise.shape != (b, n, n):
            raise SpaceMismatch(f"expected a Hessian [{n}, {n}] and noises [{b}, {n}] and [{b}, {n}, {n}]")

    @classmethod
    def quiet(cls, slope: Tensor, hessian: Tensor, examples: int = 4) -> Quadratic:
        """All examples alike."""
        n = slope.numel()
        return cls(slope, hessian, slope.new_zeros(examples, n), slope.new_zeros(examples, n, n))

    @classmethod
    def with_spectrum(cls, slope: Tensor, eigenvalues: Sequence[float], seed: int, examples: int = 4) -> Quadratic:
        """Hessian of given eigenvalues in a random frame."""
        frame = rotation(len(eigenvalues), seed)
        return cls.quiet(slope, (frame * torch.tensor(list(eigenvalues), dtype=DOUBLE)) @ frame.T, examples)

    @property
    def objective(self) -> FunctionObjective:
        """The B losses around the origin."""
        slopes, hessians = self.slope + self.slope_noise, self.hessian + self.hessian_noise

        def losses(x: Tensor) -> Tensor:
            return slopes @ x + torch.einsum("i,bij,j->b", x, hessians, x) / 2

        return FunctionObjective(losses, torch.zeros_like(self.slope))

    def displacement(self, flow_time: float) -> Tensor:
        """Gradient flow: -(1 - exp(-t H)) H^-1 g [n], exact also where H is singular or negative."""
        values, vectors = torch.linalg.eigh(self.hessian)
        exponent = -flow_time * values
        safe = torch.where(values == 0, torch.ones_like(values), values)
        gain = torch.where(values == 0, torch.full_like(values, -flow_time), torch.expm1(exponent) / safe)
        out: Tensor = vectors @ (gain * (vectors.T @ self.slope))
        return out

    def descent(self, rates: Sequence[float], momentum: float = 0.0) -> Tensor:
        """Gradient descent stepped one by one with dense matrices: positions [steps + 1, n]."""
        position, velocity = torch.zeros_like(self.slope), torch.zeros_like(self.slope)
        out = [position]
        for rate in rates:
            velocity = momentum * velocity + self.slope + self.hessian @ position
            position = position - rate * velocity
            out.append(position)
        return torch.stack(out)


@dataclass(frozen=True)
class CurvedSoftmax:
    """m answer distributions whose logits are quadratic: z_y(x) = b_y + a_y' x + x' Q_y x / 2.

    Attributes:
        bias: b [m, y].
        slopes: a [m, y, n], logits per parameter unit.
        bends: Q [m, y, n, n], symmetric.
    """

    bias: Tensor
    slopes: Tensor
    bends: Tensor

    @classmethod
    def random(cls, prompts: int, outcomes: int, n: int, seed: int, sharpness: float = 1.0) -> CurvedSoftmax:
        """Normal draws; the Fisher matrix grows like `sharpness`."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=DOUBLE, generator=generator)

        bends = draw(prompts, outcomes, n, n)
        return cls(
            draw(prompts, outcomes) / 2,
            draw(prompts, outcomes, n) * sharpness**0.5,
            (bends + bends.mT) / 2 * sharpness**0.5,
        )

    @property
    def probability(self) -> Tensor:
        """p(y) at the origin, [m, y]."""
        return torch.softmax(self.bias, -1)

    def change(self, x: Tensor) -> Tensor:
        """Change of the logits at x, [m, y]."""
        return self.slopes @ x + torch.einsum("i,myij,j->my", x, self.bends, x) / 2

    @property
    def safety(self) -> SoftmaxFunction:
        """The model as the products see it."""
        return SoftmaxFunction(lambda x: self.bias + self.change(x), torch.zeros(self.slopes.shape[-1], dtype=DOUBLE))

    def kl(self, x: Tensor) -> Tensor:
        """Exact KL [m] at x, nats."""
        return exact_kl(self.probability, self.change(x))

    def scores(self, x: Tensor) -> Tensor:
        """grad log p(y) at x, [m, y, n]."""
        slopes = self.slopes + torch.einsum("myij,j->myi", self.bends, x)
        p = torch.softmax(self.bias + self.change(x), -1)
        return slopes - torch.einsum("my,myi->mi", p, slopes)[:, None]

    def score_curvature(self, u: Tensor) -> Tensor:
        """u' A_y u with A_y the Hessian of log p(y) at the origin, [m, y]."""
        p = self.probability
        bend, slope = torch.einsum("i,myij,j->my", u, self.bends, u), self.slopes @ u
        mean_slope = (p * slope).sum(-1, keepdim=True)
        variance = (p * (slope - mean_slope).square()).sum(-1, keepdim=True)
        return bend - (p * bend).sum(-1, keepdim=True) - variance

    def fisher(self, x: Tensor) -> Tensor:
        """F [m, n, n] at x, nats per parameter unit squared."""
        p, s = torch.softmax(self.bias + self.change(x), -1), self.scores(x)
        return torch.einsum("myi,my,myj->mij", s, p, s)

    def variance(self, quantity: Tensor) -> Tensor:
        """Var_y at the origin of a quantity [m, y], returns [m]."""
        p = self.probability
        centred = quantity - (p * quantity).sum(-1, keepdim=True)
        return (p * centred.square()).sum(-1)


def score_objective(model: SoftmaxFunction) -> FunctionObjective:
    """The m y scores of a softmax model as examples, weighted so that G'G / (m y) is its mean Fisher matrix."""
    fixed = model.log_probability(model.anchor).detach()
    weight = (fixed.exp() * fixed.shape[-1]).sqrt()
    return FunctionObjective(lambda x: (weight * model.log_probability(x)).reshape(-1), model.anchor)


def orthogonal_slope(model: CurvedSoftmax, seed: int) -> Tensor:
    """A random unit gradient [n] that no score of the model feels at the origin: F g = 0."""
    n = model.slopes.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, dtype=DOUBLE, generator=generator)
    scores = model.scores(torch.zeros(n, dtype=DOUBLE)).reshape(-1, n)
    g = g - torch.linalg.pinv(scores, rtol=1e-10) @ (scores @ g)
    unit: Tensor = g / g.norm()
    return unit
