"""When to measure, and that the interval costs what it promises."""

from __future__ import annotations

import pytest

from tiltmeter.tracking.schedule import MARGIN, OVERHEAD, UNKNOWN, Schedule, interval


def test_dense_at_the_start_then_every_k_steps() -> None:
    due = [step for step in range(200) if Schedule(48).due(step)]
    assert due == [0, 1, 2, 4, 8, 16, 32, 48, 96, 144, 192]
    assert [step for step in range(10) if Schedule(1).due(step)] == list(range(10))
    assert [step for step in range(20) if Schedule(8, frozenset({5, 17})).due(step)] == [0, 1, 2, 4, 5, 8, 16, 17]


@pytest.mark.parametrize("measuring", [50.0, 1000.0, 80000.0])
@pytest.mark.parametrize("step_tokens", [16, 500, 30000])
@pytest.mark.parametrize(("frozen", "passes"), [(False, 3), (True, 2)])
def test_the_interval_is_the_smallest_below_the_promised_share(
    measuring: float, step_tokens: int, frozen: bool, passes: int
) -> None:
    """A forward pass is a third of forward and backward, and half of them where few weights have gradients."""
    every = interval(measuring, step_tokens, frozen=frozen)

    def share(steps: int) -> float:
        return measuring * MARGIN / (steps * step_tokens * passes)

    assert share(every) <= OVERHEAD * (1 + 1e-12)
    assert every == 1 or share(every - 1) > OVERHEAD


def test_without_a_known_cost_there_is_a_fixed_interval() -> None:
    assert interval(100.0, 0, frozen=False) == UNKNOWN
