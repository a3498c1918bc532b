"""Validation of demo:tiny: cells, their summary against the runs themselves, resumption after kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter import store
from tiltmeter.errors import InputError
from tiltmeter.jobs import validation_runner
from tiltmeter.jobs.assess import assess_subject
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.subject import measure_subject, with_lora
from tiltmeter.jobs.validate import validate
from tiltmeter.jobs.validation_plan import Part, Plan, SetPlan, read_plan
from tiltmeter.report.validation_page import render_validation_page

PLAN = """
model: demo:tiny
safety: {name: demo:tiny-safety, assessed: 4, held_out: 4}
sets: [demo:tiny-copy, demo:tiny-known, demo:tiny-harmful, demo:tiny-safety]
seeds: [0, 1]
regimes:
  lora:
    recipe:
      learning_rate: 2.0e-3
      max_steps: 6
      per_device_train_batch_size: 4
      lr_scheduler_type: constant
      lora: {r: 2, lora_alpha: 4, target_modules: [q_proj]}
    seeds: [0]
  full:
    recipe: {optim: sgd, learning_rate: 1.0e-2, max_steps: 4, per_device_train_batch_size: 4}
    sets: [tiny-copy]
    predictors: [measured]
options: {max_tuning: 8, response_tokens: 6, rank: 2, grid: 3, max_tokens: 400, krylov: 2}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    file.write_text(PLAN, encoding="utf-8")
    return read_plan(file)


@pytest.fixture(scope="module")
def done(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("validation")
    seen: list[int] = []
    validate(plan, out, finished=lambda summary: seen.append(summary["finished"]))
    assert seen == [1, 2, 3, 4, 5, 6]
    return out


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def test_cells_stand_in_the_order_of_seeds_regimes_and_sets(plan: Plan) -> None:
    names = [cell.name for cell in plan.cells()]
    assert names[:2] == ["lora-tiny-copy-s0", "lora-tiny-known-s0"]
    assert names[4:] == ["full-tiny-copy-s0", "full-tiny-copy-s1"]
    assert [cell.recipe.seed for cell in plan.cells()][4:] == [0, 1]


def test_assessed_and_held_out_prompts_are_disjoint(plan: Plan) -> None:
    assessed, held_out, taught = plan.split()
    ids = [{row["id"] for row in half.rows} for half in (assessed, held_out)]
    assert [len(each) for each in ids] == [4, 4]
    assert taught.rows == ()
    assert not ids[0] & ids[1]


def test_a_cell_holds_the_forecast_and_a_run_that_really_happened(plan: Plan, done: Path) -> None:
    cell = plan.cells()[0]
    record, arrays = store.read_record(done / "cells" / cell.name)
    opened = with_lora(open_model(plan.model), cell.recipe.lora, 0)
    subject = measure_subject(opened, plan.split()[0], cell.recipe.lora, plan.options)
    told = assess_subject(subject, cell.set.open(), cell.regime.recipe, plan.options).record["forecast"]
    assert record["predicted"]["margin_change"]["value"] == told["margin_change"]["value"]
    # in float32, read with and without the answers beside the openings
    assert_close(arrays["assessed.margin"][0], subject.anchor_margin, rtol=1e-5, atol=0)
    assert float(arrays["held_out.kl"][0].abs().max()) < 1e-9
    seen = record["measured"]["assessed"]
    assert seen["steps"] == [0, 1, 2, 6]
    change = (arrays["assessed.margin"][-1] - arrays["assessed.margin"][0]).mean()
    assert_close(seen["margin_change"]["value"][-1], float(change))
    assert abs(float(change)) > 1e-3
    narrow, wide = [
        held["margin_change"]["high"][-1] - held["margin_change"]["low"][-1] for held in (told["same_prompts"], told)
    ]
    assert narrow < wide
    assert record["predicted"]["same_prompts"]["margin_change"]["low"] == told["same_prompts"]["margin_change"]["low"]
    assert record["measured"]["length"] > 0
    assert record["predictors"]["rehearsal_margin"]["value"] == pytest.approx(-told["margin_change"]["value"][-1])
    assert not (done / "cells" / cell.name / "trainer").exists()


def test_seeds_share_the_assessment_and_run_other_batches(done: Path) -> None:
    cells = [store.read_record(done / "cells" / f"full-tiny-copy-s{seed}")[0] for seed in (0, 1)]
    assert cells[0]["predicted"] == cells[1]["predicted"]
    ends = [cell["measured"]["assessed"]["margin_change"]["value"][-1] for cell in cells]
    assert ends[0] != ends[1]
    assert len(list((done / "assessments").iterdir())) == 5


def test_the_summary_says_what_the_cells_say(plan: Plan, done: Path) -> None:
    found = summary(done)
    store.check_values(found)
    assert found["schema"] == "tiltmeter/validation/1"
    assert (found["finished"], found["planned"]) == (6, 6)
    assert set(found["predictors"]) == set(plan.regimes[0].predictors)
    end = found["size_error"]["assessed"]["end"]["margin_change"]
    expected = []
    for cell in found["cells"]:
        told = cell["predicted"]["margin_change"]["value"][-1]
        seen = cell["measured"]["assessed"]["margin_change"]["value"][-1]
        expected.append(abs(told - seen) / max(abs(seen), 0.02))
    assert end["errors"] == pytest.approx(expected)
    assert end["median"] == pytest.approx(sorted(expected)[2] / 2 + sorted(expected)[3] / 2)
    for prompts in ("assessed", "held_out"):
        hits = 0
        for cell in found["cells"]:
            predicted, seen = cell["predicted"], cell["measured"][prompts]
            step = predicted["horizon_steps"]
            if step == 0:
                continue
            ends = (predicted["same_prompts"] if prompts == "assessed" else predicted)["margin_change"]
            change = seen["margin_change"]["value"][seen["steps"].index(step)]
            place = predicted["steps"].index(step)
            hits += ends["low"][place] <= change <= ends["high"][place]
        assert found["coverage"][prompts]["margin_change"]["cells"]["hits"] == hits
    by_regime = found["predictors"]["rehearsal_margin"]["margin"]
    assert list(by_regime["by_regime"]) == ["lora"]
    assert by_regime["sets"] == {"full": 1, "lora": 4}
    constant = found["predictors"]["steps_times_rate"]["margin"]
    assert constant["value"] is None
    assert store.reason_of(found, "predictors.steps_times_rate.margin.value")
    canary = found["predictors"]["canary_margin"]
    assert canary["unknown"] == 2  # the full regime did not ask for it
    assert canary["steps"] == pytest.approx(canary["passes"] * 8 / 4)


def test_the_page_shows_every_cell_and_no_prompt(plan: Plan, done: Path) -> None:
    page = render_validation_page(summary(done), "Trial")
    for cell in plan.cells():
        assert cell.name in page
    assert all(row["prompt"] not in page for half in plan.split() for row in half.rows)


def test_a_finished_validation_is_not_run_again(plan: Plan, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "cells").glob("*/record.json")}
    validate(plan, done)
    assert {path: path.stat().st_mtime_ns for path in (done / "cells").glob("*/record.json")} == before


