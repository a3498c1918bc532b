"""Inner products of per-example gradients, from the thin factors they are made of.

A weight W [r, c] that enters a model through y_t = W x_t has, for example i, the gradient sum_t dy_t x_t^T: two thin
factors instead of an r by c matrix (Goodfellow 2015, arXiv:1510.01799). Their inner products come either from the
gradients themselves, a few rows at a time, or without them ("ghost" products, Li et al. 2021, arXiv:2110.05679):

    <g_i, g_j> = sum_st (dy_is . dy_jt) (x_is . x_jt)

Errors are those of float32 products of at most 2^16 terms, added up in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltmeter.geometry.space import PIECE

#: Gradients are formed in so many bytes on a CPU; larger pieces fall out of its cache and take up to twice as long.
_CACHE = 2**25

#: Multiplications that take as long as one entry of a ghost product, or of a gradient, takes for moving it through
#: memory, in the choice of a route; measured on a CPU.
_GHOST_ENTRY, _GRADIENT_ENTRY = 200, 16


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already: half precision is for storage, not for products."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Factor:
    """Gradients of b examples by one use of one parameter: example i has sum_t left[i, t] right[i, t]^T.

    Attributes:
        first: index of the first of the b examples.
        left: [b, t, r]; or, where rows of a table are looked up, their numbers [b, t], each standing for a unit vector.
        right: [b, t, c].
    """

    first: int
    left: Tensor
    right: Tensor

    @property
    def looks_up(self) -> bool:
        """Whether `left` holds row numbers."""
        return self.left.ndim == 2

    @property
    def examples(self) -> slice:
        """Which examples these are."""
        return slice(self.first, self.first + self.right.shape[0])

    @property
    def positions(self) -> int:
        """Number b t of positions."""
        return self.right.shape[0] * self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of both factors."""
        return self.left.nbytes + self.right.nbytes

    def packed(self, gradient: Tensor) -> Factor | None:
        """Without positions where the output gradient [b, t, ...] is zero, if that saves a quarter or more.

        At the output layer only supervised positions have any; None if no position of any example has.
        """
        kept = gradient.any(-1)
        longest = int(kept.sum(1).max())
        if longest == 0:
            return None
        if longest > 0.75 * kept.shape[1]:
            return self
        order = torch.sort(kept.byte(), dim=1, descending=True, stable=True).indices[:, :longest]
        row = torch.arange(len(kept), device=kept.device)[:, None]
        return Factor(self.first, self.left[row, order], self.right[row, order])

    def add_to(self, gradients: Tensor, start: int, fresh: bool) -> None:
        """Add rows `start` onwards of the gradients [b, r, c], or put them there if `fresh`."""
        stop = start + gradients.shape[1]
        if not self.looks_up:
            left = self.left[:, :, start:stop].transpose(1, 2)
            gradients.baddbmm_(left, self.right, beta=0.0 if fresh else 1.0)
            return
        if fresh:
            gradients.zero_()
        example, position = ((self.left >= start) & (self.left < stop)).nonzero(as_tuple=True)
        rows = self.left[example, position] - start
        gradients.index_put_((example, rows), self.right[example, position], accumulate=True)


