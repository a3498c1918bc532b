"""Singular values of a weight matrix and of its change: intruder dimensions, low-rank shares, effective rank.

All are read off the smaller of the two Gram matrices in float64, so a matrix [p, q] costs min(p, q)^3 and one copy.
Squaring halves the digits: singular values below 1e-6 of the largest are rounding noise and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Singular values below this share of the largest are not told from zero.
ROUNDING = 1e-6


@dataclass(frozen=True)
class LowRank:
    """A change b a [p, q] of low rank.

    Attributes:
        b: [p, r].
        a: [r, q].
    """

    b: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """The product [p, q]."""
        return self.b @ self.a


@dataclass(frozen=True)
class Intruders:
    """Leading singular directions of a tuned matrix that the base matrix does not have.

    Attributes:
        count: how many of the top directions are intruders.
        top: how many were looked at.
        energy: sum of sigma^2 over the intruders.
        top_energy: sum of sigma^2 over all that were looked at.
        cosines: [top], largest cosine of each with any direction of the base.
    """

    count: int
    top: int
    energy: float
    top_energy: float
    cosines: Tensor


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [k], descending, and left singular vectors [p, k] of a matrix [p, q], as far as told from zero.

    Cost: one eigenproblem of min(p, q), float64.
    """
    w = matrix.double()
    rows, columns = w.shape
    values, vectors = torch.linalg.eigh(w @ w.T if rows <= columns else w.T @ w)
    sigma, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    held = sigma > ROUNDING * sigma[0]
    sigma, vectors = sigma[held], vectors[:, held]
    return sigma, vectors if rows <= columns else (w @ vectors) / sigma


def intruders(base: Tensor, tuned: Tensor, top: int, threshold: float) -> Intruders:
    """Count directions u_j among the top left singular vectors of `tuned` with max_i |<u_j, u_i(base)>| < threshold.

    Args:
        base: W_0 [p, q].
        tuned: W [p, q].
        top: leading directions of W to look at.
        threshold: 0.6 is usual. Where singular values of the base lie close together its directions may turn into each
            other, and a direction inside their span can count as an intruder.

    Source: Shuttleworth et al. 2024, arXiv:2410.21228.
    """
    _, known = left_singular(base)
    sigma, vectors = left_singular(tuned)
    sigma, vectors = sigma[:top], vectors[:, :top]
    cosines = (known.T @ vectors).abs().amax(0).clamp_max(1.0) if known.shape[1] else torch.zeros(len(sigma)).to(sigma)
    strange = cosines < threshold
    energy = sigma.square()
    return Intruders(int(strange.sum()), len(sigma), float(energy[strange].sum()), float(energy.sum()), cosines)


def singular_values(change: Tensor | LowRank) -> Tensor:
    """Singular values, descending, float64: [min(p, q)] of a matrix, [r] of a low-rank change.

    Cost: of a low-rank change two QR factorisations of its factors and an r x r problem; the product is not formed.
    """
    if isinstance(change, LowRank):
        left = torch.linalg.qr(change.b.double()).R
        right = torch.linalg.qr(change.a.double().T).R
        values: Tensor = torch.linalg.svdvals(left @ right.T)
        return values
    w = change.double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp_min(0).sqrt()


def top_share(sigma: Tensor, top: int) -> float:
    """Share of the energy sum sigma^2 in the `top` largest singular values (descending); 1 for none but zeros."""
    energy = sigma.double().square()
    total = float(energy.sum())
    return float(energy[:top].sum()) / total if total > 0 else 1.0


def projected_share(alignment: Tensor, change: Tensor, top: int) -> tuple[float, float]:
    """Norm shares |U U'M| / |M| for M = alignment and M = alignment + change, U the top left vectors of alignment.

    Returns: R_align and R_ft; R_ft / R_align is how much of the alignment's own directions is kept.

    Source: Perin et al. 2025 (LoX), arXiv:2506.15606.
    """
    directions = left_singular(alignment)[1][:, :top]
    shares = []
    for m in (alignment.double(), alignment.double() + change.double()):
        whole = float(torch.linalg.matrix_norm(m))
        shares.append(float(torch.linalg.matrix_norm(directions.T @ m)) / whole if whole > 0 else 1.0)
    return shares[0], shares[1]


def effective_rank(rows: Tensor) -> float | None:
    """exp of the entropy of the singular values, normalised to sum 1, of [m, h]; between 1 and m. None for zeros.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    sigma = torch.linalg.svdvals(rows.double())
    total = float(sigma.sum())
    if not total > 0:
        return None
    p = sigma / total
    return float(torch.special.entr(p).sum().exp())
