"""Runs the cells of a validation in several processes on Ray: the same folders, records and resumption as in one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiltmeter import store
from tiltmeter.errors import InputError, TiltmeterError, WorkerLost
from tiltmeter.jobs.subject import Report
from tiltmeter.jobs.validation_plan import Cell, Plan
from tiltmeter.jobs.validation_runner import CELLS, Runner, read_cell


class Worker:
    """A process of the pool: a runner that stays, so that a regime's safety side is measured once in it."""

    def __init__(self, plan: Plan, out: str, runs: str | None, folder: str, threads: int) -> None:
        import torch

        if Path(folder).is_dir():  # relative names in the plan mean the same everywhere
            os.chdir(folder)
        torch.set_num_threads(threads)
        self.cells = {cell.name: cell for cell in plan.cells()}
        self.runner = Runner(plan, Path(out), None if runs is None else Path(runs))

    def run(self, name: str) -> None:
        """Run a cell; what it found is in its folder."""
        self.runner.run(self.cells[name])

    def pid(self) -> int:
        """Number of the process."""
        return os.getpid()


def run_on_workers(
    plan: Plan, out: Path, runs: Path | None, cells: Sequence[Cell], workers: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Run cells on a Ray cluster: that of `RAY_ADDRESS`, or one of this machine that ends with the job.

    A worker is given one cell at a time, of the regime that it holds where there is one. Two cells that share an
    assessment are never run at the same time. GPUs, where the cluster has some, are divided among the workers.

    Args:
        plan: of the validation.
        out: its folder, on a file system that all workers see.
        runs: as for `validate`.
        cells: to run.
        workers: processes; each holds a model.
        report: told what is running.

    Yields: the record of every cell, as it is finished.

    Raises:
        InputError: Ray is missing, the number of workers makes no sense, or a cell cannot be run.
        WorkerLost: a worker died. Cells that others were running are finished first.
    """
    if workers < 1:
        raise InputError(f"expected at least 1 worker, got {workers}")
    try:
        import ray
    except ImportError:
        raise InputError("--workers needs Ray; install it with: pip install 'tiltmeter[ray]'") from None
    if not cells:
        return
    own = not ray.is_initialized()
    if own:
        _connect(ray, workers)
    try:
        yield from _run(ray, plan, out, runs, list(cells), min(workers, len(cells)), report)
    finally:
        if own:
            ray.shutdown()


def _connect(ray: Any, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
        return
    cores = max(os.cpu_count() or 1, workers)
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def _run(
    ray: Any, plan: Plan, out: Path, runs: Path | None, waiting: list[Cell], workers: int, report: Report
) -> Iterator[dict[str, Any]]:
    share = ray.cluster_resources()
    threads = max(1, int(share.get("CPU", 1) // workers))
    kind = ray.remote(num_cpus=1, num_gpus=min(1.0, share.get("GPU", 0.0) / workers), max_restarts=0)(Worker)
    places = (str(out.resolve()), None if runs is None else str(runs.resolve()), os.getcwd(), threads)
    idle = [kind.remote(plan, *places) for _ in range(workers)]
    held: dict[Any, str] = {}
    busy: dict[Any, tuple[Any, Cell]] = {}
    finished, failure = 0, None
    while busy or (waiting and failure is None):
        for actor in [] if failure else list(idle):
            running = [cell for _, cell in busy.values()]
            cell = next_cell(waiting, running, held.get(actor))
            if cell is None:
                continue
            waiting.remove(cell)
            idle.remove(actor)
            held[actor] = cell.regime.name
            busy[actor.run.remote(cell.name)] = actor, cell
        names = ", ".join(cell.name for _, cell in busy.values())
        report(f"{finished} of {finished + len(busy) + len(waiting)} finished, {len(busy)} running: {names}")
        (ready, *_), _ = ray.wait(list(busy), num_returns=1)
        actor, cell = busy.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            failure = _cause(error, cell)
            idle.append(actor)
            continue
        except ray.exceptions.RayError as error:
            failure = _lost(error, cell, out)
            continue
        idle.append(actor)
        finished += 1
        if not (out / CELLS / cell.name / store.RECORD).is_file():
            raise InputError(
                f"a worker finished {cell.name}, but {out} does not show it; give a folder that all nodes share"
            )
        yield read_cell(out, cell)
    if failure is not None:
        raise failure


def next_cell(waiting: Sequence[Cell], running: Collection[Cell], regime: str | None) -> Cell | None:
    """Which cell an idle worker should take: of the regime that it holds if there is one, else the first.

    Args:
        waiting: in the order of the plan.
        running: cells of other workers; what one of them assesses is not assessed twice.
        regime: name of the regime whose safety side the worker has, or None.

    Returns: the cell, or None where all that wait need an assessment that is being made.
    """
    made = {cell.assessment for cell in running if cell.guard is None}
    free = [cell for cell in waiting if cell.guard is not None or cell.assessment not in made]
    own = [cell for cell in free if cell.regime.name == regime]
    return next(iter(own or free), None)


def _cause(error: Exception, cell: Cell) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, TiltmeterError):
        return type(cause)(f"{cell.name}: {cause}")
    return error  # a fault of ours, with its traceback


def _lost(error: Exception, cell: Cell, out: Path) -> WorkerLost:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return WorkerLost(
        f"the worker that ran {cell.name} died ({why}); finished cells are in {out}, and the same command goes on "
        "from there. If memory ran out, give fewer --workers"
    )
