"""The safety subspace: the few directions in which the aligned model's answers are sharp.

With G [m, n] the per-example scores, F = G'G / m and the m x m Gram matrix K = GG' share their non-zero eigenvalues (up
to 1/m). If K = m U diag(lambda) U', the eigenvectors of F are V = G'C with C = U (m lambda)^(-1/2). Keeping C [m, k]
costs kilobytes where V [n, k] costs gigabytes; V'theta = C'(G theta) is one JVP, V z = G'(C z) one weighted gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.krylov import lanczos
from tiltmeter.geometry.objective import Objective
from tiltmeter.geometry.space import ParameterSpace, dot, products

#: Eigenvalues below this share of the largest are rounding noise of a float64 Gram matrix of float32 gradients.
ROUNDING = 1e-10


class Basis(Protocol):
    """k orthonormal directions V [n, k] of a parameter space."""

    @property
    def space(self) -> ParameterSpace:
        """The space of the directions."""
        ...

    def coordinates(self, theta: Tensor) -> Tensor:
        """Coordinates z = V' theta [k] for a displacement [n]."""
        ...

    def lift(self, z: Tensor) -> Tensor:
        """V z [n] for coordinates [k]."""
        ...


@dataclass(frozen=True)
class SampleBasis:
    """Directions held as combinations of per-example gradients; memory m k.

    Attributes:
        objective: the safety scores.
        coefficients: C [m, k] with V = G' C.
    """

    objective: Objective
    coefficients: Tensor

    @property
    def space(self) -> ParameterSpace:
        """That of the scores."""
        return self.objective.space

    def coordinates(self, theta: Tensor) -> Tensor:
        """C' (G theta). Cost: one JVP."""
        return self.coefficients.T @ self.objective.directional(theta).to(self.coefficients)

    def lift(self, z: Tensor) -> Tensor:
        """G' (C z). Cost: one weighted forward and backward."""
        return self.objective.gradient(self.coefficients @ z.to(self.coefficients))


@dataclass(frozen=True)
class DenseBasis:
    """Directions held as they are; memory n k, for small spaces such as LoRA.

    Attributes:
        space: the parameter space.
        columns: k vectors [n], orthonormal.
    """

    space: ParameterSpace
    columns: tuple[Tensor, ...]

    def coordinates(self, theta: Tensor) -> Tensor:
        """V' theta. Cost: k inner products."""
        return products(self.columns, [theta])[:, 0]

    def lift(self, z: Tensor) -> Tensor:
        """V z. Cost: k vector additions."""
        out = torch.zeros_like(self.columns[0])
        for weight, column in zip(z.tolist(), self.columns, strict=True):
            out.add_(column, alpha=weight)
        return out


@dataclass(frozen=True)
class Sensitivity:
    """The top of the Fisher spectrum and its directions.

    Attributes:
        eigenvalues: [k], descending, nats per parameter unit squared.
        spectrum: all eigenvalues that were computed, [>= k], descending.
        trace: tr F, the sum over the whole spectrum; None when only the top was computed.
        basis: the directions.
    """

    eigenvalues: Tensor
    spectrum: Tensor
    trace: float | None
    basis: Basis

    @property
    def rank(self) -> int:
        """Number of directions kept, k."""
        return int(self.eigenvalues.numel())

    def coordinates(self, theta: Tensor) -> Tensor:
        """Coordinates z = V' theta [k]."""
        return self.basis.coordinates(theta)

    def lift(self, z: Tensor) -> Tensor:
        """Displacement V z [n]."""
        return self.basis.lift(z)

    def energy(self, z: Tensor) -> Tensor:
        """Second-order safety loss 1/2 z' Lambda z [...], nats, of coordinates [..., k]; the only Fisher weighting."""
        return (self.eigenvalues * z.to(self.eigenvalues).square()).sum(-1) / 2


def gram_matrix(objective: Objective) -> Tensor:
    """K = G G' [m, m], float64, by one gradient per example; a reference for small spaces.

    Cost: m gradients; memory m n.
    """
    eye = torch.eye(objective.m)
    rows = [objective.gradient(weights) for weights in eye]
    return torch.tensor([[dot(a, b) for b in rows] for a in rows], dtype=torch.float64)


