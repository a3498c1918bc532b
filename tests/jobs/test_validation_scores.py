"""Rank agreement, size errors, crossings and collapses against scipy and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from tiltmeter.jobs.validation_scores import (
    Collapses,
    agreement,
    ahead,
    collapses,
    crossing,
    resampled_spearman,
    size_error,
    spearman,
)

NAMES = [f"set{i}" for i in range(10)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_spearman_is_scipys_ties_included(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(6, (40, 9), generator=generator).double() * scale
    y = torch.randint(5, (40, 9), generator=generator).double()
    expected = torch.tensor([stats.spearmanr(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)])
    assert_close(spearman(x, y), expected)
    assert math.isnan(float(spearman(torch.ones(5), torch.arange(5.0))))


def test_counted_entries_are_repeated_entries() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(5, (7,), generator=generator).double(), torch.randn(7, generator=generator).double()
    picks = torch.randint(7, (50, 7), generator=generator)
    counts = torch.stack([torch.bincount(pick, minlength=7) for pick in picks])
    assert_close(resampled_spearman(x, y, counts), spearman(x[picks], y[picks]), equal_nan=True)
    flat = resampled_spearman(x, y, torch.tensor([[0, 0, 3, 0, 0, 0, 0], [0] * 7]))
    assert bool(flat.isnan().all())


def measured(noise: float = 0.0, seed: int = 1) -> dict[tuple[str, str], float]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, 10, generator=generator)
    return {
        (regime, name): float(i + noise * draws[r, i])
        for r, regime in enumerate(("full", "lora"))
        for i, name in enumerate(NAMES)
    }


def test_agreement_is_the_mean_over_regimes_with_a_bootstrap_over_sets() -> None:
    truth = measured()
    told = {key: value if key[0] == "full" else -value for key, value in truth.items()}
    found = agreement(told, truth, NAMES, 0.9)
    assert found.by_regime == {"full": pytest.approx(1.0), "lora": pytest.approx(-1.0)}
    assert_close(found.value, 0.0)
    assert found.sets == {"full": 10, "lora": 10}
    noisy = agreement(measured(3.0), truth, NAMES, 0.9)
    assert noisy.low < noisy.value < noisy.high <= 1
    # the scale of one regime must not decide: risks of two regimes are never put into one ranking
    stretched = {key: value * (1e3 if key[0] == "lora" else 1.0) for key, value in measured(3.0).items()}
    assert_close(agreement(stretched, truth, NAMES, 0.9).value, noisy.value)


def test_the_bootstrap_scatter_is_that_of_resampled_sets() -> None:
    one = {key: value for key, value in measured(4.0, 5).items() if key[0] == "full"}
    truth = {key: value for key, value in measured().items() if key[0] == "full"}
    found = agreement(one, truth, NAMES, 0.9, draws=4000)
    picks = torch.randint(10, (4000, 10), generator=torch.Generator().manual_seed(99))
    x = torch.tensor([one["full", name] for name in NAMES])[picks].numpy()
    y = torch.tensor([truth["full", name] for name in NAMES])[picks].numpy()
    other = [stats.spearmanr(a, b).statistic for a, b in zip(x[:1500], y[:1500], strict=True)]
    low, high = torch.tensor(other).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    assert abs(found.low - low) < 0.06
    assert abs(found.high - high) < 0.03


def test_too_few_sets_or_a_constant_risk_give_none() -> None:
    truth = measured()
    few = {key: value for key, value in truth.items() if key[1] in NAMES[:3]}
    assert math.isnan(agreement(few, few, NAMES, 0.9).value)
    assert math.isnan(agreement(dict.fromkeys(truth, 1.0), truth, NAMES, 0.9).value)


def test_a_missing_value_leaves_its_set_out() -> None:
    truth = measured()
    told = {key: value for key, value in truth.items() if key[1] != "set0"} | {("full", "set1"): 100.0}
    found = agreement(told, truth, NAMES, 0.9)
    assert found.sets == {"full": 9, "lora": 9}
    x = [100.0, *(float(i) for i in range(2, 10))]
    assert_close(found.by_regime["full"], float(stats.spearmanr(x, range(1, 10)).statistic))


def test_ahead_counts_paired_draws() -> None:
    truth = measured()
    good, bad = agreement(measured(1.0), truth, NAMES, 0.9), agreement(measured(30.0), truth, NAMES, 0.9)
    assert ahead(good, bad) > 0.9
    assert_close(ahead(good, bad) + ahead(bad, good), 1.0)
    assert_close(ahead(good, good), 0.5)
    assert math.isnan(ahead(good, agreement(dict.fromkeys(truth, 1.0), truth, NAMES, 0.9)))


def test_a_rival_is_compared_where_it_was_asked() -> None:
    """Ours ranks one regime backwards, in which the rival was not asked at all: that must not put the rival ahead."""
    truth = measured()
    ours = {key: value if key[0] == "lora" else -value for key, value in truth.items()}
    rival = {key: value for key, value in measured(6.0).items() if key[0] == "lora"}
    one, other = (agreement(told, truth, NAMES, 0.9) for told in (ours, rival))
    assert one.value < other.value
    assert ahead(one, other) > 0.95
    elsewhere = agreement({key: value for key, value in truth.items() if key[0] == "full"}, truth, NAMES, 0.9)
    assert math.isnan(ahead(other, elsewhere))


def test_a_regime_of_few_sets_is_drawn_as_it_is() -> None:
    """Four sets drawn from ten names scatter as four sets do, not as ten draws of four would."""
    truth = {key: value for key, value in measured().items() if key[0] == "full" and key[1] in NAMES[:4]}
    told = dict(zip(truth, (1.0, 0.0, 2.0, 3.0), strict=True))
    found = agreement(told, truth, NAMES, 0.9)
    alone = agreement(told, truth, NAMES[:4], 0.9)
    assert (found.low, found.high) == (alone.low, alone.high)
    picks = torch.randint(4, (4000, 4), generator=torch.Generator().manual_seed(7))
    x, y = (torch.tensor([*each.values()])[picks] for each in (told, truth))
    drawn = spearman(x, y)
    assert abs(found.low - float(drawn[torch.isfinite(drawn)].quantile(0.05))) < 0.1


def test_size_error_by_hand() -> None:
    assert_close(size_error(1.3, -1.0, 0.1), 2.3)
    assert_close(size_error(0.01, 0.0, 0.02), 0.5)


def test_a_crossing_is_where_the_median_passes_zero() -> None:
    margins = torch.tensor([[3.0, 2.0, 9.0], [3.0, 1.0, 9.0], [-1.0, -1.0, 9.0]])
    assert_close(crossing([0, 4, 8], margins), 4 + 4 * 3 / 4)
    assert crossing([0, 4], margins[:2]) is None
    assert crossing([0, 4], -margins[:2]) is None
    half = torch.tensor([[2.0, 4.0], [-2.0, 9.0]])  # one of two is half of the prompts
    assert_close(crossing([0, 8], half), 4.0)


def test_collapses_by_hand() -> None:
    pairs = [(10.0, 20.0), (10.0, 21.0), (None, 5.0), (4.0, None), (None, None)]
    assert collapses(pairs) == Collapses(cells=5, happened=3, foretold=2, dated=1, alarms=1)
