"""The overlap score's null against scipy's Beta distribution and against random directions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.overlap import layer_null, null_mean, overlap_score


@pytest.mark.parametrize(("d", "n"), [(1, 3), (4, 50), (8, 5_000), (8, 134_000_000)])
def test_the_null_is_the_root_of_a_beta_variable(d, n):
    law = stats.beta(d / 2, (n - d) / 2)
    top = float(law.ppf(1 - 1e-15))
    mean = integrate.quad(lambda x: math.sqrt(x) * law.pdf(x), 0, top, limit=400, points=[d / n])[0]
    assert null_mean(d, n) == pytest.approx(mean, rel=1e-6)
    at = math.sqrt(float(law.ppf(0.8)))
    found = overlap_score(3.0 * at, 3.0, d, n)
    assert found.score == pytest.approx(at)
    assert found.quantile == pytest.approx(0.8, abs=1e-6)
    assert found.z == pytest.approx((at - mean) / math.sqrt(d / n - mean**2), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_change_inside_the_subspace_scores_one_at_any_length(scale):
    found = overlap_score(scale, scale, 4, 1000)
    assert found.score == 1.0
    assert found.quantile == 1.0
    assert found.z > 20


def test_a_change_without_length_has_no_score():
    with pytest.raises(DegenerateError, match="length 0"):
        overlap_score(0.0, 0.0, 4, 100)
    with pytest.raises(DegenerateError, match="5 directions and 5 parameters"):
        overlap_score(1.0, 1.0, 5, 5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_layer_null_against_directions_drawn_inside_each_layer(scale):
    generator = torch.Generator().manual_seed(0)
    sizes, lengths = [400, 60, 900], [0.2 * scale, 2.0 * scale, 0.7 * scale]
    v = torch.linalg.qr(torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64))[0]
    v[400:460] *= 3  # sensitive where the change is long
    v = torch.linalg.qr(v)[0]
    parts = list(v.split(sizes))
    mean, deviation = layer_null([part.T @ part for part in parts], lengths, sizes)
    draws = []
    for _ in range(4000):
        z = torch.zeros(5, dtype=torch.float64)
        for part, length, size in zip(parts, lengths, sizes, strict=True):
            u = torch.randn(size, generator=generator, dtype=torch.float64)
            z += part.T @ u * (length / u.norm())
        draws.append(float(z.square().sum()) / sum(length**2 for length in lengths))
    seen = torch.tensor(draws)
    assert mean == pytest.approx(float(seen.mean()), abs=4 * float(seen.std()) / math.sqrt(4000))
    assert deviation == pytest.approx(float(seen.std()), rel=0.08)
    assert mean > 2 * 5 / sum(sizes)  # the uniform null would call this change special
