"""A loss whose gradient changes along a path, by hand: g.x + x'Hx/2 + (c.x)^3 / 6 in five parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltmeter.geometry.motion import Slope

N = 5


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


G = normal(0, N) + 2 * torch.sign(normal(0, N))
H = normal(1, N, N) + normal(1, N, N).T
C = normal(2, N)


def gradient(x: Tensor, cubic: float = 1.0) -> Tensor:
    """Of g.x + x'Hx/2 + cubic (c.x)^3 / 6."""
    return G + H @ x + cubic * (C @ x) ** 2 / 2 * C


def slope(mean: Tensor, spread: Tensor | None = None) -> Slope:
    """A gradient as if it had been measured, with this scatter over batches or none."""
    spread = torch.zeros_like(mean) if spread is None else spread
    return Slope(mean, spread, (mean,), torch.ones(1, 1), mean.norm().reshape(1))
