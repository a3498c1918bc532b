"""Intruders, shares and ranks against numpy's full SVD in float64, and on matrices solved by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tiltmeter.geometry.spectrum import (
    LowRank,
    effective_rank,
    intruders,
    left_singular,
    projected_share,
    singular_values,
    top_share,
)

SHAPES = [(12, 30), (30, 12), (16, 16)]


def random(p, q, seed=0, scale=1.0):
    return torch.randn(p, q, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_left_vectors_are_those_of_numpy(shape, scale):
    w = random(*shape, scale=scale)
    sigma, u = left_singular(w)
    expected_u, expected, _ = np.linalg.svd(w.double().numpy(), full_matrices=False)
    torch.testing.assert_close(sigma, torch.from_numpy(expected), rtol=1e-7, atol=0.0)
    cosines = (torch.from_numpy(expected_u).T @ u).abs()
    torch.testing.assert_close(cosines.diagonal(), torch.ones(len(sigma), dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_intruders_against_numpy(shape, scale):
    base = random(*shape, scale=scale)
    tuned = base + LowRank(random(shape[0], 2, 1, 3 * scale), random(2, shape[1], 2)).dense()
    found = intruders(base, tuned, 5, 0.6)
    u0 = np.linalg.svd(base.double().numpy(), full_matrices=False)[0]
    u, s, _ = np.linalg.svd(tuned.double().numpy(), full_matrices=False)
    cosines = np.abs(u0.T @ u[:, :5]).max(0)
    torch.testing.assert_close(found.cosines, torch.from_numpy(cosines), rtol=1e-6, atol=1e-6)
    assert found.count == int((cosines < 0.6).sum())
    assert found.count > 0
    assert found.energy == pytest.approx(float((s[:5] ** 2)[cosines < 0.6].sum()), rel=1e-6)
    assert found.top_energy == pytest.approx(float((s[:5] ** 2).sum()), rel=1e-6)


def test_intruders_by_hand():
    """diag(4, 2, 0, 0) plus 3 in a direction the base does not have: one intruder, with 9 of 29 of the energy."""
    base = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0]))
    found = intruders(base, torch.diag(torch.tensor([4.0, 2.0, 3.0, 0.0])), 3, 0.6)
    assert found.count == 1
    assert found.energy / found.top_energy == pytest.approx(9 / 29)
    assert intruders(base, base * 1.5, 3, 0.6).count == 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_of_factors_are_those_of_the_product(scale):
    change = LowRank(random(40, 3, 3, scale), random(3, 25, 4))
    dense = np.linalg.svd(change.dense().double().numpy(), compute_uv=False)
    torch.testing.assert_close(singular_values(change), torch.from_numpy(dense[:3].copy()), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(
        singular_values(change.dense())[:3], torch.from_numpy(dense[:3].copy()), rtol=1e-5, atol=0.0
    )
    assert top_share(singular_values(change), 1) == pytest.approx(
        float(dense[0] ** 2 / (dense[:3] ** 2).sum()), rel=1e-5
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_lox_shares_by_dense_projection(scale):
    alignment, change = random(20, 9, 5, scale), random(20, 9, 6, 0.5 * scale)
    u = np.linalg.svd(alignment.double().numpy(), full_matrices=False)[0][:, :3]
    total = (alignment + change).double().numpy()
    expected = [np.linalg.norm(u @ u.T @ m) / np.linalg.norm(m) for m in (alignment.double().numpy(), total)]
    assert projected_share(alignment, change, 3) == pytest.approx(expected, rel=1e-6)
    kept, undone = projected_share(alignment, -0.999 * alignment, 3)
    assert undone == pytest.approx(kept, rel=1e-3)  # the direction stays, however little is left of it


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_effective_rank_by_hand(scale):
    assert effective_rank(scale * torch.eye(5)) == pytest.approx(5)
    assert effective_rank(scale * torch.ones(5, 7)) == pytest.approx(1)
    p = 3 / 4
    expected = math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert effective_rank(scale * torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)
    assert effective_rank(torch.zeros(3, 4)) is None
