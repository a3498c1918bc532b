"""The path of the weights, kept as sketches: principal components of a trajectory without its vectors.

A count sketch maps theta [n] to d sums of signed coordinates. It is linear and keeps inner products in the mean, so the
Gram matrix of T displacements, and with it their principal components, is found from T d numbers instead of T n.
Within a tensor coordinate i goes to bucket i mod d. With d prime, energy that sits in a few columns of a weight matrix
is still spread over all buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.errors import DataError

#: Buckets; a prime. Inner products are right to about sqrt(2 / d) = 1.6 % of the product of norms.
BUCKETS = 8191

#: Coordinates treated at a time, at most.
PIECE = 2**22


@dataclass(frozen=True)
class Sketch:
    """A count sketch with fixed random signs.

    Attributes:
        buckets: d.
        seed: of the signs; vectors can be compared only if sketched with the same seed, on the same kind of device.
    """

    buckets: int = BUCKETS
    seed: int = 0

    def of(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sketch of the vector that the tensors make one after the other, [d], float64, on the CPU.

        Cost: about 300 tokens' forward pass over all parameters; memory a few times `PIECE`.
        """
        out = torch.zeros(self.buckets, dtype=torch.float64)
        generators: dict[torch.device, torch.Generator] = {}
        rows = PIECE // self.buckets
        for tensor in tensors:
            flat = tensor.detach().reshape(-1)
            if flat.device not in generators:
                generators[flat.device] = torch.Generator(flat.device).manual_seed(self.seed)
            for begin in range(0, flat.numel(), rows * self.buckets):
                piece = flat[begin : begin + rows * self.buckets]
                signed = _signs(piece.numel(), generators[flat.device]).mul_(piece)
                whole = signed.numel() // self.buckets * self.buckets
                out += signed[:whole].view(-1, self.buckets).sum(0).double().cpu()
                out[: signed.numel() - whole] += signed[whole:].double().cpu()
        return out


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """Random signs [count], float32; eight from every random byte."""
    drawn = torch.randint(0, 256, (-(-count // 8),), generator=generator, dtype=torch.uint8, device=generator.device)
    table = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float() * 2 - 1
    return table.to(generator.device)[drawn.long()].reshape(-1)[:count]


@dataclass(frozen=True)
class PathShape:
    """Principal components of a weight path.

    Attributes:
        shares: share of the variance on each component, descending, summing to 1.
        positions: [T, c], coordinates of the points on the leading components, parameter units.
        straightness: distance from start to end over the length of the path, between 0 and 1.
    """

    shares: Tensor
    positions: Tensor
    straightness: float


def path_shape(points: Tensor, components: int = 3) -> PathShape:
    """Principal components of T points [T, d] of a path, dense or sketched.

    Args:
        points: displacements from any common origin, in the order of time.
        components: how many coordinates to return.

    Raises:
        DataError: fewer than three points, or all the same: they have no direction.

    Error: exact for dense points; with sketches of d buckets, shares are right to about sqrt(2 / d).
    Source: trajectory PCA as in arXiv:2602.16746.
    """
    if points.shape[0] < 3:
        raise DataError(f"a path needs at least 3 measured points for its principal components, got {points.shape[0]}")
    centred = points.double() - points.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = float(values.sum())
    if not total > 0:
        raise DataError("the weights did not move, so their path has no principal components")
    lengths = (points[1:] - points[:-1]).double().norm(dim=1).sum()
    straight = float((points[-1] - points[0]).double().norm() / lengths)
    return PathShape(values / total, vectors[:, :components] * values[:components].sqrt(), straight)
