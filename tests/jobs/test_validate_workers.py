"""Validation in two processes on Ray: the numbers of one process; a killed worker is told, and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tiltmeter import store
from tiltmeter.errors import DataError, InputError, WorkerLost
from tiltmeter.jobs.validate import validate
from tiltmeter.jobs.validation_plan import Cell, Plan, read_plan
from tiltmeter.jobs.validation_workers import next_cell, run_on_workers

PLAN = """
model: demo:tiny
safety: {name: demo:tiny-safety, assessed: 4, held_out: 4}
sets: [demo:tiny-copy, demo:tiny-known]
seeds: [0, 1]
regimes:
  lora:
    recipe:
      learning_rate: 2.0e-3
      max_steps: 3
      per_device_train_batch_size: 4
      lr_scheduler_type: constant
      lora: {r: 2, lora_alpha: 4, target_modules: [q_proj]}
    seeds: [0]
  full:
    recipe: {optim: sgd, learning_rate: 1.0e-2, max_steps: 4, per_device_train_batch_size: 4}
    sets: [tiny-copy]
options: {max_tuning: 8, response_tokens: 6, rank: 2, grid: 3, max_tokens: 400, coupling: false}
predictors: [measured]
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    file.write_text(PLAN, encoding="utf-8")
    return read_plan(file)


def by_name(plan: Plan) -> dict[str, Cell]:
    return {cell.name: cell for cell in plan.cells()}


def test_a_worker_keeps_its_regime_and_no_assessment_is_made_twice(plan: Plan) -> None:
    cells = by_name(plan)
    names = ["lora-tiny-copy-s0", "lora-tiny-known-s0", "full-tiny-copy-s0", "full-tiny-copy-s1"]
    assert list(cells) == names
    copy, known, full, again = (cells[name] for name in names)
    assert next_cell([copy, known, full], [], None) is copy
    assert next_cell([copy, known, full], [], "full") is full
    assert next_cell([known, full], [copy], "full") is full
    assert next_cell([again], [full], "full") is None
    assert next_cell([known, again], [full], "full") is known
    assert next_cell([], [full], None) is None


def test_the_number_of_workers_is_checked_before_anything_is_read(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1 worker, got 0"):
        list(run_on_workers(plan, tmp_path, None, plan.cells(), 0, lambda stage: None))
    assert not list(tmp_path.iterdir())


def test_without_ray_the_message_says_how_to_get_it(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'tiltmeter\[ray\]'"):
        list(run_on_workers(plan, tmp_path, None, plan.cells(), 2, lambda stage: None))


def kill_a_worker() -> None:
    """Kill a process that runs a cell, or an idle one that will get the next."""
    held = [each for each in psutil.process_iter(["cmdline"]) if "ray::Worker" in " ".join(each.info["cmdline"] or [])]
    running = [each for each in held if "Worker.run" in " ".join(each.info["cmdline"])]
    (running or held)[0].kill()


def same(one: Any, other: Any) -> None:
    """Equal to the rounding of another number of threads."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    else:
        assert one == other


def test_two_workers_give_the_cells_of_one_process_though_one_is_killed(plan: Plan, tmp_path: Path) -> None:
    alone, shared, stages = tmp_path / "alone", tmp_path / "shared", []
    killed: list[int] = []

    def finished(summary: dict[str, Any]) -> None:
        if not killed:
            killed.append(summary["finished"])
            kill_a_worker()

    with pytest.raises(WorkerLost, match=r"died.*finished cells are in .*shared.*same command goes on"):
        validate(plan, shared, workers=2, report=stages.append, finished=finished)
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (shared / "cells").glob("*/record.json")}
    assert 1 <= len(kept) < 4
    assert "2 running" in stages[0]
    result = validate(plan, shared)  # in one process: who runs a cell does not matter
    assert (result.cells, result.planned) == (4, 4)
    for name, when in kept.items():
        assert (shared / "cells" / name / "record.json").stat().st_mtime_ns == when
    validate(plan, alone)
    for name in kept:
        one, other = (store.read_record(folder / "cells" / name)[0] for folder in (alone, shared))
        for key in ("measured", "predicted", "question"):
            same(one[key], other[key])
    names = [cell["name"] for cell in result.record["cells"]]
    assert names == list(by_name(plan))


def test_bad_rows_end_the_job_before_a_worker_starts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{", encoding="utf-8")
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.replace("demo:tiny-known", str(bad)), encoding="utf-8")
    with pytest.raises(DataError):
        validate(read_plan(file), tmp_path / "out", workers=2)
