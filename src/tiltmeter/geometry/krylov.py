"""Lanczos: the few numbers of a huge symmetric matrix that one starting vector can feel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.errors import NumericalError
from tiltmeter.geometry.space import dot, norm

#: A residual this small against the largest coefficient means the Krylov space is complete (at least ten roundings: the
#: residual of a complete space is rounding noise, which in float32 would otherwise be taken for a direction).
BREAKDOWN = 1e-10


@dataclass(frozen=True)
class Krylov:
    """An orthonormal basis Q [n, k] of span{b, A b, ..., A^(k-1) b} in which A is tridiagonal.

    Attributes:
        basis: the k columns of Q, each [n]; the first is b / ||b||.
        diagonal: [k], float64.
        off_diagonal: [k-1], float64.
        start_norm: ||b||.
        residual: norm of what the next vector would have had; 0 when the space is invariant.
    """

    basis: tuple[Tensor, ...]
    diagonal: Tensor
    off_diagonal: Tensor
    start_norm: float
    residual: float

    @property
    def tridiagonal(self) -> Tensor:
        """T = Q' A Q, [k, k] float64."""
        off = self.off_diagonal
        return torch.diag(self.diagonal) + torch.diag(off, 1) + torch.diag(off, -1)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values [k], ascending, and the weight of b / ||b|| on each, [k] (the weights add up to 1)."""
        values, vectors = torch.linalg.eigh(self.tridiagonal)
        return values, vectors[0] ** 2

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(A) b ~ ||b|| Q f(T) e_1, shape [n]; exact when the space is invariant. Cost: k vector additions."""
        values, vectors = torch.linalg.eigh(self.tridiagonal)
        coefficients = self.start_norm * (vectors @ (function(values) * vectors[0]))
        out = torch.zeros_like(self.basis[0])
        for coefficient, column in zip(coefficients.tolist(), self.basis, strict=True):
            out.add_(column, alpha=coefficient)
        return out


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, k: int) -> Krylov:
    """Build a Krylov basis with full reorthogonalisation.

    Args:
        matvec: v [n] -> A v [n], A symmetric.
        start: b [n], not zero.
        k: vectors wanted; fewer come back when the space is invariant sooner.

    Raises:
        NumericalError: b is zero or a product is not finite.

    Cost: k products with A; k vectors of memory.
    Source: Lanczos 1950; full reorthogonalisation as in Golub and Van Loan, section 10.3.5.
    """
    start_norm = norm(start)
    if not start_norm > 0:
        raise NumericalError("cannot start Lanczos: the starting vector is zero or not finite")
    basis = [start / start_norm]
    complete = max(BREAKDOWN, 10 * torch.finfo(start.dtype).eps)
    diagonal: list[float] = []
    off: list[float] = []
    while True:
        image = matvec(basis[-1]).clone()
        diagonal.append(dot(image, basis[-1]))
        for _ in range(2):  # twice is enough to stay orthonormal in float32
            for column in basis:
                image.add_(column, alpha=-dot(image, column))
        residual = norm(image)
        if not residual < float("inf"):
            raise NumericalError("a Hessian-vector product is not finite; lower the step or use float32")
        scale = max(abs(x) for x in [*diagonal, *off]) or 1.0
        if len(basis) >= min(k, start.numel()) or residual <= complete * scale:
            break
        off.append(residual)
        basis.append(image.div_(residual))
    double = torch.float64
    return Krylov(
        tuple(basis), torch.tensor(diagonal, dtype=double), torch.tensor(off, dtype=double), start_norm, residual
    )