def test_cells_of_another_plan_are_refused(done: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("2.0e-3", "3.0e-3"), encoding="utf-8")
    with pytest.raises(InputError, match="belongs to another plan"):
        validate(read_plan(file), done)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seed: 1", "unknown key 'seed'"),
        ("assessed: 4", "assessed: 1", "safety.assessed must be"),
        ("sets: [tiny-copy]", "sets: [nothing]", "names the set 'nothing'"),
        ("grid: 3", "grids: 3", "unknown key 'grids'"),
        ("optim: sgd", "optim: lion", "unknown optimizer 'lion'"),
        ("krylov: 2}", "krylov: 2}\npredictors: [oracle]", "unknown predictor 'oracle'"),
    ],
)
def test_plans_that_cannot_be_run(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_plan(file)


def test_a_killed_validation_goes_on_to_the_same_results(plan: Plan, done: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "plan.yaml", tmp_path / "out"
    file.write_text(PLAN, encoding="utf-8")
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path; "
        "from tiltmeter.jobs.validate import validate; from tiltmeter.jobs.validation_plan import read_plan; "
        "validate(read_plan(Path(sys.argv[1])), Path(sys.argv[2]), report=lambda s: print(s, flush=True))"
    )
    command = [sys.executable, "-c", code, str(file), str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "lora-tiny-known-s0: fine-tuning" in line:
                break
        time.sleep(0.2)
        run.send_signal(signal.SIGKILL)
    finished = [path.parent.name for path in (out / "cells").glob("*/record.json")]
    assert 1 <= len(finished) <= 2
    assert summary(out)["finished"] >= 1
    validate(plan, out, limit=1)
    for name in ("lora-tiny-copy-s0", "lora-tiny-known-s0"):
        one, other = (store.read_record(folder / "cells" / name)[1] for folder in (done, out))
        assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_runs_are_kept_and_only_foretold_again(
    plan: Plan, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured stays to the last digit; a run that is not there is run."""
    runs, out, trained = tmp_path / "runs", tmp_path / "out", []
    shutil.copytree(done / "cells", runs / "cells")
    shutil.rmtree(runs / "cells" / "lora-tiny-known-s0")
    real = validation_runner.run_trial

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(args[1].name)
        return real(*args, **kwargs)

    monkeypatch.setattr(validation_runner, "run_trial", counted)
    validate(plan, out, limit=2, runs=runs)
    assert trained == ["tiny-known"]
    one, other = (store.read_record(folder / "cells" / "lora-tiny-copy-s0") for folder in (done, out))
    assert other[0]["measured"] == one[0]["measured"]
    assert other[0]["created"] > one[0]["created"]
    assert all(torch.equal(one[1][key], other[1][key]) for key in one[1])
    assert other[0]["reasons"] == one[0]["reasons"]


def test_sets_are_mixed_shortened_and_answered(tmp_path: Path) -> None:
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    long.write_text("".join(json.dumps({"prompt": "x" * k, "completion": str(k)}) + "\n" for k in (9, 2, 7, 1)))
    short.write_text("".join(json.dumps({"prompt": f"y{k}"}) + "\n" for k in range(6)))
    mixed = SetPlan("mixed", (Part(str(long), shortest=2), Part(str(short), rows=3, completion="no")))
    rows = mixed.open().rows
    assert sorted(row["completion"] for row in rows) == ["1", "2", "no", "no", "no"]
    assert {row["prompt"] for row in rows if row["completion"] == "no"} == {"y0", "y2", "y4"}
    assert mixed.open() == mixed.open()
    assert [row["prompt"] for row in SetPlan("one", (Part(str(short)),)).open().rows] == [f"y{k}" for k in range(6)]
