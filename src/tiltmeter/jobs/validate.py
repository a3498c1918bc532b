"""Validate: forecasts on trial. Assess, fine-tune for real, compare, over data sets, seeds and recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltmeter import store
from tiltmeter.jobs.subject import Report, silent
from tiltmeter.jobs.validation_plan import Cell, Plan
from tiltmeter.jobs.validation_record import summary_of
from tiltmeter.jobs.validation_runner import Runner, is_finished, read_cell
from tiltmeter.jobs.validation_workers import run_on_workers


@dataclass(frozen=True)
class Validation:
    """The result of a validation so far.

    Attributes:
        record: the summary (schema tiltmeter/validation/1).
        cells: finished cells.
        planned: all cells of the plan.
    """

    record: dict[str, Any]
    cells: int
    planned: int


def validate(
    plan: Plan,
    out: Path,
    *,
    limit: int | None = None,
    runs: Path | None = None,
    workers: int | None = None,
    report: Report = silent,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> Validation:
    """Run every cell of a plan that is not there yet; the summary is written anew after each.

    Args:
        plan: what to run.
        out: folder; cells of the same plan in it are kept, so an interrupted validation goes on where it was.
        limit: most cells to run now.
        runs: folder of an earlier validation of this plan, whose runs are taken as they were measured; only forecasts
            are made again. Runs that are not there are run.
        workers: run cells in so many processes on Ray (the extra `ray`); None for this process, without Ray.
        report: told of every stage.
        finished: given the summary after every cell, for a page.

    Raises:
        InputError: the folder holds cells of another plan, something in the plan cannot be used, or Ray is missing.
        WorkerLost: a worker died; finished cells are kept.

    Cost: per regime the safety side once (with workers, at most once on each), per regime and set one assessment, per
        cell one fine-tune.
    """
    cells = plan.cells()
    pending = [cell for cell in cells if not is_finished(out, plan, cell)]
    done = {cell.name: read_cell(out, cell) for cell in cells if cell not in pending}
    asked = pending if limit is None else pending[:limit]
    runner = Runner(plan, out, runs)
    runner.open()
    if workers is None:
        records = _one_by_one(runner, asked, len(done), len(cells), report)
    else:
        records = run_on_workers(plan, out, runs, asked, workers, report)
    for record in records:
        done[record["name"]] = record
        summary = _write_summary(plan, out, done)
        if finished is not None:
            finished(summary)
    summary = _write_summary(plan, out, done)
    return Validation(summary, len(done), len(cells))


def _one_by_one(
    runner: Runner, cells: Sequence[Cell], done: int, planned: int, report: Report
) -> Iterator[dict[str, Any]]:
    for number, cell in enumerate(cells, done + 1):
        prefix = f"{number} of {planned}, {cell.name}: "
        yield runner.run(cell, lambda stage, prefix=prefix: report(prefix + stage))


def _write_summary(plan: Plan, out: Path, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the summary of what is there, in the order of the plan."""
    summary = summary_of(plan, [done[cell.name] for cell in plan.cells() if cell.name in done])
    store.check_values(summary)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    store.write_text(out / "summary.json", text)
    return summary
