"""How well do intervals hold on prompts that a forecast has not seen? Forecasts again, from other draws of the prompts.

A validation measures every run on the same assessed and the same held-out prompts, so that whether the two are alike is
one draw and not one a cell. Here the same prompts are dealt again into as many assessed and held-out ones, the
forecasts are made from those, and the runs, measured prompt by prompt, are read in the new order: no run is made again.

Run: python benchmarks/draws.py PLAN OUT DRAW... [--regime NAME], after tiltmeter validate PLAN -o OUT; draws are
numbers from 1. Draws and sets that are done are kept in OUT/draws, and benchmarks/results/validation-draws.json is
written from all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltmeter import store
from tiltmeter.jobs.assess import examine_subject
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.predict import case_of, predict, risks_record
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Subject, measure_subject, with_lora
from tiltmeter.jobs.trial import Refusals, Seen, Trial
from tiltmeter.jobs.validation_cell import foretold_cell
from tiltmeter.jobs.validation_plan import Cell, Plan, read_plan
from tiltmeter.jobs.validation_record import CANARIES, summary_of
from tiltmeter.jobs.validation_runner import CELLS
from tiltmeter.lm.measurement import Measurement
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.rows import RowSet
from tiltmeter.predictors.canary import run_canary

RESULT = Path(__file__).parent / "results" / "validation-draws.json"
NAMES = "assessed", "held_out"

#: What a validation judges the whole of, and a draw does not.
KEPT = "schema", "level", "model", "safety", "finished", "size_error", "coverage"


def deal(plan: Plan, draw: int) -> list[int]:
    """The plan's prompts, assessed before held out, in another order; 0 is the plan's own."""
    order = list(range(plan.assessed + plan.held_out))
    if draw:
        random.Random(draw).shuffle(order)
    return [*sorted(order[: plan.assessed]), *sorted(order[plan.assessed :])]


def dealt_trial(plan: Plan, out: Path, cell: Cell, order: list[int]) -> Trial:
    """A finished run with its prompts in another order; refusals, which are stored as shares, are left out."""
    record, arrays = store.read_record(out / CELLS / cell.name)
    if record["run"] != plan.run(cell):
        sys.exit(f"{cell.name} is a run of another plan (model, prompts, set, recipe or answers differ)")
    halves = {}
    for key in ("margin", "kl"):
        every = torch.cat([arrays[f"{name}.{key}"] for name in NAMES], 1)
        if every.shape[1] != len(order):
            sys.exit(
                f"{cell.name}: {every.shape[1]} prompts were measured, {len(order)} are in the plan; some are too long"
            )
        halves[key] = every[:, order].split([plan.assessed, plan.held_out], 1)
    steps = tuple(record["measured"]["assessed"]["steps"])
    unknown = Refusals(Measurement(None, None, None, 0, 0, "share", "answers are not kept prompt by prompt"))
    seen = {name: Seen(steps, halves["margin"][i], halves["kl"][i], unknown) for i, name in enumerate(NAMES)}
    return Trial(seen, record["measured"]["length"], record["cost"]["trial_seconds"], record["model"]["digest"])


def forecast(plan: Plan, subject: Subject, cell: Cell, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The forecast of a regime and set, made or read back."""
    recipe = cell.regime.recipe  # of any seed: seeds differ in the order of the rows alone
    question = plan.question(replace(cell, seed=recipe.seed))
    if (folder / store.RECORD).is_file():
        record, arrays = store.read_record(folder)
        if record["question"] != question:
            sys.exit(f"{folder} belongs to another plan; delete it")
        if not {*canaries(cell)} <= {*record["predictors"]}:
            sys.exit(f"{folder} was made without the canary; delete it")
        return record, arrays
    with undisturbed(subject.loaded.model), store.new_folder(folder) as part:
        result, tuning, found = examine_subject(subject, cell.set.open(), recipe, plan.options)
        case, asked = case_of(subject, tuning, recipe, plan.options, found, None), canaries(cell)
        if asked:
            case = replace(case, canary=run_canary(case))
        why = Reasons(result.record["reasons"])
        risks = risks_record(predict(case, asked), "predictors", why)
        record = {**result.record, "question": question, "predictors": risks, "reasons": dict(why)}
        store.write_record(part, record, result.arrays)
    return record, result.arrays


def canaries(cell: Cell) -> list[str]:
    """The predictors of a cell that say what comes, in the units of what is measured; the others only rank."""
    return [name for name in cell.regime.predictors if name in CANARIES.values()]


def judge(plan: Plan, out: Path, draw: int) -> dict[str, Any]:
    """All forecasts of one draw against the runs."""
    halves = plan.split()
    rows = [row for half in halves[:2] for row in half.rows]
    order = deal(plan, draw)
    chosen = tuple(rows[i] for i in order[: plan.assessed])
    assessed = RowSet(f"{plan.safety} (draw {draw})", chosen, store.digest_json(list(chosen)))
    cells, subject, regime = [], None, None
    for cell in sorted(plan.cells(), key=lambda cell: cell.regime.name):
        if cell.guard is not None or not (out / CELLS / cell.name / store.RECORD).is_file():
            continue
        folder = out / "draws" / f"{draw}-{cell.assessment}"
        if not (folder / store.RECORD).is_file() and (subject is None or regime != cell.regime.name):
            subject, opened, regime = None, None, cell.regime.name  # one model in memory at a time
            opened = with_lora(open_model(plan.model), cell.recipe.lora, plan.options.seed)
            with undisturbed(opened.loaded.model):
                subject = measure_subject(opened, assessed, cell.recipe.lora, plan.options)
        assessment, arrays = forecast(plan, subject, cell, folder)
        trial = dealt_trial(plan, out, cell, order)
        if trial.digest != assessment["model"]["digest"]:
            sys.exit(f"{cell.name} began at another model than {plan.model} is now")
        print(f"draw {draw}: {cell.name}", flush=True)
        cells.append(foretold_cell(plan, cell, assessment, arrays, trial))
    told = summary_of(plan, cells)
    why = {path: reason for path, reason in told["reasons"].items() if path.split(".")[0] in KEPT}
    regimes = sorted({cell["regime"] for cell in cells})
    about = {"draw": draw, "regimes": regimes, "assessed": order[: plan.assessed]}
    found = {**about, **{key: told[key] for key in KEPT}, "reasons": why}
    store.check_values(found)
    return found


def main() -> None:
    """Judge the draws that are named, and write all that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("draws", type=int, nargs="+")
    parser.add_argument("--regime", help="of the plan, by default all")
    asked = parser.parse_args()
    plan, out = read_plan(asked.plan), asked.out
    if asked.regime:
        plan = replace(plan, regimes=tuple(regime for regime in plan.regimes if regime.name == asked.regime))
    (out / "draws").mkdir(exist_ok=True)
    for draw in asked.draws:
        name = f"{draw}-{asked.regime}.json" if asked.regime else f"{draw}.json"
        store.write_text(out / "draws" / name, json.dumps(judge(plan, out, draw)) + "\n")
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "draws").glob("*.json"))]
    text = json.dumps({**provenance("cpu"), "draws": held}, indent=1, allow_nan=False) + "\n"
    store.write_text(RESULT, text)
    for each in held:
        for name in NAMES:
            told = {key: value["cells"] for key, value in each["coverage"][name].items()}
            print(each["draw"], name, {key: f"{value['hits']} of {value['n']}" for key, value in told.items()})


if __name__ == "__main__":
    main()
