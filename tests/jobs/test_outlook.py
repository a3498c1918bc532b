"""From paths to a verdict: horizon, budgets, and words, on findings made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.geometry.forecast import PathValues
from tiltmeter.jobs.outlook import Looks, Outlook, look_out
from tiltmeter.jobs.subject import Options
from tiltmeter.lm.measurement import Measurement, share

STEPS = (1, 2, 4, 8)
NONE = torch.zeros(4, dtype=torch.float64)
#: Twice as far at the last step.
FAR = torch.tensor([[1.0], [1.0], [1.0], [2.0]], dtype=torch.float64)
#: Of a rate that falls to zero, so that flow time is no multiple of steps.
COVERED = torch.linspace(1, 0, 9, dtype=torch.float64).cumsum(0).sub(1).mul(1e-3)
TIMES = COVERED[list(STEPS)]
PROMPTS = 6


def made(
    slope: float,
    *,
    other: float | None = None,
    judged: bool = True,
    anchor: float = 5.0,
    reach: float = 0.0,
    scatter: float = 0.01,
    power: float = 2.0,
    rate: Measurement | None = None,
    stretch: float = 1.0,
    parting: float = 0.0,
    **budgets: Any,
) -> Outlook:
    """Margins that change by `slope` a step (by `other` with fewer looks, if it is `judged`), KL = flow time^power."""
    wobble = scatter * torch.linspace(-1, 1, PROMPTS, dtype=torch.float64)
    start = anchor + torch.linspace(-0.5, 0.5, PROMPTS, dtype=torch.float64)
    steps = torch.tensor(STEPS, dtype=torch.float64)[:, None]
    kl = (TIMES[:, None] ** power).expand(-1, PROMPTS) * (1 + wobble)

    def path(s: float | None) -> PathValues:
        return PathValues(STEPS, kl, start + (slope if s is None else s) * steps * (1 + wobble))

    noise = SimpleNamespace(
        margin_reach=lambda level: COVERED * reach,
        apart=lambda other, level: (COVERED * parting, torch.zeros_like(COVERED)),
        apart_scatter=lambda other: (COVERED * parting / 2, torch.zeros_like(COVERED)),
        relative_reach=lambda level: torch.full_like(COVERED, 0.2),
        energy_factor=lambda: torch.full_like(COVERED, stretch),
    )
    found = SimpleNamespace(
        values={"rehearsed": path(slope)}, check=SimpleNamespace(values=path(other), noise=noise) if judged else None,
        covered=COVERED, rehearsed=noise,
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


def test_half_as_many_looks_judge_a_rehearsal() -> None:
    outlook = made(-0.5, other=-0.55)
    assert outlook.horizon_steps == 8
    assert "half as many looks at the gradient give the same forecast" in outlook.horizon_reason
    parted = made(-0.5, other=-2.0)
    assert parted.horizon_steps == 0
    assert "half as many looks at the gradient give another" in parted.horizon_reason


def test_where_every_step_is_rehearsed_nothing_is_left_to_judge() -> None:
    """The horizon is the run, and the interval holds the rows alone."""
    outlook, judged = made(-0.5, judged=False, reach=100.0), made(-0.5, other=-2.0, reach=100.0)
    assert outlook.horizon_steps == 8
    assert "every step" in outlook.horizon_reason
    told = outlook.same_prompts["margin_change"]
    assert_close(told.high - told.low, 200.0 * TIMES)
    assert bool((judged.margin_change.low < outlook.margin_change.low).all())
    assert_close(judged.safety_kl.high, outlook.safety_kl.high)  # both rehearsals have the same KL here


def test_rows_noise_is_not_counted_twice() -> None:
    """Rehearsals part by 0.8 nats at the end; 0.6 of them are one standard deviation of the rows' noise."""
    bare, known = (
        made(-0.5, other=-0.6, reach=100.0),
        made(-0.5, other=-0.6, reach=100.0, parting=1.2 / float(TIMES[-1])),
    )
    for outlook, gap in ((bare, 0.8), (known, (0.8**2 - 0.6**2) ** 0.5)):
        curve = outlook.same_prompts["margin_change"]
        reach = ((100 * TIMES[-1]) ** 2 + gap**2) ** 0.5
        assert_close(curve.high[-1] - curve.value[-1], reach)


