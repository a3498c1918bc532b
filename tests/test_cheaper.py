"""Cheaper forecasts of runs that are in a committed record: no run is made again."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiltmeter.jobs.validate import validate
from tiltmeter.jobs.validation_plan import Plan, read_plan

PLAN = """
model: demo:tiny
safety: {name: demo:tiny-safety, assessed: 3, held_out: 4}
sets: [demo:tiny-copy, demo:tiny-known]
seeds: [0, 1]
regimes:
  lora:
    recipe: &recipe
      learning_rate: 3.0e-3
      max_steps: 6
      per_device_train_batch_size: 4
      lr_scheduler_type: constant
      lora: {r: 4, lora_alpha: 8}
  sgd:
    recipe: {<<: *recipe, optim: sgd}
    seeds: [0]
options: {max_tuning: 8, response_tokens: 4, rank: 2, grid: 2, looks: 4, max_tokens: 2000, coupling: false}
predictors: [measured]
"""


@pytest.fixture(scope="module")
def made() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("cheaper")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("cheaper")
    (folder / "plan.yaml").write_text(PLAN, encoding="utf-8")
    plan = read_plan(folder / "plan.yaml")
    validate(plan, folder / "out")
    return plan, json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8")), folder


@pytest.mark.parametrize("only", [False, True])
def test_the_plans_own_forecast_is_judged_as_the_validation_judges_it(
    made: Any, done: tuple[Plan, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch, only: bool
) -> None:
    """With nothing changed, and without what the forecast does not need; only the cost may differ."""
    plan, record, folder = done
    monkeypatch.setitem(made.SETTINGS, "same", {"forecast_only": True} if only else {})
    (folder / f"kept-{only}").mkdir()
    found = made.judge(plan, folder / f"kept-{only}", "same", record)
    assert found["finished"] == 6
    for prompts in ("assessed", "held_out"):
        assert found["coverage"][prompts] == record["coverage"][prompts]
        for when in ("horizon", "end"):
            for key in ("margin_change", "safety_kl"):
                told, seen = (each["size_error"][prompts][when][key]["errors"] for each in (found, record))
                assert sorted(told) == pytest.approx(sorted(seen), rel=1e-5)
    share, whole = found["cost"]["share_of_100_steps_at_8"], record["cost"]["share_of_100_steps_at_8"]
    assert found["share_of_the_plan"] == pytest.approx(whole)
    assert sum(found["share_by_kind"].values()) == pytest.approx(share)
    assert share == pytest.approx(whole) if not only else share < 0.9 * whole
    assert ("gram" in found["share_by_kind"]) is not only
    again = made.judge(plan, folder / f"kept-{only}", "same", record)  # read back
    assert again == found


def test_a_screening_is_judged_by_its_end_alone(
    made: Any, done: tuple[Plan, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, record, folder = done
    monkeypatch.setitem(made.SETTINGS, "screened", {"screen": True, "looks": 3, "grid": 1})
    (folder / "screened").mkdir()
    found = made.judge(plan, folder / "screened", "screened", record)
    assert found["finished"] == 6
    assert {each["cells"]["n"] for by in found["coverage"].values() for each in by.values()} == {0}
    assert {len(by["end"][key]["errors"]) for by in found["size_error"].values() for key in by["end"]} == {6}
    assert {len(by["horizon"][key]["errors"]) for by in found["size_error"].values() for key in by["horizon"]} == {0}
    assert set(found["share_by_kind"]) == {"forward", "forward_backward"}
    batch = record["cells"][0]["recipe"]["batch_size"]
    assert found["rows"] == 3 * batch
    assert found["whole_runs_claimed"] is None
    assert found["reasons"]["whole_runs_claimed"] == "left out (--screen)"
    row = made.table({"settings": [found]}, {**record, "finished": 30}).splitlines()[-1]
    assert f"| 3, {3 * batch}, screening | 6 | " in row
    assert row.count("none has one") == 2


def test_some_runs_may_be_asked_for(made: Any, done: tuple[Plan, dict[str, Any], Path]) -> None:
    plan, record, _ = done
    names = [cell.name for cell, _ in made.cells_of(plan, record, "lora", ["tiny-copy"])]
    assert names == ["lora-tiny-copy-s0", "lora-tiny-copy-s1"]
    with pytest.raises(SystemExit, match="is of regime none"):
        made.cells_of(plan, record, "none", [])
    apart = {**record, "safety": {**record["safety"], "assessed": 4}}
    with pytest.raises(SystemExit, match="of other prompts"):
        made.cells_of(plan, apart, None, [])
    other = {**record, "cells": [{**cell, "recipe": {**cell["recipe"], "steps": 7}} for cell in record["cells"]]}
    with pytest.raises(SystemExit, match="another recipe"):
        made.cells_of(plan, other, None, [])


def test_a_forecast_of_another_setting_is_not_taken(
    made: Any, done: tuple[Plan, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, record, folder = done
    monkeypatch.setitem(made.SETTINGS, "few", {"looks": 2, "forecast_only": True})
    (folder / "few").mkdir()
    assert made.judge(plan, folder / "few", "few", record, "sgd")["finished"] == 2
    monkeypatch.setitem(made.SETTINGS, "few", {"looks": 3})
    with pytest.raises(SystemExit, match="another plan or setting"):
        made.judge(replace(plan), folder / "few", "few", record, "sgd")
    with pytest.raises(SystemExit, match="unknown setting 'none'"):
        made.main([str(folder / "few"), "none"])
