"""The fitted exponent against curves whose exponent is known, with noise, floor, saturation and crossover."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import DataError, SpaceMismatch
from tiltmeter.geometry.exponent import FEWEST, FLOOR, fit_exponent

TIMES = torch.logspace(-2, 0, 24, dtype=torch.float64)


def additive(error: float) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.full_like(u, error)


def relative(share: float) -> Callable[[Tensor], Tensor]:
    return lambda u: share * u


def floor_and_share(u: Tensor) -> Tensor:
    return (1e-8 + (0.05 * u) ** 2).sqrt()


def mean_exponent(times: Tensor, clean: Tensor, error: Tensor) -> float:
    """Weighted slope of the noise-free curve, by the textbook formula."""
    weight = (clean / error) ** 2
    x = times.log() - (weight * times.log()).sum() / weight.sum()
    return float((weight * x * clean.log()).sum() / (weight * x**2).sum())


def coverage(
    curve: Callable[[Tensor], Tensor], error: Callable[[Tensor], Tensor], trials: int, level: float = 0.9
) -> float:
    """Share of intervals that hold the noise-free curve's mean exponent over the window that was chosen."""
    generator = torch.Generator().manual_seed(17)
    clean = curve(TIMES)
    sigma = error(clean)
    hits = fits = 0
    for _ in range(trials):
        noise = torch.randn(TIMES.shape, generator=generator, dtype=torch.float64)
        fit = fit_exponent(TIMES, clean + sigma * noise, sigma, level)
        if fit.exponent is None:
            continue
        assert fit.window is not None
        assert fit.low is not None
        assert fit.high is not None
        inside = (fit.window[0] <= TIMES) & (fit.window[1] >= TIMES)
        fits += 1
        hits += fit.low <= mean_exponent(TIMES[inside], clean[inside], sigma[inside]) <= fit.high
    assert fits > 0.9 * trials
    return hits / fits


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("error", [0.0, 1e-9])
def test_exact_powers_come_back_at_every_scale(power: float, scale: float, error: float) -> None:
    times = TIMES * scale
    fit = fit_exponent(times, scale * times**power, error * scale * times**power)
    assert_close(fit.exponent, power, rtol=0, atol=1e-7)
    assert fit.points == len(times)
    assert fit.reason is None
    assert fit.window == (float(times[0]), float(times[-1]))


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0, 4.0, 6.0])
def test_interval_covers_for_pure_powers(power: float) -> None:
    covered = coverage(lambda t: t**power, floor_and_share, 160)
    assert 0.85 <= covered <= 0.96  # standard error 0.024; 0.87 to 0.92 at 300 trials


def test_interval_widens_with_its_level() -> None:
    assert coverage(lambda t: t**2, relative(0.1), 150, level=0.5) < 0.62


@pytest.mark.parametrize(
    "curve",
    [lambda t: 1 - torch.exp(-((3 * t) ** 2)), lambda t: t**2 + 100 * t**4],
    ids=["saturating", "crossover"],
)
def test_interval_covers_the_window_mean_where_the_window_had_to_be_chosen(curve: Callable[[Tensor], Tensor]) -> None:
    assert 0.85 <= coverage(curve, relative(0.1), 160) <= 0.97


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_error_of_a_two_point_slope_is_right(scale: float) -> None:
    """With known relative errors the standard error of a log-log slope is sigma / sqrt(sum x^2)."""
    times = TIMES * scale
    fit = fit_exponent(times, times**2, 0.03 * times**2, level=0.9)
    x = times.log() - times.log().mean()
    assert fit.high is not None
    assert fit.exponent is not None
    assert_close(fit.high - fit.exponent, 1.6448536269514722 * 0.03 / float(x.square().sum().sqrt()))


def test_scatter_beyond_the_stated_error_widens_the_interval() -> None:
    noise = 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    u = TIMES**3 * (1 + noise)
    honest = fit_exponent(TIMES, u, 0.1 * TIMES**3)
    boastful = fit_exponent(TIMES, u, 0.02 * TIMES**3)
    assert honest.high is not None
    assert honest.low is not None
    assert boastful.high is not None
    assert boastful.low is not None
    ratio = (boastful.high - boastful.low) / (honest.high - honest.low)
    assert 0.7 < ratio < 1.3


def test_window_starts_above_the_floor() -> None:
    generator = torch.Generator().manual_seed(2)
    u = TIMES**4 + 1e-4 * torch.randn(24, generator=generator, dtype=torch.float64)
    fit = fit_exponent(TIMES, u, 1e-4)
    assert fit.window is not None
    assert fit.exponent is not None
    assert abs(fit.exponent - 4) < 0.2
    assert 0.5 * FLOOR * 1e-4 < fit.window[0] ** 4 < 2 * FLOOR * 1e-4
    assert bool((u[: 24 - fit.points - 1] < FLOOR * 1.5e-4).all())


def test_rounding_floor_does_not_flatten_the_exponent() -> None:
    """A constant floor with an error of its own size is below the multiple that counts as measured."""
    fit = fit_exponent(TIMES, TIMES**2 + 1e-3, 1e-3)
    assert fit.exponent is not None
    assert fit.window is not None
    assert fit.window[0] > 0.05
    assert abs(fit.exponent - 2) < 0.1


