"""What is a cheaper forecast worth? The runs of a validation, foretold again with fewer rows and fewer looks.

The measured side is read off the committed record, so that no run is made again; the forecasts are made anew, from the
plan's own prompts. Ranks, sizes, intervals and cost are then those of `tiltmeter validate`.

Run: python benchmarks/cheaper.py OUT [SETTING...] [--regime NAME]; the settings are below, all of them by default.
Forecasts that are done are kept in OUT, and benchmarks/results/validation-cheaper.json is written from all settings
whose forecasts are whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltmeter import store
from tiltmeter.jobs.assess import examine_subject
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.predict import case_of, predict, risks_record
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Subject, measure_subject, with_lora
from tiltmeter.jobs.validation_cell import cost_of, predicted_of
from tiltmeter.jobs.validation_plan import Cell, Plan, read_plan
from tiltmeter.jobs.validation_record import summary_of
from tiltmeter.lm.model import undisturbed

ROOT = Path(__file__).parent
PLAN = ROOT / "plans" / "real.yaml"
RUNS = ROOT / "results" / "validation.json"
RESULT = ROOT / "results" / "validation-cheaper.json"

#: Settings by name: options that differ from the plan's. Of the forecast alone, without which nothing of it changes.
SETTINGS: dict[str, dict[str, int]] = {
    "16 looks": {"forecast_only": True},
    "8 looks": {"forecast_only": True, "looks": 8, "rehearsal_rows": 32, "max_tuning": 12, "grid": 3},
    "4 looks": {"forecast_only": True, "looks": 4, "rehearsal_rows": 16, "max_tuning": 8, "grid": 2},
    "2 looks": {"forecast_only": True, "looks": 2, "rehearsal_rows": 8, "max_tuning": 4, "grid": 2},
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


def cells_of(plan: Plan, record: Mapping[str, Any], regime: str | None) -> list[tuple[Cell, Mapping[str, Any]]]:
    """Cells of the plan beside those of the record of its runs, regime by regime."""
    ran = {cell["name"]: cell for cell in record["cells"]}
    found = [(cell, ran[cell.name]) for cell in plan.cells() if cell.name in ran]
    for cell, held in found:
        if held["recipe"] != cell.recipe.as_dict():
            sys.exit(f"{cell.name} was run with another recipe than the plan has now")
    return sorted(
        (pair for pair in found if regime in (None, pair[0].regime.name)), key=lambda pair: pair[0].regime.name
    )


def judge(plan: Plan, out: Path, setting: str, record: Mapping[str, Any], regime: str | None) -> dict[str, Any]:
    """All forecasts of one setting against the runs."""
    plan = options_of(plan, setting)
    assessed = plan.split()[0]
    subject: Subject | None = None
    measured, cells = "", []
    for cell, ran in cells_of(plan, record, regime):
        folder = out / f"{setting.replace(' ', '-')}-{cell.assessment}"
        done = (folder / store.RECORD).is_file()
        if not done and measured != cell.regime.name:
            subject, measured = None, cell.regime.name  # one model in memory at a time
            opened = with_lora(open_model(plan.model), cell.recipe.lora, plan.options.seed)
            with undisturbed(opened.loaded.model):
                subject = measure_subject(opened, assessed, cell.recipe.lora, plan.options)
        cells.append(retold(ran, *forecast(plan, None if done else subject, cell, folder)))
        print(f"{setting}: {cell.name}", flush=True)
    told = summary_of(plan, cells)
    why = {path: reason for path, reason in told["reasons"].items() if path.split(".")[0] in KEPT}
    horizons = [cell["predicted"]["horizon_steps"] == cell["recipe"]["steps"] for cell in cells]
    found = {
        "setting": setting,
        "options": SETTINGS[setting],
        **{key: told[key] for key in KEPT},
        "whole_runs_claimed": sum(horizons),
        "reasons": why,
    }
    store.check_values(found)
    return found


def said(each: Mapping[str, Any]) -> str:
    """One line of a setting."""
    sizes = {
        f"{prompts} {when}": "/".join(f"{100 * by[key]['median']:.0f}" for key in ("margin_change", "safety_kl"))
        for prompts in ("assessed", "held_out")
        for when, by in each["size_error"][prompts].items()
        if when != "end_with_canary"
    }
    held = {key: value["cells"]["hits"] for key, value in each["coverage"]["assessed"].items()}
    ranks = {
        name: each["predictors"][name][key]["by_regime"] for name, key in zip(ASKED, ("margin", "kl"), strict=True)
    }
    share = 100 * each["cost"]["share_of_100_steps_at_8"]
    return f"{each['setting']}: {share:.1f} %, {sizes}, held {held} of {each['finished']}, {ranks}"


def main(given: Sequence[str] | None = None) -> None:
    """Judge the settings that are named, and write all that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--regime", help="of the plan, by default all")
    asked = parser.parse_args(given)
    names = asked.settings or list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        sys.exit(f"unknown setting {unknown[0]!r}; expected some of {', '.join(SETTINGS)}")
    plan, record = read_plan(PLAN), json.loads(RUNS.read_text(encoding="utf-8"))
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        told = judge(plan, asked.out, name, record, asked.regime)
        print(said(told), flush=True)
        if not asked.regime:
            store.write_text(asked.out / f"{name.replace(' ', '-')}.json", json.dumps(told) + "\n")
    held = [asked.out / f"{name.replace(' ', '-')}.json" for name in SETTINGS]
    settings = [json.loads(path.read_text(encoding="utf-8")) for path in held if path.is_file()]
    if settings:
        whole = {**provenance("cpu"), "runs": RUNS.name, "settings": settings}
        store.write_text(RESULT, json.dumps(whole, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
