"""What is a cheaper forecast worth? The runs of a validation, foretold again with fewer rows and fewer looks.

The measured side is read off the committed record, so that no run is made again; the forecasts are made anew, from the
plan's own prompts. Ranks, sizes, intervals and cost are then those of `tiltmeter validate`.

Run: python benchmarks/cheaper.py OUT [SETTING...] [--regime NAME] [--set NAME...]; the settings are below, all of them
by default, and the regimes and sets those of the plan; a part is told only. Forecasts that are done are kept in OUT;
benchmarks/results/validation-cheaper.json and the table in docs/findings.md are written from all settings there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltmeter import store
from tiltmeter.geometry.objective import FORWARD_BACKWARD
from tiltmeter.jobs.assess import examine_subject
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.predict import case_of, predict, risks_record
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import SCREEN, Subject, measure_subject, with_lora
from tiltmeter.jobs.validation_cell import cost_of, predicted_of
from tiltmeter.jobs.validation_plan import Cell, Plan, read_plan
from tiltmeter.jobs.validation_record import summary_of
from tiltmeter.lm.model import undisturbed

ROOT = Path(__file__).parent
PLAN = ROOT / "plans" / "real.yaml"
RUNS = ROOT / "results" / "validation.json"
RESULT = ROOT / "results" / "validation-cheaper.json"
FINDINGS = ROOT.parent / "docs" / "findings.md"
BLOCK = re.compile(r"<!-- cheaper table -->.*?<!-- end of cheaper table -->", re.S)

#: Settings by name: options that differ from the plan's. What the forecast does without is left out in all.
SETTINGS: dict[str, dict[str, int]] = {
    "16 looks": {"forecast_only": True},
    "8 looks": {"forecast_only": True, "looks": 8, "rehearsal_rows": 32, "max_tuning": 12, "grid": 3},
    "4 looks": {"forecast_only": True, "looks": 4, "rehearsal_rows": 16, "max_tuning": 8, "grid": 2},
    "2 looks": {"forecast_only": True, "looks": 2, "rehearsal_rows": 8, "max_tuning": 4, "grid": 2},
    "screening": {"screen": True, "looks": 7, "grid": 1},
}

#: Predictors that an assessment has measured anyway, and that its ranks are told of.
ASKED = "rehearsal_margin", "rehearsal_kl"

#: What is told of a setting. Collapses need the path between the first and the last step, which cheap ones leave out.
KEPT = "finished", "size_error", "coverage", "predictors", "cost"


def options_of(plan: Plan, setting: str) -> Plan:
    """The plan with a setting's options."""
    return replace(plan, options=replace(plan.options, **SETTINGS[setting]))  # type: ignore[arg-type]


