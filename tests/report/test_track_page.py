"""The page of a run: every number stands in it, nulls with their reason, and drawings keep what cannot be drawn out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tiltmeter.errors import DataError
from tiltmeter.report.track_page import render_track_page

STEPS = [0, 1, 2, 4]


def curve(values: list[float | None], unit: str, spread: float = 0.0) -> dict[str, Any]:
    out: dict[str, Any] = {"value": values, "unit": unit}
    if spread:
        out["low"] = [None if v is None else v - spread for v in values]
        out["high"] = [None if v is None else v + spread for v in values]
    return out


@pytest.fixture
def record() -> dict[str, Any]:
    """SYNTHETIC numbers."""
    none: list[float | None] = [None] * 4
    return {
        "schema": "tiltmeter/track/1",
        "level": 0.9,
        "model": {"name": "a <b> model"},
        "safety": {"name": "prompts"},
        "tuning": {"name": "rows"},
        "recipe": {"regime": "full", "optimizer": "adamw", "learning_rate": 1e-4, "schedule": "linear", "steps": 4,
                   "batch_size": 2, "lora": None},
        "alarm": {"fired": True, "given": True, "text": "over budget at step 4: margin 0.515"},
        "curves": {
            "steps": STEPS,
            "margin": curve([3.0, 2.0, 1.0, 0.515], "nats", 0.25),
            "margin_change": curve([0.0, -1.0, -2.0, -2.485], "nats", 0.125),
            "safety_kl": curve([0.0, 1e-5, 1e-3, 0.0456], "nats per token", 1e-6),
            "refusal_rate": curve(none, "share"),
            "task_loss": curve([None, 2.25, 1.75, 1.5], "nats per token"),
            "drift_energy": curve([0.0, 1e-7, 1e-6, 1e-5], "nats"),
            "drift_outside": curve([0.0, 0.11, 0.22, 0.33], "parameter units"),
            "weight_change": curve([0.0, 0.12, 0.23, 0.34], "parameter units"),
        },
        "exponent": {"value": 2.125, "low": 1.5, "high": 2.75},
        "path": {"pc1_share": 0.875, "steps": STEPS, "positions": [[0.0, 0.0], [1.0, 0.2], [2.0, 0.1], [3.0, -0.4]]},
        "comparison": {
            "steps": [1, 4],
            "horizon_steps": 2,
            "margin_change": {"predicted": [-0.9, -2.0], "low": [-1.1, -2.2], "high": [-0.7, -1.8],
                              "measured": [-1.0, -2.485], "inside": [True, False], "unit": "nats"},
            "safety_kl": {"predicted": [2e-5, 0.03], "low": [-1e-5, None], "high": [4e-5, None],
                          "measured": [1e-5, 0.0456], "inside": [True, None], "unit": "nats per token"},
            "refusal_rate": {"predicted": [None, None], "low": [None, None], "high": [None, None],
                             "measured": [None, None], "inside": [None, None], "unit": "share"},
        },
        "overhead": {"share_at_interval": 0.0625},
        "reasons": {"curves.refusal_rate": "generation is dear", "curves.task_loss.value.0": "no step was taken yet"},
    }  # fmt: skip


def test_every_measured_number_and_reason_stands_on_the_page(record: dict[str, Any]) -> None:
    page = render_track_page([record], "A run")
    for text in ("0.515", "0.0456", "0.33", "0.34", "2.25", "0.875", "0.0625", "generation is dear",
                 "no step was taken yet", "over budget at step 4", "a &lt;b&gt; model"):  # fmt: skip
        assert text in page, text
    assert "a <b> model" not in page
    assert page.count("<svg") >= 7  # margin, KL, loss, weights, energy, path, and the legend
    assert "[3.0, -0.4]" not in page


def test_what_has_to_be_asked_for_has_a_column_only_where_it_was_measured(record: dict[str, Any]) -> None:
    assert "Commutator defect" not in render_track_page([record], "A run")
    record["curves"]["commutator_defect"] = curve([None, 0.375, None, 0.625], "per parameter unit")
    record["curves"]["subspace_overlap"] = curve([None] * 4, "mean squared cosine")
    record["reasons"]["curves.commutator_defect"] = "four gradients"
    page = render_track_page([record], "A run")
    for text in ("Commutator defect, per parameter unit", "0.375", "0.625", "four gradients"):
        assert text in page
    assert "Subspace overlap" not in page


def test_the_forecast_stands_beside_the_run_and_says_what_it_does_not_claim(record: dict[str, Any]) -> None:
    page = render_track_page([record], "A run")
    assert "no (beyond the horizon: not claimed)" in page
    assert "not known (beyond the horizon: not claimed)" in page
    alone = copy.deepcopy(record)
    alone["comparison"] = None
    alone["reasons"]["comparison"] = "no assessment was given"
    page = render_track_page([alone], "A run")
    assert "no assessment was given" in page
    assert "beyond the horizon" not in page


def test_other_records_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="none was given"):
        render_track_page([], "Nothing")
    with pytest.raises(DataError, match="assessment"):
        render_track_page([{**record, "schema": "tiltmeter/assessment/1"}], "Another")
