"""Paired changes against exact distributions, and the coverage of their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tiltmeter.lm.paired import bootstrap, paired_change, ratio_of_sums


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_mean_difference_and_its_interval_against_students(scale):
    rng = np.random.default_rng(1)
    before = rng.normal(5, 2, 200) * scale
    after = before + rng.normal(-0.3, 1, 200) * scale
    found = paired_change([*before, None], [*after, 1.0], "nats", seed=3)
    difference = after - before
    assert found.value == pytest.approx(difference.mean())
    assert found.n == 200
    student = stats.t.interval(0.9, 199, difference.mean(), stats.sem(difference))
    assert (found.low, found.high) == pytest.approx(student, abs=0.1 * (student[1] - student[0]))
    assert found.high - found.low < 0.6 * (stats.sem(before) + stats.sem(after)) * 2 * 1.65  # paired is narrower
    assert found.method.startswith("paired bootstrap over items, BCa")
    assert found == paired_change([*before, None], [*after, 1.0], "nats", seed=3)


def test_coverage_of_a_share():
    """90 % intervals of a change from 0.9 to 0.6, 40 paired items, hold it in about nine cases of ten."""
    rng = np.random.default_rng(2)
    held, trials = 0, 120
    for trial in range(trials):
        before = (rng.random(40) < 0.9).astype(float)
        after = before * (rng.random(40) < 2 / 3)
        found = paired_change(list(before), list(after), "share", share=True, seed=trial)
        held += found.low <= -0.3 <= found.high
    assert 0.80 < held / trials < 0.98


def test_no_change_at_all_is_not_certainty():
    found = paired_change([1.0] * 32, [1.0] * 32, "share", share=True)
    assert found.value == 0
    exact = stats.binomtest(0, 32).proportion_ci(0.9, method="exact").high
    assert found.high == pytest.approx(exact)
    assert found.low == pytest.approx(-exact)
    assert "exact binomial" in found.method
    lost = paired_change([1.0] * 20, [0.0] * 20, "share", share=True)
    assert (lost.value, lost.low) == (-1.0, -1.0)
    assert lost.high == pytest.approx(-stats.binomtest(20, 20).proportion_ci(0.9, method="exact").low)
    assert paired_change([0.0] * 20, [1.0] * 20, "share", share=True).low == pytest.approx(-lost.high)


def test_what_gives_no_interval_says_why():
    assert paired_change([None], [1.0], "nats").reason == "needs the same items scored for both models"
    one = paired_change([1.0, math.nan], [3.0, 1.0], "nats")
    assert (one.value, one.low, one.n, one.reason) == (2.0, None, 1, "one item gives no interval")
    assert paired_change([1.0, 2.0], [3.0, 4.0], "nats").reason == "all items changed by the same amount"


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_a_ratio_of_sums_against_the_delta_method(scale):
    rng = np.random.default_rng(4)
    tokens = rng.integers(20, 200, 300).astype(float)
    nats = tokens * rng.normal(3, 0.4, 300) * scale
    value, low, high = ratio_of_sums(list(nats), list(tokens), 0.9, 0)
    assert value == pytest.approx(nats.sum() / tokens.sum())
    deviation = np.std(nats - value * tokens) / tokens.mean() / math.sqrt(300)
    assert (low, high) == pytest.approx((value - 1.645 * deviation, value + 1.645 * deviation), abs=0.2 * deviation)
    assert math.isnan(ratio_of_sums([3.0], [2.0], 0.9, 0)[1])


def test_percentiles_stand_in_where_bca_is_not_defined():
    flat = np.array([0.0] * 9 + [1.0])
    low, high, method = bootstrap((flat,), lambda a, axis: np.median(a, axis=axis), 0.9, 0)
    assert "percentile" in method
    assert (low, high) == (0.0, 0.0)
