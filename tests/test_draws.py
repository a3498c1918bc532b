"""Forecasts from other draws of the prompts: the same runs, read in another order."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltmeter import store
from tiltmeter.jobs.validate import validate
from tiltmeter.jobs.validation_plan import Plan, read_plan

PLAN = """
model: demo:tiny
safety: {name: demo:tiny-safety, assessed: 3, held_out: 4}
sets: [demo:tiny-copy, demo:tiny-known]
seeds: [0, 1]
regimes:
  lora:
    recipe:
      learning_rate: 3.0e-3
      max_steps: 4
      per_device_train_batch_size: 4
      lr_scheduler_type: constant
      lora: {r: 4, lora_alpha: 8}
options: {max_tuning: 8, response_tokens: 4, rank: 2, grid: 2, looks: 2, max_tokens: 2000, coupling: false}
predictors: [measured, canary_margin, canary_kl, gradient_norm]
"""


@pytest.fixture(scope="module")
def made() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("draws")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("draws")
    (folder / "plan.yaml").write_text(PLAN, encoding="utf-8")
    plan = read_plan(folder / "plan.yaml")
    validate(plan, folder / "out")
    (folder / "out" / "draws").mkdir()
    return plan, folder / "out"


def test_the_plans_own_draw_is_judged_as_the_validation_judges_it(made: Any, done: tuple[Plan, Path]) -> None:
    plan, out = done
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found = made.judge(plan, out, 0)
    assert found["assessed"] == [0, 1, 2]
    assert found["coverage"] == summary["coverage"]
    for prompts in ("assessed", "held_out"):
        for when in ("horizon", "end", "end_with_canary"):
            for key in ("margin_change", "safety_kl"):
                told, seen = (each["size_error"][prompts][when][key]["errors"] for each in (found, summary))
                assert len(told) == len(seen) == 4
                assert told == pytest.approx(seen, rel=1e-9)


def test_another_draw_deals_the_same_prompts_and_runs(made: Any, done: tuple[Plan, Path]) -> None:
    plan, out = done
    order = made.deal(plan, 1)
    assert sorted(order) == list(range(7))
    assert order != made.deal(plan, 0) == list(range(7))
    cell = plan.cells()[0]
    trial = made.dealt_trial(plan, out, cell, order)
    _, arrays = store.read_record(out / "cells" / cell.name)
    every = torch.cat([arrays["assessed.kl"], arrays["held_out.kl"]], 1)
    assert torch.equal(torch.cat([trial.seen["assessed"].kl, trial.seen["held_out"].kl], 1), every[:, order])
    assert trial.seen["assessed"].kl.shape[1] == 3
    first = made.judge(plan, out, 1)
    assert first["assessed"] == order[:3]
    # the forecast is made from these prompts: their margins at the anchor are those that the run was measured at
    _, told = store.read_record(out / "draws" / f"1-{cell.assessment}")
    torch.testing.assert_close(told["anchor_margin"].double(), trial.seen["assessed"].margin[0], rtol=1e-4, atol=1e-4)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "draws").rglob("*")}
    assert made.judge(plan, out, 1) == first  # nothing is assessed again
    with pytest.raises(SystemExit, match="belongs to another plan"):
        made.judge(replace(plan, options=replace(plan.options, groups=2)), out, 1)
    with pytest.raises(SystemExit, match="is a run of another plan"):
        made.dealt_trial(replace(plan, options=replace(plan.options, response_tokens=5)), out, cell, order)
    record = out / "draws" / f"1-{cell.assessment}" / store.RECORD
    whole = record.read_text(encoding="utf-8")
    record.write_text(json.dumps({**json.loads(whole), "predictors": {}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="was made without the canary; delete it"):
        made.judge(plan, out, 1)
    record.write_text(whole, encoding="utf-8")
    os.utime(record, ns=(stamps[record], stamps[record]))
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "draws").rglob("*")}