def forecast(
    plan: Plan, subject: Subject | None, cell: Cell, folder: Path
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The forecast of a regime and set, made or, where there is no subject, read back."""
    recipe = cell.regime.recipe  # of any seed: seeds differ in the order of the rows alone
    question = plan.question(replace(cell, seed=recipe.seed))
    if subject is None:
        record, arrays = store.read_record(folder)
        if record["question"] != question:
            sys.exit(f"{folder} belongs to another plan or setting; delete it")
        return record, arrays
    with undisturbed(subject.loaded.model), store.new_folder(folder) as part:
        result, tuning, found = examine_subject(subject, cell.set.open(), recipe, plan.options)
        why = Reasons(result.record["reasons"])
        case = case_of(subject, tuning, recipe, plan.options, found, None)
        risks = risks_record(predict(case, ASKED), "predictors", why)
        made = {**result.record, "question": question, "predictors": risks, "reasons": dict(why)}
        store.write_record(part, made, result.arrays)
    return made, result.arrays


def retold(ran: Mapping[str, Any], assessment: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """A cell of the committed record with another forecast in the place of its own."""
    why = Reasons({key: text for key, text in assessment["reasons"].items() if key.startswith("predictors.")})
    return {
        **{key: ran[key] for key in ("name", "set", "regime", "seed", "recipe", "measured")},
        "machine": assessment["machine"],
        "predicted": predicted_of(assessment, arrays, why),
        "predictors": assessment["predictors"],
        "cost": {**cost_of(assessment), "trial_seconds": ran["cost"]["trial_seconds"]},
        "reasons": dict(why),
    }


def cells_of(
    plan: Plan, record: Mapping[str, Any], regime: str | None, sets: Sequence[str]
) -> list[tuple[Cell, Mapping[str, Any]]]:
    """Cells of the plan beside those of the record of its runs, regime by regime; no sets are all."""
    prompts = {"name": plan.safety, "assessed": plan.assessed, "held_out": plan.held_out}
    if (record["model"], record["safety"]) != (plan.model, prompts):
        sys.exit(f"{RUNS.name} holds runs of another model or of other prompts than the plan has now")
    ran = {cell["name"]: cell for cell in record["cells"]}
    found = [(cell, ran[cell.name]) for cell in plan.cells() if cell.name in ran]
    for cell, held in found:
        if held["recipe"] != cell.recipe.as_dict():
            sys.exit(f"{cell.name} was run with another recipe than the plan has now")
    kept = [
        (cell, held)
        for cell, held in found
        if regime in (None, cell.regime.name) and (not sets or cell.set.name in sets)
    ]
    if not kept:
        sys.exit(f"no run of {RUNS.name} is of regime {regime} and of the sets {', '.join(sets)}")
    return sorted(kept, key=lambda pair: pair[0].regime.name)


def share_of(cell: Mapping[str, Any]) -> float:
    """Cost of a cell's assessment as a share of 100 steps of eight rows, each as long as the sample's on average."""
    cost = cell["cost"]
    return float(cost["assessment_passes"] * cost["sample_rows"] / 800)


def shares_by_kind(assessment: Mapping[str, Any]) -> dict[str, float]:
    """The same of an assessment by kinds of passes."""
    cost, tuning = assessment["cost"], assessment["tuning"]
    tokens = 800 * tuning["tokens"] / tuning["used"]
    return {
        kind: FORWARD_BACKWARD[kind] * times * cost["data_tokens"] / tokens for kind, times in cost["passes"].items()
    }


def judge(
    plan: Plan, out: Path, setting: str, record: Mapping[str, Any], regime: str | None = None, sets: Sequence[str] = ()
) -> dict[str, Any]:
    """All forecasts of one setting against the runs."""
    plan = options_of(plan, setting)
    assessed = plan.split()[0]
    subject: Subject | None = None
    measured, rows, cells, kinds = "", 0, [], defaultdict[str, float](float)
    taken = cells_of(plan, record, regime, sets)
    for cell, ran in taken:
        folder = out / f"{setting.replace(' ', '-')}-{cell.assessment}"
        done = (folder / store.RECORD).is_file()
        if not done and measured != cell.regime.name:
            subject, opened, measured = None, None, cell.regime.name  # one model in memory at a time
            opened = with_lora(open_model(plan.model), cell.recipe.lora, plan.options.seed)
            with undisturbed(opened.loaded.model):
                subject = measure_subject(opened, assessed, cell.recipe.lora, plan.options)
        assessment, arrays = forecast(plan, None if done else subject, cell, folder)
        rows = rows or assessment["tuning"]["used"] + (plan.options.looks - 1) * assessment["tuning"]["look_rows"]
        cells.append(retold(ran, assessment, arrays))
        for kind, share in shares_by_kind(assessment).items():
            kinds[kind] += share
        print(f"{setting}: {cell.name}", flush=True)
    told = summary_of(plan, cells)
    why = {path: reason for path, reason in told["reasons"].items() if path.split(".")[0] in KEPT}
    horizons = [cell["predicted"]["horizon_steps"] == cell["recipe"]["steps"] for cell in cells]
    found = {
        "setting": setting,
        "options": SETTINGS[setting],
        "rows": rows,
        **{key: told[key] for key in KEPT},
        "share_by_kind": {kind: total / len(cells) for kind, total in sorted(kinds.items())},
        "share_of_the_plan": statistics.fmean(share_of(ran) for _, ran in taken),
        "whole_runs_claimed": None if plan.options.screen else sum(horizons),
        "reasons": why | ({"whole_runs_claimed": SCREEN} if plan.options.screen else {}),
    }
    store.check_values(found)
    return found


def table(told: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The findings' table as Markdown; its first row is what the plan itself asks for."""
    columns = (
        "looks, rows", "runs", "cost, % of 100 steps", "error at the end, assessed: margin / KL", "held-out",
        "intervals that hold, assessed: margin, KL", "whole run claimed", "ranks under LoRA AdamW: margin, KL",
    )  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    whole = sum(cell["predicted"]["horizon_steps"] == cell["recipe"]["steps"] for cell in record["cells"])
    rows.append(_row("16, 84, as planned", {**record, "whole_runs_claimed": whole}))
    for each in told["settings"]:
        kind = "screening" if each["options"].get("screen") else "forecast only"
        rows.append(_row(f"{each['options'].get('looks', 16)}, {each['rows']}, {kind}", each))
    return "\n".join(rows)


def _row(label: str, each: Mapping[str, Any]) -> str:
    ends = [each["size_error"][prompts]["end"] for prompts in ("assessed", "held_out")]
    sizes = [" / ".join(f"{100 * by[key]['median']:.0f} %" for key in ("margin_change", "safety_kl")) for by in ends]
    cover = each["coverage"]["assessed"]
    held = ", ".join(str(cover[key]["cells"]["hits"]) for key in ("margin_change", "safety_kl"))
    whole_runs = str(each["whole_runs_claimed"])
    if each["whole_runs_claimed"] is None:
        held = whole_runs = "none has one"
    share = 100 * each["cost"]["share_of_100_steps_at_8"]
    whole = each.get("share_of_the_plan", math.nan)
    share_text = f"{share:.0f}" if each["finished"] == 30 else f"{share:.0f} (as planned: {100 * whole:.0f})"
    ranks = []
    for name, key in zip(ASKED, ("margin", "kl"), strict=True):
        value = each["predictors"][name][key]["by_regime"].get("lora-adamw")
        ranks.append("not told" if value is None else f"{value:.2f}")
    cells = [label, str(each["finished"]), share_text, *sizes, held, whole_runs, ", ".join(ranks)]
    return f"| {' | '.join(cells)} |"


def main(given: Sequence[str] | None = None) -> None:
    """Judge the settings that are named, and write all that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--regime", help="of the plan, by default all")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="of the plan, by default all; repeat")
    asked = parser.parse_args(given)
    names = asked.settings or list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        sys.exit(f"unknown setting {unknown[0]!r}; expected some of {', '.join(SETTINGS)}")
    plan, record = read_plan(PLAN), json.loads(RUNS.read_text(encoding="utf-8"))
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        told = judge(plan, asked.out, name, record, asked.regime, asked.sets)
        print(_row(name, told), flush=True)
        if not asked.regime and not asked.sets:  # a part is told and not kept
            store.write_text(asked.out / f"{name.replace(' ', '-')}.json", json.dumps(told) + "\n")
    held = [asked.out / f"{name.replace(' ', '-')}.json" for name in SETTINGS]
    settings = [json.loads(path.read_text(encoding="utf-8")) for path in held if path.is_file()]
    if settings:
        whole = {**provenance("cpu"), "runs": RUNS.name, "settings": settings}
        store.write_text(RESULT, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        block, text = table(whole, record), FINDINGS.read_text(encoding="utf-8")
        print(block)
        if not BLOCK.search(text):
            sys.exit(f"{FINDINGS.name} has no place for the table")
        store.write_text(FINDINGS, BLOCK.sub(f"<!-- cheaper table -->\n{block}\n<!-- end of cheaper table -->", text))


if __name__ == "__main__":
    main()
