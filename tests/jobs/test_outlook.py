"""From paths to a verdict: horizon, budgets, and words, on findings made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.geometry.forecast import PathValues
from tiltmeter.jobs.outlook import Looks, Outlook, carried, look_out
from tiltmeter.jobs.subject import Options
from tiltmeter.lm.measurement import Measurement, share

STEPS = (1, 2, 4, 8)
#: Of a rate that falls to zero, so that flow time is no multiple of steps.
COVERED = torch.linspace(1, 0, 9, dtype=torch.float64).cumsum(0).sub(1).mul(1e-3)
TIMES = COVERED[list(STEPS)]
PROMPTS = 6


def made(
    slope: float,
    *,
    other: float | None = None,
    anchor: float = 5.0,
    reach: float = 0.0,
    scatter: float = 0.01,
    power: float = 2.0,
    rate: Measurement | None = None,
    stretch: float = 1.0,
    again: float | None = None,
    climb: float = -0.5,
    **budgets: Any,
) -> Outlook:
    """Margins that change by `slope` per step (by `other` on the straight path) and a KL = flow time^power.

    With `again`, the last two steps lie beyond the first probe; the path with the second look has that slope there.
    """
    wobble = scatter * torch.linspace(-1, 1, PROMPTS, dtype=torch.float64)
    start = anchor + torch.linspace(-0.5, 0.5, PROMPTS, dtype=torch.float64)
    steps = torch.tensor(STEPS, dtype=torch.float64)[:, None]
    kl = (TIMES[:, None] ** power).expand(-1, PROMPTS) * (1 + wobble)

    def path(s: float, of: slice = slice(None)) -> PathValues:
        return PathValues(STEPS[of], kl[of], (start + s * steps * (1 + wobble))[of])

    noise = SimpleNamespace(
        margin_reach=lambda level: COVERED * reach,
        relative_reach=lambda level: torch.full_like(COVERED, 0.2),
        energy_factor=lambda: torch.full_like(COVERED, stretch),
    )
    found = SimpleNamespace(
        values={"curved": path(slope), "linear": path(slope if other is None else other)},
        check=None if again is None else path(again, slice(-2, None)), climb=climb,
        covered=COVERED, noise=noise,
    )  # fmt: skip
    safety = SimpleNamespace(refusal_rate=lambda: rate or share(6, 6))
    subject: Any = SimpleNamespace(anchor_margin=start, safety=safety)
    return look_out(subject, found, Options(**budgets))  # type: ignore[arg-type]


VERDICTS: dict[str, tuple[Outlook, str, int]] = {
    "falls": (made(-0.2), "wears", 8),
    "falls below zero": (made(-1.0), "collapses", 8),
    "was below zero before": (made(-0.2, anchor=-3.0), "wears", 8),
    "never refused and grows": (made(0.2, anchor=-31.0), "cannot tell", 8),
    "never refused and stays": (made(0.0, anchor=-31.0), "cannot tell", 8),
    "grows": (made(0.2), "holds", 8),
    "stays": (made(0.0), "holds", 8),
    "is not known": (made(-0.1, reach=1e4), "cannot tell", 8),
    "parts at once": (made(-0.2, other=0.5), "cannot tell", 0),
    "no interval": (made(-0.2, reach=math.nan), "cannot tell", 8),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case: str) -> None:
    outlook, kind, last = VERDICTS[case]
    assert outlook.verdict == kind
    assert outlook.horizon_steps == last
    assert outlook.text.lower().startswith(kind)
    assert "nan" not in outlook.text


def test_nothing_good_is_claimed_where_the_paths_part_on_the_way() -> None:
    """Differences below 0.02 nats do not matter, so the first steps agree; later ones do not."""
    outlook = made(0.01, other=0.02)
    assert 0 < outlook.horizon_steps < 8
    assert outlook.verdict in ("wears", "cannot tell")
    assert "beyond" in outlook.horizon_reason


def test_a_second_look_that_changes_nothing_carries_the_horizon_to_the_end() -> None:
    """The straight path may be far off: it is no judge of a path that has settled."""
    outlook = made(-0.5, other=-0.1, again=-0.55)
    assert outlook.horizon_steps == 8
    assert "second look at the gradient does not change" in outlook.horizon_reason
    half = made(-0.5, other=-0.5, again=-2.0)
    assert half.horizon_steps == 8  # the straight path agrees to the end, whatever the check says
    risen = made(-0.5, other=-0.1, again=-0.55, climb=0.4)
    assert risen.horizon_steps == 0  # two looks that agree where the run will never come
    assert made(-0.5, other=-0.1, again=-0.55, climb=0.3).horizon_steps == 8  # just past the floor of the valley
    parted = made(-0.5, other=-0.1, again=-2.0)
    assert parted.horizon_steps == 0
    assert "straight and the curved" in parted.horizon_reason


def test_a_second_look_that_changes_the_end_claims_the_steps_before() -> None:
    """Steps 4 and 8 lie beyond the probe; the two looks differ by 0.1 and 1.6 nats there."""
    outlook = made(-0.5, other=-0.1)
    assert outlook.horizon_steps == 0
    start = torch.full((4, PROMPTS), 5.0, dtype=torch.float64)
    change = torch.tensor([-0.5, -1.0, -2.0, -4.0], dtype=torch.float64)[:, None]
    kl = TIMES[:, None].square().expand(-1, PROMPTS)
    straight = PathValues(STEPS, kl, start + 0.1 * change)
    again = PathValues((4, 8), kl[2:], start[2:] + change[2:] * torch.tensor([[1.05], [1.6]], dtype=torch.float64))
    looks = Looks(PathValues(STEPS, kl, start + change), straight, again, COVERED, start[0], -1.0)
    assert looks.settled() == 4
    assert looks.horizon() == (4, "beyond it a second look at the gradient changes the forecast")
    gap = looks.gap(lambda path: path.margin.mean(-1))
    back = -0.1 * (TIMES[:2] / TIMES[2]) ** 3  # third order in flow time
    assert_close(gap, torch.cat([back, torch.tensor([-0.1, 3.6], dtype=torch.float64)]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_noise_of_the_slope_grows_with_what_the_path_makes_of_it(scale: float) -> None:
    """A curved change three times the straight one has three times its noise, until the straight one drowns in it."""
    reach, straight, curved = (
        scale * torch.tensor(x, dtype=torch.float64) for x in ([1e-9, 1.0], [1.0, 0.0], [-3.0, 3.0])
    )
    assert_close(carried(reach, straight, curved), scale * torch.tensor([3e-9, 4.0], dtype=torch.float64))
    assert_close(carried(reach, curved, straight), reach)  # never below what was measured


@pytest.mark.parametrize("power", [2.0, 4.0])
def test_leading_order_is_that_of_flow_time(power: float) -> None:
    value, low, high = made(-0.2, power=power).leading_order
    assert_close(value, power)
    assert low <= value + 1e-9
    assert value <= high + 1e-9


def test_budgets_are_passed_where_the_curve_passes_them() -> None:
    crossings = made(-0.5, budget_margin=3.5, budget_kl=1.0, budget_refusal=0.99).crossings
    assert [c.quantity for c in crossings] == ["safety_kl", "margin", "refusal_rate"]
    kl, margin, _ = crossings
    assert (kl.value, kl.claimed) == (None, False)
    assert_close(margin.value, 3.0, rtol=1e-6, atol=1e-6)
    assert margin.low < margin.value < margin.high
    assert margin.claimed
    beyond = made(-0.5, other=-1.5, budget_margin=3.5)
    assert not beyond.crossings[0].claimed
    assert beyond.horizon_steps < 3


def test_refusals_move_with_the_odds_of_the_openings() -> None:
    outlook = made(-2.0, anchor=4.0, rate=share(5, 6))
    assert float(outlook.refusal_rate.value[0]) < 5 / 6
    assert float(outlook.refusal_rate.value[-1]) < 0.01
    assert bool((outlook.refusal_rate.low >= 0).all() & (outlook.refusal_rate.high <= 1).all())
    unknown = made(-2.0, rate=Measurement(None, None, None, 0, 6, "share", "no item could be scored"))
    assert bool(unknown.refusal_rate.value.isnan().all())
    assert_close(outlook.below_zero, torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("stretch", [0.25, 1.0, 4.0])
def test_the_noise_factor_moves_the_kl_and_its_interval_still_holds_the_bare_path(stretch: float) -> None:
    bare, bent = made(-0.2).safety_kl, made(-0.2, stretch=stretch).safety_kl
    assert_close(bent.value, stretch * bare.value)
    assert bool((bent.low <= bare.value + 1e-15).all())
    assert bool((bare.value <= bent.high + 1e-15).all())
    # the rest of the width grows with the value
    assert_close(bent.high - bent.low - (bent.value - bare.value).abs(), stretch * (bare.high - bare.low))