def spectrum_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [m] of F = G'G / m, descending, and the coefficients C [m, m] of its eigenvectors V = G'C.

    Columns that belong to rounding noise are zero.
    """
    m = gram.shape[0]
    values, vectors = torch.linalg.eigh(gram.double() / m)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    held = values > ROUNDING * values[0]
    scale = torch.where(held, (m * values).clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    return values, vectors * scale


def measure_sensitivity(objective: Objective, rank: int, gram: Tensor | None = None) -> Sensitivity:
    """Find the top directions of the empirical Fisher matrix F = G'G / m of m scores.

    Args:
        objective: whose per-example gradients are the scores.
        rank: directions wanted.
        gram: K = G G' [m, m] if it is known already.

    Raises:
        DegenerateError: the examples determine fewer directions than asked for.

    Cost: one Gram matrix (about 1.5 forward+backward, see `lm.gram`) and an m x m eigenproblem.
    Error: that of the Gram matrix; the sampling error is far larger, see `split_half_overlap`.
    """
    gram = gram_matrix(objective) if gram is None else gram
    values, coefficients = spectrum_of(gram)
    determined = int((values > ROUNDING * values[0]).sum()) if bool(values[0] > 0) else 0
    if rank < 1 or rank > determined:
        beyond = float(values[determined]) if determined < values.numel() else 0.0
        raise DegenerateError(
            f"asked for {rank} sensitive directions but the {objective.m} safety examples determine only {determined} "
            f"(the next eigenvalue, {beyond:.1e} nats, is below rounding). Add safety examples or ask for rank <= "
            f"{determined}."
        )
    basis = SampleBasis(objective, coefficients[:, :rank])
    return Sensitivity(values[:rank], values, float(values.sum()), basis)


def lanczos_sensitivity(objective: Objective, rank: int, iterations: int, seed: int = 0) -> Sensitivity:
    """Find the top directions of an objective's Hessian at the anchor; for a KL objective that is the exact Fisher.

    Args:
        objective: usually the safety KL, whose Hessian at the anchor is the softmax Gauss-Newton matrix.
        rank: directions wanted.
        iterations: Krylov vectors, at least `rank`; about 2 rank + 10 settles the top eigenvalues.
        seed: of the random starting vector.

    Raises:
        DegenerateError: fewer than `rank` directions have positive curvature.

    Cost: `iterations` HVPs; memory (iterations + rank) n, so for small spaces (LoRA).
    """
    generator = torch.Generator().manual_seed(seed)
    like = objective.gradient()
    start = torch.randn(objective.space.size, generator=generator, dtype=like.dtype).to(like.device)
    krylov = lanczos(objective.hvp, start, iterations)
    values, vectors = torch.linalg.eigh(krylov.tridiagonal)
    values, vectors = values.flip(0), vectors.flip(1)
    positive = int((values > ROUNDING * values[0].abs()).sum())
    if rank > positive:
        raise DegenerateError(
            f"asked for {rank} sensitive directions but {len(krylov.basis)} Krylov vectors found only {positive} of "
            "positive curvature. Ask for fewer directions or more iterations."
        )
    columns = []
    for index in range(rank):
        column = torch.zeros_like(start)
        for weight, vector in zip(vectors[:, index].tolist(), krylov.basis, strict=True):
            column.add_(vector, alpha=weight)
        columns.append(column)
    return Sensitivity(values[:rank], values.clamp_min(0), None, DenseBasis(objective.space, tuple(columns)))


def split_half_overlap(gram: Tensor, rank: int, splits: int, seed: int = 0) -> Tensor:
    """Mean squared cosine between top-`rank` subspaces of two random halves of the examples, [splits].

    Answers how much of the subspace is the sample: 1 for identical subspaces, rank/n for unrelated ones.
    Needs no gradient: V_A' V_B = C_A' K_AB C_B.
    Where a half determines fewer than `rank` directions, the mean is over those it has: missing ones would otherwise
    pass for unrelated. A half that determines none gives NaN.
    """
    m = gram.shape[0]
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(splits):
        order = torch.randperm(m, generator=generator)
        left, right = order[: m // 2], order[m // 2 :]
        bases = [spectrum_of(gram[half][:, half])[1][:, :rank] for half in (left, right)]
        determined = min(int((basis != 0).any(0).sum()) for basis in bases)
        cosines = bases[0].T @ gram[left][:, right].double() @ bases[1]
        out.append(cosines.square().sum() / determined)
    return torch.stack(out)


def rank_by_energy(spectrum: Tensor, share: float = 0.9) -> int:
    """Fewest top eigenvalues that hold `share` of the sum."""
    total = spectrum.cumsum(0)
    return int((total < share * total[-1]).sum()) + 1


def projector(basis: Basis) -> Callable[[Tensor], Tensor]:
    """The map v -> V V' v [n]."""
    return lambda v: basis.lift(basis.coordinates(v))