@dataclass
class Pieces:
    """All that the per-example gradients of one parameter are the sum of.

    Attributes:
        shape: shape of the parameter.
        factors: one for every use as a matrix and every batch.
        rows: gradients [m, size] known directly.
    """

    shape: torch.Size
    factors: list[Factor] = field(default_factory=list)
    rows: Tensor | None = None

    def gram(self, m: int, chunk_bytes: int) -> Tensor:
        """Inner products [m, m] in float64, on the CPU.

        Cost: with N positions in all, the smaller of 2 N^2 (r + c) and 2 (N + m^2) r c operations; the lookups of a
        table always cost the former, without r. Memory: twice `chunk_bytes`; factors in half precision once more, wide.
        """
        factors = _joined(self.factors, chunk_bytes)
        if self.rows is not None:
            return self._by_rows(factors, m, chunk_bytes) if factors else _add_up(self.rows)
        products = torch.zeros(m, m, dtype=torch.float64)
        tables = [factor for factor in factors if factor.looks_up]
        matrices = [factor for factor in factors if not factor.looks_up]
        if _ghost_is_cheaper(matrices, m):
            tables += matrices
        elif matrices:
            products += self._by_rows(matrices, m, chunk_bytes)
            for table in tables:
                for matrix in matrices:
                    _add_ghost(products, table, matrix, chunk_bytes)
        for i, one in enumerate(tables):
            for other in tables[i:]:
                _add_ghost(products, one, other, chunk_bytes)
        return products

    def combine(self, weights: Tensor, chunk_bytes: int) -> Tensor:
        """Weighted sums of the gradients, [k, *shape], for weights [k, m].

        Cost: 2 (N + k m) r c operations with N positions in all, where k weight gradients would be 2 k N r c. Memory:
        the result, and `chunk_bytes`.
        """
        factors = _joined(self.factors, chunk_bytes)
        if not factors:
            if self.rows is None:
                return weights.new_zeros(len(weights), *self.shape)
            return (weights.to(self.rows) @ self.rows).view(-1, *self.shape)
        like = factors[0].right
        weights, c = weights.to(like), self.shape[1]
        out = like.new_empty(len(weights), self.shape.numel())
        for start, flat in self._gradients(factors, weights.shape[1], chunk_bytes):
            torch.mm(weights, flat, out=out[:, start * c : start * c + flat.shape[1]])
        return out.view(-1, *self.shape)

    def _by_rows(self, factors: Sequence[Factor], m: int, chunk_bytes: int) -> Tensor:
        """The products from the gradients, a few rows of the parameter at a time."""
        products = torch.zeros(m, m, dtype=torch.float64)
        for _, flat in self._gradients(factors, m, chunk_bytes):
            products += _add_up(flat)
        return products

    def _gradients(self, factors: Sequence[Factor], m: int, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """The gradients a few rows of the parameter at a time: first row, and [m, rows c] in a buffer used again."""
        like = factors[0].right
        r, c = self.shape
        if like.device.type == "cpu":
            chunk_bytes = min(chunk_bytes, _CACHE)
        step = min(r, max(1, chunk_bytes // (m * c * like.element_size())))
        buffer = like.new_empty(m * step * c)
        for start in range(0, r, step):
            chunk = buffer[: m * min(step, r - start) * c].view(m, -1, c)
            fresh = set(range(m))
            for factor in factors:
                mine = set(range(m)[factor.examples])
                if mine & fresh and not mine <= fresh:  # some of them have a gradient already, others garbage
                    chunk[sorted(mine & fresh)] = 0
                factor.add_to(chunk[factor.examples], start, fresh=mine <= fresh)
                fresh -= mine
            if fresh:
                chunk[sorted(fresh)] = 0
            flat = chunk.view(m, -1)
            if self.rows is not None:
                flat += self.rows[:, start * c : start * c + flat.shape[1]]
            yield start, flat


def _add_up(rows: Tensor) -> Tensor:
    """Products [m, m] of wide rows: a long float32 dot product loses digits, so pieces of it are added in float64."""
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], PIECE):
        piece = rows[:, start : start + PIECE]
        products += (piece @ piece.T).cpu().double()
    return products


def _joined(factors: Sequence[Factor], most_bytes: int) -> list[Factor]:
    """The same factors, wide, with neighbouring batches in one as far as that takes no more than so many bytes."""
    runs: list[list[Factor]] = []
    for factor in sorted(factors, key=lambda factor: factor.first):
        for run in runs:
            follows = run[-1].examples.stop == factor.first and run[-1].looks_up == factor.looks_up
            if follows and sum(other.nbytes for other in run) + factor.nbytes <= most_bytes:
                run.append(factor)
                break
        else:
            runs.append([factor])
    return [_side_by_side(run) for run in runs]


def _side_by_side(run: Sequence[Factor]) -> Factor:
    """One wide factor for examples that follow each other; shorter ones are filled up with zeros."""
    if len(run) == 1:
        left, right = run[0].left, run[0].right
    else:
        t = max(factor.right.shape[1] for factor in run)
        right = torch.cat([F.pad(f.right, (0, 0, 0, t - f.right.shape[1])) for f in run])
        left = torch.cat([F.pad(f.left, (0, 0) * (f.left.ndim - 2) + (0, t - f.left.shape[1])) for f in run])
    return Factor(run[0].first, left if run[0].looks_up else wide(left), wide(right))


def _ghost_is_cheaper(factors: Sequence[Factor], m: int) -> bool:
    if not factors:
        return True
    positions, r, c = sum(f.positions for f in factors), factors[0].left.shape[-1], factors[0].right.shape[-1]
    return positions**2 * (r + c + _GHOST_ENTRY) < (positions + m**2 + m * _GRADIENT_ENTRY) * r * c


def _add_ghost(products: Tensor, one: Factor, other: Factor, chunk_bytes: int) -> None:
    """Add the products of two factors, and their mirror image, without forming a gradient."""
    per_example = one.right.shape[1] * other.positions * one.right.element_size()
    step = max(1, chunk_bytes // (2 * per_example))
    block = []
    for start in range(0, one.right.shape[0], step):
        part = Factor(0, one.left[start : start + step], one.right[start : start + step])
        pairs = (part.right.flatten(0, 1) @ other.right.flatten(0, 1).T).mul_(_left_products(part, other))
        shape = (*part.right.shape[:2], *other.right.shape[:2])
        block.append(pairs.view(shape).sum(3).cpu().double().sum(1))
    added = torch.cat(block)
    products[one.examples, other.examples] += added
    if one is not other:
        products[other.examples, one.examples] += added.T


def _left_products(one: Factor, other: Factor) -> Tensor:
    """Inner products of all left vectors of two factors, [positions, positions]; row numbers stand for unit vectors."""
    if one.looks_up and other.looks_up:
        return one.left.reshape(-1, 1) == other.left.reshape(1, -1)
    if one.looks_up:
        return other.left.flatten(0, 1)[:, one.left.flatten()].T
    if other.looks_up:
        return one.left.flatten(0, 1)[:, other.left.flatten()]
    return one.left.flatten(0, 1) @ other.left.flatten(0, 1).T