def test_rehearsals_that_part_on_the_way_claim_the_steps_before() -> None:
    """They differ by 5 % at step 4 and by 60 % at step 8; for want of looks the forecast may be off by as much."""
    start = torch.full((4, PROMPTS), 5.0, dtype=torch.float64)
    change = torch.tensor([-0.5, -1.0, -2.0, -4.0], dtype=torch.float64)[:, None]
    kl = TIMES[:, None].square().expand(-1, PROMPTS)
    fewer = start + change * torch.tensor([[1.0], [1.0], [1.05], [1.6]], dtype=torch.float64)
    looks = Looks(PathValues(STEPS, kl, start + change), PathValues(STEPS, kl, fewer), start[0], *[NONE] * 4)
    assert looks.horizon() == (4, "beyond it half as many looks at the gradient give another forecast")
    gap = looks.gap(lambda path: path.margin.mean(-1))
    assert_close(gap, torch.tensor([0.0, 0.0, 0.1, 2.4], dtype=torch.float64))
    # the square of a difference holds that of the rows' noise, which intervals have besides
    known = looks.gap(lambda path: path.margin.mean(-1), torch.tensor([0.1, 0.0, math.nan, 1.44], dtype=torch.float64))
    assert_close(known, torch.tensor([0.0, 0.0, 0.1, 1.92], dtype=torch.float64))
    for size, last in ((1e6, 4), (1.0, 8)):  # the same share of a KL that matters and of one that does not
        both = [PathValues(STEPS, size * kl * far, start + change) for far in (1.0, FAR)]
        assert Looks(both[0], both[1], start[0], *[NONE] * 4).horizon()[0] == last
        noise = NONE, NONE + 2 * size * float(kl[-1, 0]), NONE, NONE
        assert Looks(both[0], both[1], start[0], *noise).horizon()[0] == 8


def test_what_the_rows_noise_explains_does_not_end_the_horizon() -> None:
    """A difference of 1.5 nats a step in flow time; noise below and above it."""
    assert made(-0.5, other=-2.0).horizon_steps == 0
    reach = 1.5 * 8 / float(COVERED[8])
    assert made(-0.5, other=-2.0, parting=0.5 * reach).horizon_steps < 8
    assert made(-0.5, other=-2.0, parting=2 * reach).horizon_steps == 8


def test_the_interval_holds_what_looks_would_change_to_both_sides() -> None:
    same, onward = made(-0.5, other=-0.5).margin_change, made(-0.5, other=-0.4).margin_change
    gap = 0.1 * torch.tensor(STEPS, dtype=torch.float64)
    assert_close(onward.value, same.value)
    assert_close((onward.high - onward.value).square(), (same.high - same.value).square() + gap.square())
    assert_close((onward.value - onward.low).square(), (same.value - same.low).square() + gap.square())


def test_intervals_for_the_same_prompts_hold_rows_and_looks_alone() -> None:
    """However the prompts scatter: the reach of the rows and what more looks would change, by their squares."""
    for scatter in (0.01, 1.0):
        outlook = made(-0.5, other=-0.4, reach=100.0, scatter=scatter)
        told = outlook.same_prompts["margin_change"]
        assert_close(told.value, outlook.margin_change.value)
        reach = torch.hypot(100.0 * TIMES, 0.1 * torch.tensor(STEPS, dtype=torch.float64))
        assert_close(told.high - told.value, reach)
        assert_close(told.value - told.low, reach)
        kl = outlook.same_prompts["safety_kl"]
        assert_close(kl.value, outlook.safety_kl.value)
        assert_close(kl.high - kl.value, 0.2 * kl.value)
        assert bool((outlook.safety_kl.high >= kl.high).all())
        assert bool((outlook.margin_change.low <= told.low).all())


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
