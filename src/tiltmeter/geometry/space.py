"""Which parameters are being trained, and in what order they stand in a flat vector.

Where several processes hold a part of every vector each (`lm.gathered`), sums over its entries go over all of them:
inside `summed_by`, `dot`, `products` and `norm` do. What is done entry by entry needs no word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltmeter.errors import SpaceMismatch

#: Width of the pieces that `dot` adds up in float64. A float32 dot product over 1e8 entries loses 1 to 3 % on a CPU.
PIECE = 2**16

#: Values that `dot` multiplies before it adds them up.
BLOCK = 2**22

#: Adds up a tensor over the processes that hold a part of every vector each; None where vectors are whole.
_TOTAL: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("total", default=None)


@contextmanager
def summed_by(total: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, vectors are parts, and sums over their entries are added up by `total`."""
    before = _TOTAL.set(total)
    try:
        yield
    finally:
        _TOTAL.reset(before)


def vectors_in_parts() -> bool:
    """Whether vectors are parts, inside `summed_by`."""
    return _TOTAL.get() is not None


def _total(held: Tensor) -> Tensor:
    total = _TOTAL.get()
    return held if total is None else total(held)


@dataclass(frozen=True)
class ParameterSpace:
    """An ordered set of named tensors seen as one vector of length n.

    Attributes:
        names: parameter names, in the order of the flat vector.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise SpaceMismatch(f"{len(self.names)} parameter names but {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            raise SpaceMismatch("parameter names must differ; one is there twice")
        ends, total = [], 0
        for shape in self.shapes:
            total += math.prod(shape)
            ends.append(total)
        object.__setattr__(self, "_ends", tuple(ends))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ParameterSpace:
        """The space spanned by named tensors, in their order."""
        return cls(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))

    @property
    def size(self) -> int:
        """Number n of parameters."""
        return self._ends[-1] if self._ends else 0

    @property
    def digest(self) -> str:
        """Sixteen hex digits that two spaces share exactly when names, shapes and order agree."""
        return hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()[:16]

    def slices(self) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
        """Name, slice of the flat vector and shape of every tensor."""
        start = 0
        for name, shape, end in zip(self.names, self.shapes, self._ends, strict=True):
            yield name, slice(start, end), shape
            start = end

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy named tensors into one vector [n].

        Raises:
            SpaceMismatch: a tensor is missing or has another shape.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                came = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise SpaceMismatch(f"parameter {name!r}: expected shape {shape}, got {came}")
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector [n] as named tensors; no copy.

        Raises:
            SpaceMismatch: the vector has another length.
        """
        self.check(vector)
        return {name: vector[part].view(shape) for name, part, shape in self.slices()}

    def check(self, vector: Tensor) -> Tensor:
        """Return `vector` if it has shape [n].

        Raises:
            SpaceMismatch: it has not.
        """
        if vector.shape != (self.size,):
            raise SpaceMismatch(f"expected a vector of {self.size} parameters, got shape {tuple(vector.shape)}")
        return vector

    def require_same(self, other: ParameterSpace) -> None:
        """Check that two spaces are one.

        Raises:
            SpaceMismatch: names, shapes or order differ.
        """
        if self.names != other.names or self.shapes != other.shapes:
            raise SpaceMismatch(
                f"built on different parameters: {self.size} values (digest {self.digest}) against "
                f"{other.size} values (digest {other.digest}); measure both with the same model and the same adapter"
            )


def blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of vectors [n] piece by piece: what mixes dtypes would otherwise make a copy of length n."""
    return zip(*(torch.split(vector, BLOCK) for vector in vectors), strict=True)


def multiply(onto: Tensor, vector: Tensor) -> Tensor:
    """Multiply a vector [n] by another of any dtype, in place, and return it."""
    for mine, theirs in blocks(onto, vector):
        mine.mul_(theirs)
    return onto


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two vectors [n], added up in float64 piece by piece.

    Cost: one read of both; no copy in float64.
    Error: below 1e-6 relative to ||a|| ||b|| in float32 at any n.
    """
    total = 0.0
    for start in range(0, a.numel(), BLOCK):  # products of a block at a time: no vector of length n is made
        x, y = a[start : start + BLOCK], b[start : start + BLOCK]
        if x.dtype in (torch.bfloat16, torch.float16):
            x, y = x.float(), y.float()
        n = x.numel() // PIECE * PIECE
        total += float((x[:n].view(-1, PIECE) * y[:n].view(-1, PIECE)).sum(1).double().sum())
        total += float((x[n:].double() * y[n:].double()).sum())
    return float(_total(torch.tensor(total, dtype=torch.float64))) if vectors_in_parts() else total


def products(rows: Sequence[Tensor], others: Sequence[Tensor], diagonal: Tensor | None = None) -> Tensor:
    """Inner products A D B' [k, j], float64, of vectors [n] with a diagonal D [n] between; all pairs at once.

    Cost: one read of every vector; no copy of length n.
    Error: as `dot`.
    """
    out = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows[0].device)
    for start in range(0, rows[0].numel(), PIECE):
        part = slice(start, start + PIECE)
        left, right = (torch.stack([_wide(vector[part]) for vector in held]) for held in (rows, others))
        scaled = left if diagonal is None else left * diagonal[part].to(left)
        out += (scaled @ right.to(scaled).T).double()
    return _total(out.cpu())


def _wide(a: Tensor) -> Tensor:
    return a.float() if a.dtype in (torch.bfloat16, torch.float16) else a


def norm(a: Tensor) -> float:
    """Euclidean norm of a vector [n], added up like `dot`."""
    return math.sqrt(dot(a, a))
