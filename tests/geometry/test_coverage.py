"""Do intervals hold the truth as often as they say? Simulated systems with known truth, fixed numbers of trials.

A nominal 90 % interval must cover in 85 to 95 % of the trials; its own standard error is 0.7 % at 2000 trials, 1.3 % at
500 and 1.7 % at 300.
"""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from tiltmeter.geometry.forecast import combine, jackknife, mean_interval, on_these_prompts

TRIALS = 2000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def covered(low: Tensor, high: Tensor, truth: float) -> float:
    return float(((low <= truth) & (truth <= high)).double().mean())


SAMPLES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "normal": (lambda z: z - 3, -3.0),
    "chi-square": (lambda z: z**2, 1.0),
    "lognormal": (torch.exp, math.exp(0.5)),
    "half-normal": (torch.abs, math.sqrt(2 / math.pi)),
}


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("m", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", SAMPLES)
def test_mean_over_prompts(kind: str, m: int, scale: float) -> None:
    transform, truth = SAMPLES[kind]
    got = covered(*mean_interval(scale * transform(normal(TRIALS, m, seed=m)), 0.9), scale * truth)
    assert (0.83 if (kind, m) == ("lognormal", 8) else 0.85) <= got <= 0.95


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_mean_over_prompts_at_other_levels(level: float) -> None:
    got = covered(*mean_interval(normal(TRIALS, 24).square(), level), 1.0)
    assert abs(got - level) < 0.03


def overlap_coverage(groups: int, dimensions: int, signal: float, trials: int = 300) -> float:
    """How often the interval of e0 = ||F^(1/2) g|| holds it; noise of the mean gradient is 1 in the same norm."""
    fisher = torch.linspace(0.1, 2, dimensions, dtype=torch.float64)
    fisher = fisher / fisher.sum()
    gradient = torch.full((dimensions,), signal, dtype=torch.float64)
    draws = gradient + math.sqrt(groups) * normal(trials, groups, dimensions, seed=groups)
    hits = 0
    for v in draws:
        low, high = jackknife((v * fisher) @ v.T, 0.9)
        hits += low <= signal <= high
    return hits / trials


@pytest.mark.parametrize("groups", [3, 4, 8])
@pytest.mark.parametrize("dimensions", [1, 50])
def test_overlap_well_above_its_noise(groups: int, dimensions: int) -> None:
    assert 0.85 <= overlap_coverage(groups, dimensions, 5.0) <= 0.95


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dimensions", [1, 50])
def test_overlap_within_its_noise_is_never_claimed_too_narrowly(signal: float, dimensions: int) -> None:
    """Cut at zero, the interval holds a truth of zero more often than it says."""
    assert overlap_coverage(4, dimensions, signal) >= 0.88


@pytest.mark.parametrize(("prompts", "groups"), [(16, 4), (32, 8)])
@pytest.mark.parametrize("prompt_share", [0.2, 1.0, 5.0])
def test_forecast_over_prompts_and_batches_together(prompts: int, groups: int, prompt_share: float) -> None:
    """Both samples are redrawn: prompts, and a common shift from the tuning batches, estimated by groups."""
    trials = 500
    shifts = 1 / prompt_share * normal(trials, groups, seed=1)
    samples = 1 + prompt_share * normal(trials, prompts, seed=2) + shifts.mean(-1, keepdim=True)
    reach = float(stats.t.ppf(0.95, groups - 1)) * shifts.std(-1) / math.sqrt(groups)
    curve = combine(samples, 0.9, reach, torch.zeros(trials, dtype=torch.float64))
    assert 0.85 <= covered(curve.low, curve.high, 1.0) <= 0.97


@pytest.mark.parametrize("scatter", [0.2, 5.0])
def test_forecast_for_the_prompts_it_was_made_from(scatter: float) -> None:
    """The truth is that of the drawn prompts, each of which feels the batches' luck by a factor of its own.

    The interval for other prompts holds it too often, the more the prompts scatter.
    """
    trials, groups, prompts = 2000, 6, 8
    there = 1 + scatter * normal(trials, prompts, seed=4)
    felt = 1 + 0.5 * normal(trials, prompts, seed=6)
    shifts = normal(trials, groups, seed=5)
    told = there + felt * shifts.mean(-1, keepdim=True)
    reach = float(stats.t.ppf(0.95, groups - 1)) * felt.mean(-1).abs() * shifts.std(-1) / math.sqrt(groups)
    none = torch.zeros(trials, dtype=torch.float64)
    rates = []
    for curve in (on_these_prompts(told.mean(-1), reach, none), combine(told, 0.9, reach, none)):
        inside = (curve.low <= there.mean(-1)) & (there.mean(-1) <= curve.high)
        rates.append(float(inside.double().mean()))
    assert 0.88 <= rates[0] <= 0.92
    assert rates[1] > rates[0] + (0.0 if scatter < 1 else 0.07)


@pytest.mark.parametrize("gap", [0.1, 0.7, 5.0])
def test_an_error_of_the_path_is_held_as_often_as_the_gap_is(gap: float) -> None:
    """Nine errors in ten are as large as the gap at most, and add to the scatter; one of half of it is held as well."""
    none = torch.zeros(TRIALS, dtype=torch.float64)
    curve = combine(normal(TRIALS, 16, seed=3), 0.9, none, none + gap)
    wrong = normal(TRIALS, seed=4) * gap / 1.6449
    assert 0.88 <= covered(curve.low - wrong, curve.high - wrong, 0.0) <= 0.92
    assert covered(curve.low, curve.high, gap / 2) >= 0.88
    assert covered(curve.low, curve.high, -gap / 2) >= 0.88
