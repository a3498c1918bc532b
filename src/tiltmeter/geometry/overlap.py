"""The overlap of a weight change with the safety subspace, and what a change of no particular direction would show.

With V [n, d] orthonormal and a change delta [n], the score is OS = |V' delta| / |delta|. For a change whose direction
is uniform over the sphere, OS^2 follows Beta(d/2, (n - d)/2). Real changes are never uniform: they sit in some layers
more than in others, and so do the safety directions. `layer_null` keeps the length of the change in every layer and
only forgets its direction inside each, so that a score above it says more than "the change is where they are".

Source of the score: Springer et al. 2026, arXiv:2602.15799; its normalisation there could not be established, so this
one is a reconstruction and is named so in reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import special, stats
from torch import Tensor

from tiltmeter.errors import DegenerateError


@dataclass(frozen=True)
class Overlap:
    """One overlap score beside its null.

    Attributes:
        score: |V' delta| / |delta|, between 0 and 1.
        null_mean: its mean for a direction uniform over the sphere.
        z: (score - null_mean) / standard deviation of the null.
        quantile: share of uniform directions with a smaller score; 1.0 means beyond double precision.
        d: directions.
        n: parameters.
    """

    score: float
    null_mean: float
    z: float
    quantile: float
    d: int
    n: int


def overlap_score(projected: float, length: float, d: int, n: int) -> Overlap:
    """Put a score beside its null.

    Args:
        projected: |V' delta|.
        length: |delta|, positive.
        d: number of directions, below n.
        n: number of parameters.

    Raises:
        DegenerateError: the change has no length, or the directions fill the space.
    """
    if not length > 0 or not 0 < d < n:
        raise DegenerateError(
            f"an overlap score needs a change of positive length and fewer directions than parameters; got length "
            f"{length}, {d} directions and {n} parameters"
        )
    score = min(1.0, projected / length)
    mean = null_mean(d, n)
    deviation = math.sqrt(max(d / n - mean * mean, 1e-300))
    return Overlap(score, mean, (score - mean) / deviation, float(stats.beta.cdf(score**2, d / 2, (n - d) / 2)), d, n)


def null_mean(d: int, n: int) -> float:
    """Mean length of the projection of a uniform unit vector in n dimensions on d directions: E[OS]."""
    return _half_step(d / 2) / _half_step(n / 2)


def layer_null(blocks: Sequence[Tensor], lengths: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of OS^2 when the change keeps its length in every layer but not its direction.

    Args:
        blocks: V_l' V_l [d, d] of every layer, float64.
        lengths: |delta_l|.
        sizes: n_l, parameters of the layer.

    Error: the mean is exact; the deviation takes the d coordinates for Gaussian, off by O(1 / n_l).
    """
    total = sum(length**2 for length in lengths)
    covariance = sum(
        (block.double() * (length**2 / size) for block, length, size in zip(blocks, lengths, sizes, strict=True)),
        start=torch.zeros_like(blocks[0], dtype=torch.float64),
    )
    mean = float(covariance.trace()) / total
    return mean, math.sqrt(2 * float(covariance.square().sum())) / total


def _half_step(x: float) -> float:
    """Gamma(x + 1/2) / Gamma(x); for large x by its series, where the difference of two log-gammas loses digits."""
    if x < 1e3:
        return math.exp(float(special.gammaln(x + 0.5)) - float(special.gammaln(x)))
    return math.sqrt(x) * (1 - 1 / (8 * x) + 1 / (128 * x**2) + 5 / (1024 * x**3))
