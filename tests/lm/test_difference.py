"""Step lengths of differences, on gradients whose rounding and next order are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiltmeter.lm.difference import ATTEMPTS, FIRST, LONGEST, SHORTEST, WINDOWS, next_length, tells

ANCHOR = 10.0


def settle(sharpness: float, dtype: torch.dtype) -> tuple[float, float]:
    """Difference g(x) = 1 + sin(sharpness x) at 0 in a precision; error of the derivative, and the last length."""

    def g(x: float) -> Tensor:
        return 1 + torch.sin(torch.tensor(sharpness * x, dtype=dtype))

    length = FIRST * ANCHOR
    for _ in range(ATTEMPTS):
        ahead, behind = g(length), g(-length)
        better = next_length(length, float((ahead - behind).abs() / (ahead.abs() + behind.abs())), ANCHOR, dtype)
        if better == length:
            break
        length = better
    return abs(float((g(length) - g(-length)) / (2 * length)) / sharpness - 1), length


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1e3, 1e5])
def test_the_step_finds_the_scale_of_the_curvature(sharpness: float) -> None:
    """From where rounding rules to where the first step is a hundred times too long."""
    error, _ = settle(sharpness, torch.float32)
    assert error < 5e-3
    error, _ = settle(sharpness, torch.float64)
    assert error < 1e-6


def test_a_first_step_of_thirty_periods_is_shortened_as_far_as_the_attempts_reach() -> None:
    error, length = settle(1e7, torch.float64)
    assert length < 1e-3 * FIRST * ANCHOR
    assert 1e-6 < error < 1e-4  # the limit of three attempts, on the record: the window is not reached
    error, _ = settle(1e7, torch.float32)
    assert error < 5e-3


def test_a_fixed_step_would_have_failed() -> None:
    step = 3e-6 * ANCHOR
    ahead, behind = (1 + torch.sin(torch.tensor(1e5 * x)) for x in (step, -step))
    assert abs(float((ahead - behind) / (2 * step)) / 1e5 - 1) > 0.5


def test_a_loss_without_curvature_does_not_drive_the_step_off() -> None:
    assert next_length(1e-6, 0.0, ANCHOR, torch.float32) == pytest.approx(min(1e-2, LONGEST * ANCHOR))
    assert next_length(LONGEST * ANCHOR, 0.0, ANCHOR, torch.float32) == LONGEST * ANCHOR
    assert next_length(SHORTEST * ANCHOR, 1.0, ANCHOR, torch.float32) == SHORTEST * ANCHOR


@pytest.mark.parametrize("dtype", WINDOWS)
def test_a_step_inside_the_window_is_kept(dtype: torch.dtype) -> None:
    window = WINDOWS[dtype]
    assert window.low < window.target < window.high
    for change in (window.low, window.target, window.high):
        assert next_length(1e-5, change, ANCHOR, dtype) == 1e-5
    assert next_length(1e-5, 4 * window.high, ANCHOR, dtype) < 1e-5
    assert next_length(1e-5, window.low / 10, ANCHOR, dtype) > 1e-5


@pytest.mark.parametrize("dtype", WINDOWS)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0, 1e3])
def test_a_length_that_is_told_lands_in_the_window(dtype: torch.dtype, sharpness: float) -> None:
    """From every length whose change tells, the next one is good at once; and there are such lengths on both sides."""
    window = WINDOWS[dtype]

    def change(length: float) -> float:
        ahead, behind = (1 + torch.sin(torch.tensor(sharpness * x, dtype=dtype)) for x in (length, -length))
        return float((ahead - behind).abs() / (ahead.abs() + behind.abs()))

    told = []
    for power in range(-90, 10):
        length = 10 ** (power / 10) / sharpness
        seen = change(length)
        if tells(seen, dtype) and length <= LONGEST * ANCHOR and window.target / sharpness < LONGEST * ANCHOR:
            told.append(seen)
            assert window.low <= change(next_length(length, seen, ANCHOR, dtype)) <= window.high
    if window.target / sharpness < LONGEST * ANCHOR:
        assert min(told) < window.low
        assert max(told) > window.high
    assert not tells(0.0, dtype)
    assert not tells(1.0, dtype)