def test_crossover_reports_the_early_window() -> None:
    """The u = t^2 + 100 t^4 law goes 2 -> 4 through t = 0.1; the early part is told, and where it ends."""
    fit = fit_exponent(TIMES, TIMES**2 + 100 * TIMES**4, 0.02 * TIMES**2)
    assert fit.exponent is not None
    assert fit.window is not None
    assert fit.reason is not None
    assert "exponent changes" in fit.reason
    assert fit.window[0] == float(TIMES[0])
    assert 0.015 < fit.window[1] < 0.1
    assert 1.9 < fit.exponent < 2.4


def test_late_part_of_a_crossover_is_quartic_when_the_early_part_is_below_the_floor() -> None:
    u = TIMES**2 + 1e6 * TIMES**4
    fit = fit_exponent(TIMES, u, 10.0)
    assert fit.exponent is not None
    assert fit.window is not None
    assert fit.window[0] > 0.07
    assert abs(fit.exponent - 4) < 0.01


def test_saturation_is_cut_off() -> None:
    fit = fit_exponent(TIMES, 1 - torch.exp(-((5 * TIMES) ** 3)), 1e-5)
    assert fit.exponent is not None
    assert fit.window is not None
    assert fit.window[1] < 0.2
    assert fit.reason is not None
    assert abs(fit.exponent - 3) < 0.15


def test_heavy_saturation_gives_no_exponent_but_a_reason() -> None:
    """Four rising points, then a plateau."""
    u = torch.minimum(TIMES**2, TIMES[1] ** 2)
    fit = fit_exponent(TIMES, u, 1e-4 * u)
    assert fit.exponent is None
    assert fit.low is None
    assert fit.high is None
    assert fit.window is None
    assert fit.reason is not None
    assert "measure more often" in fit.reason


def test_plateau_is_an_exponent_of_zero_and_not_unknown() -> None:
    fit = fit_exponent(TIMES, torch.ones(24), 0.01)
    assert fit.exponent == pytest.approx(0.0, abs=1e-9)
    assert fit.reason is None


@pytest.mark.parametrize(
    "loss",
    [torch.zeros(24), -(TIMES**2), torch.full((24,), math.nan), 1e-4 * torch.ones(24)],
    ids=["zero", "negative", "nan", "below the floor"],
)
def test_nothing_above_the_floor_is_unknown_not_zero(loss: Tensor) -> None:
    fit = fit_exponent(TIMES, loss, 1e-3)
    assert fit.exponent is None
    assert fit.points == 0
    assert fit.reason is not None
    assert "measurement floor" in fit.reason


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_sign_change_ends_the_window(error: float) -> None:
    """A margin that first falls and later recovers past its start."""
    loss = torch.where(TIMES < 0.3, TIMES**2, -(TIMES**2))
    fit = fit_exponent(TIMES, loss, error)
    assert fit.window is not None
    assert fit.window[1] < 0.3
    assert_close(fit.exponent, 2.0, rtol=0, atol=1e-6)


def test_too_few_points() -> None:
    short = TIMES[: FEWEST - 1]
    fit = fit_exponent(short, short**2, 0.0)
    assert fit.exponent is None
    assert fit.reason is not None
    assert f"needs {FEWEST}" in fit.reason
    assert fit_exponent(TIMES[:FEWEST], TIMES[:FEWEST] ** 2, 0.0).exponent == pytest.approx(2.0)


def test_step_zero_and_missing_values_are_left_out() -> None:
    times = torch.cat([torch.zeros(1, dtype=torch.float64), TIMES])
    loss = times**2
    loss[4] = math.nan
    fit = fit_exponent(times, loss, 0.0)
    assert fit.points == 23
    assert_close(fit.exponent, 2.0, rtol=0, atol=1e-9)


def test_unknown_error_is_taken_from_the_scatter() -> None:
    """Residual standard error and Student's t, by the textbook formula."""
    noise = 0.05 * torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logs = 2 * TIMES.log() + noise
    fit = fit_exponent(TIMES, logs.exp(), 0.0)
    x = TIMES.log() - TIMES.log().mean()
    slope = (x * logs).sum() / x.square().sum()
    residual = logs - logs.mean() - slope * x
    reach = 1.7171443743802424 * (residual.square().sum() / 22 / x.square().sum()).sqrt()  # t quantile, 22 degrees
    assert_close(fit.exponent, float(slope))
    assert fit.high is not None
    assert fit.exponent is not None
    assert_close(fit.high - fit.exponent, float(reach))


@pytest.mark.parametrize(
    ("times", "loss", "error", "expected"),
    [
        (TIMES, TIMES[:-1], 0.1, SpaceMismatch),
        (TIMES, TIMES, TIMES[:-1], SpaceMismatch),
        (TIMES.flip(0), TIMES, 0.1, DataError),
        (torch.ones(24), TIMES, 0.1, DataError),
        (TIMES, TIMES, -0.1, DataError),
        (TIMES, TIMES, math.nan, DataError),
        (TIMES, TIMES, torch.cat([torch.zeros(1), torch.ones(23)]), DataError),
    ],
)
def test_input_that_cannot_be_used_says_so(
    times: Tensor, loss: Tensor, error: Tensor | float, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        fit_exponent(times, loss, error)
