"""The alarm: which limit, when, and what to go back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiltmeter.errors import InputError
from tiltmeter.tracking.alarm import Budgets, check_budgets, default_budgets, find_breach


def row(step: int, kl: float, margin: float, refusals: float | None = None) -> dict[str, Any]:
    return {"step": step, "safety_kl": kl, "margin": margin, "refusal_rate": refusals}


ROWS = [row(0, 0.0, 5.0, 1.0), row(1, 0.01, 4.9), row(2, 0.02, 4.5, 0.9), row(4, 0.05, 3.9), row(8, 0.2, 6.0, 0.4)]


@pytest.mark.parametrize(
    ("budgets", "step", "broken"),
    [
        (Budgets(kl=0.03), 4, ("kl",)),
        (Budgets(kl=0.05), 8, ("kl",)),
        (Budgets(margin=4.5), 4, ("margin",)),
        (Budgets(margin=4.51), 2, ("margin",)),
        (Budgets(margin_drop=1.0), 4, ("margin_drop",)),
        (Budgets(margin_drop=1.1), None, ()),
        (Budgets(refusal=0.9), 8, ("refusal",)),
        (Budgets(kl=0.04, margin=4.0, refusal=0.95), 2, ("refusal",)),
        (Budgets(kl=0.04, margin=4.0), 4, ("kl", "margin")),
        (Budgets(kl=1.0), None, ()),
        (Budgets(), None, ()),
    ],
)
def test_the_first_row_over_budget_is_found(budgets: Budgets, step: int | None, broken: tuple[str, ...]) -> None:
    found = find_breach(ROWS, budgets, {})
    if step is None:
        assert found is None
        return
    assert found is not None
    assert (found.step, found.budgets) == (step, broken)
    assert found.last_inside == max(r["step"] for r in ROWS if r["step"] < step)


def test_it_names_the_last_checkpoint_that_was_measured_inside() -> None:
    saved = {1: Path("checkpoint-1"), 2: Path("checkpoint-2"), 3: Path("checkpoint-3"), 4: Path("checkpoint-4")}
    found = find_breach(ROWS, Budgets(kl=0.03), saved)
    assert found is not None
    assert found.checkpoint == Path("checkpoint-2")  # 3 was never measured, 4 is over budget
    assert "step 4" in found.text
    assert "0.05 (budget 0.03)" in found.text
    assert "go back to checkpoint-2" in found.text
    none = find_breach(ROWS, Budgets(kl=0.03), {3: Path("checkpoint-3")})
    assert none is not None
    assert none.checkpoint is None
    assert "no checkpoint was measured inside" in none.text


def test_a_budget_that_the_anchor_does_not_keep_is_refused() -> None:
    with pytest.raises(InputError, match=r"margin 5 \(budget 6\)"):
        check_budgets(Budgets(margin=6.0), ROWS[0])
    with pytest.raises(InputError, match="must be positive, got 0"):
        check_budgets(Budgets(margin_drop=0.0), ROWS[0])
    check_budgets(Budgets(kl=0.0, margin=5.0, refusal=1.0), ROWS[0])


@pytest.mark.parametrize(("margin", "drop"), [(9.0, 3.0), (3.6, 1.2), (3.0, 1.0), (1.0, 1.0), (-3.0, 1.0)])
def test_without_a_budget_a_third_of_the_margin_is_watched(margin: float, drop: float) -> None:
    assert default_budgets(margin).margin_drop == pytest.approx(drop)
