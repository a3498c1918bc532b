"""Sketched principal components against dense ones."""

from __future__ import annotations

import math

import pytest
import torch

from tiltmeter.errors import DataError
from tiltmeter.tracking.path import PIECE, Sketch, path_shape


def bent_path(n: int, points: int, seed: int, scale: float) -> torch.Tensor:
    """A path [T, n] that runs one way, turns, and jitters."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, generator=generator)
    t = torch.linspace(0, 1, points)[:, None]
    jitter = 0.1 * torch.randn(points, n, generator=generator).cumsum(0) / math.sqrt(points)
    return scale * (t * first + 0.5 * t**2 * second + jitter)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_sketched_shares_are_those_of_dense_pca(scale: float) -> None:
    path = bent_path(40_000, 12, 1, scale)
    sketched = path_shape(torch.stack([Sketch(seed=3).of([row]) for row in path]))
    dense = torch.linalg.svdvals(path.double() - path.double().mean(0)).square()
    torch.testing.assert_close(sketched.shares, dense / dense.sum(), atol=0.01, rtol=0.03)
    assert 0.5 < float(sketched.shares[0]) < 0.99  # a path on one line would pass with any sketch


def test_dense_points_are_exact_and_positions_keep_distances() -> None:
    path = bent_path(50, 7, 2, 1.0).double()
    shape = path_shape(path, components=7)
    torch.testing.assert_close(torch.cdist(shape.positions, shape.positions), torch.cdist(path, path))
    expected = float((path[-1] - path[0]).norm() / (path[1:] - path[:-1]).norm(dim=1).sum())
    assert shape.straightness == pytest.approx(expected, rel=1e-12)
    straight = path_shape(torch.arange(5.0)[:, None] * torch.ones(1, 9))
    torch.testing.assert_close(straight.shares[0], torch.tensor(1.0, dtype=torch.float64))
    assert straight.straightness == pytest.approx(1.0)


def test_inner_products_are_kept_in_the_mean_with_the_variance_of_a_count_sketch() -> None:
    """Over 400 seeds: unbiased, scattered by sqrt(2 / d) for equal vectors, also where energy sits in one column."""
    sketch_size, seeds = 61, 400
    for x in (torch.randn(2000, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 50)):
        x = x.clone()
        if x.ndim == 2:
            x[:, 7] = torch.linspace(1, 2, 40)
        energy = float(x.double().square().sum())
        found = torch.stack([Sketch(sketch_size, seed).of([x]).square().sum() for seed in range(seeds)]) / energy
        expected = math.sqrt(2 / sketch_size)
        assert abs(float(found.mean()) - 1) < 4 * expected / math.sqrt(seeds)
        assert float(found.std()) < 1.25 * expected


def test_a_sketch_is_linear_and_the_same_in_parts_and_pieces() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, PIECE // 8191 * 8191 + 8192, generator=generator)
    sketch = Sketch(seed=1)
    torch.testing.assert_close(sketch.of([2 * x - y]), 2 * sketch.of([x]) - sketch.of([y]), atol=2e-3, rtol=0)
    assert not torch.equal(Sketch(seed=1).of([x]), Sketch(seed=2).of([x]))
    norm = float(x.double().norm())
    assert float(sketch.of([x[:100].reshape(10, 10), x[100:]]).norm()) == pytest.approx(norm, rel=0.05)


def test_too_few_points_or_no_motion_is_told() -> None:
    with pytest.raises(DataError, match="at least 3"):
        path_shape(torch.eye(2))
    with pytest.raises(DataError, match="did not move"):
        path_shape(torch.ones(4, 3))
