"""Flow time against plain loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.errors import RecipeError
from tiltmeter.geometry.clock import Clock


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_flow_time_and_squares_are_running_sums_from_zero(scale: float) -> None:
    rates = [0.0, 0.1 * scale, 0.3 * scale, 0.2 * scale]
    clock = Clock(torch.tensor(rates, dtype=torch.float64))
    assert clock.steps == 4
    expected = [math.fsum(rates[:k]) for k in range(5)]
    assert_close(clock.flow_time, torch.tensor(expected, dtype=torch.float64))
    squares = [math.fsum(r * r for r in rates[:k]) for k in range(5)]
    assert_close(clock.squared_rates, torch.tensor(squares, dtype=torch.float64))


def test_constant() -> None:
    assert_close(Clock.constant(0.25, 3).rates, torch.full((3,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("rates", [[], [[0.1]], [-0.1], [math.nan], [math.inf]])
def test_rates_that_make_no_sense(rates: list[float]) -> None:
    with pytest.raises(RecipeError, match="learning rates"):
        Clock(torch.tensor(rates, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000, 1_027_489, 1_047_435])
@pytest.mark.parametrize("points", [1, 2, 5, 20])
def test_grid_ends_at_the_last_step_and_is_no_longer_than_asked(steps: int, points: int) -> None:
    """At 1,027,489 steps a float32 logarithm once put the last point beyond the run."""
    grid = Clock(torch.zeros(1, dtype=torch.float64).expand(steps)).grid(points)
    assert grid == sorted(set(grid))
    assert grid[-1] == steps
    assert grid[0] == (1 if points > 1 else steps)
    assert len(grid) <= points


def test_grid_is_even_in_the_logarithm() -> None:
    assert Clock.constant(1.0, 1000).grid(4) == [1, 10, 100, 1000]
