"""Validate: forecasts on trial. Assess, fine-tune for real, compare, over data sets, seeds and recipes."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltmeter import store
from tiltmeter.errors import InputError
from tiltmeter.geometry.forecast import mean_interval
from tiltmeter.jobs.assess import examine_subject
from tiltmeter.jobs.inputs import Opened, open_model, open_rows
from tiltmeter.jobs.predict import SafetySide, case_of, measure_safety_side, predict, risks_record
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Report, Subject, answer_safety, measure_subject, silent, with_lora
from tiltmeter.jobs.trial import Asked, Guarded, Seen, Trial, run_trial
from tiltmeter.jobs.tuning import sample_tuning
from tiltmeter.jobs.validation_plan import Cell, Plan
from tiltmeter.jobs.validation_record import summary_of
from tiltmeter.jobs.validation_scores import crossing
from tiltmeter.lm.conversation import prompts_of
from tiltmeter.lm.measurement import Measurement
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import spread
from tiltmeter.predictors.names import MEASURED

CELL_SCHEMA = "tiltmeter/cell/1"

#: Parts of the output folder.
CELLS, ASSESSMENTS = "cells", "assessments"


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


@dataclass(frozen=True)
class _Side:
    """The safety side under one regime, measured once."""

    subject: Subject
    asked: dict[str, Asked]
    dear: SafetySide | None
    taught: tuple[dict[str, Any], ...] = ()
    harmless: tuple[Any, ...] = ()


def validate(
    plan: Plan,
    out: Path,
    *,
    limit: int | None = None,
    runs: Path | None = None,
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
        report: told of every stage.
        finished: given the summary after every cell, for a page.

    Raises:
        InputError: the folder holds cells of another plan, or something in the plan cannot be used.

    Cost: per regime the safety side once, per regime and set one assessment, per cell one fine-tune.
    """
    cells = plan.cells()
    pending = [cell for cell in cells if not _done(out, plan, cell)]
    rows = {each.name: each.open() for each in plan.sets}
    halves = plan.split()
    done = [_read_cell(out, cell) for cell in cells if cell not in pending]
    sides: dict[str, _Side] = {}
    for number, cell in enumerate(pending if limit is None else pending[:limit]):
        prefix = f"{len(done) + 1} of {len(cells)}, {cell.name}: "

        def tell(stage: str, prefix: str = prefix) -> None:
            report(prefix + stage)

        if cell.regime.name not in sides:
            sides = {}  # one model in memory at a time
            gc.collect()
            sides[cell.regime.name] = _measure_side(plan, cell, halves, rows, tell, first=number == 0)
        side = sides[cell.regime.name]
        if cell.guard is not None:
            try:
                done.append(_guarded_cell(plan, out, cell, side, rows[cell.set.name], tell))
            except InputError as refusal:  # that a guard cannot protect a run is a result too
                done.append(_refused_cell(plan, out, cell, side, str(refusal)))
            summary = _write_summary(plan, out, done)
            if finished is not None:
                finished(summary)
            continue
        assessment, arrays = _assessment(plan, out, cell, side, rows[cell.set.name], tell)
        tell("fine-tuning")
        with store.new_folder(out / CELLS / cell.name) as folder:
            kept = None if runs is None else _kept_trial(runs, plan, cell, assessment["forecast"]["steps"])
            trial = kept or run_trial(
                plan.model,
                rows[cell.set.name],
                cell.recipe,
                side.asked,
                assessment["forecast"]["steps"],
                folder / "trainer",
                seed=plan.options.seed,
                answer_tokens=plan.options.response_tokens,
                max_tokens=plan.options.max_tokens,
                guarded=_guarded(plan, cell, side),
            )
            if trial.digest != assessment["model"]["digest"]:
                raise InputError(f"{plan.model} is not the model that was assessed; give another folder")
            record, held = _cell_record(plan, cell, assessment, arrays, trial)
            _remove(folder / "trainer")
            store.write_record(folder, record, held)
        done.append(record)
        summary = _write_summary(plan, out, done)
        if finished is not None:
            finished(summary)
    summary = _write_summary(plan, out, done)
    return Validation(summary, len(done), len(cells))


def _done(out: Path, plan: Plan, cell: Cell) -> bool:
    folder = out / CELLS / cell.name
    if not (folder / store.RECORD).is_file():
        return False
    record = store.read_record(folder)[0]
    if record.get("question") != plan.question(cell):
        raise InputError(
            f"{folder} belongs to another plan (model, prompts, set, recipe, options or predictors differ); "
            "give another output folder, or delete that cell"
        )
    return True


def _kept_trial(runs: Path, plan: Plan, cell: Cell, steps: Sequence[int]) -> Trial | None:
    """The run of a cell of an earlier validation, if it asked the same and was measured at these steps."""
    folder = runs / CELLS / cell.name
    if plan.guarding is not None or not _done(runs, plan, cell):
        return None
    record, arrays = store.read_record(folder)
    seen = {}
    for name in ("assessed", "held_out"):
        held = record["measured"][name]
        if not {*steps} <= {*held["steps"]}:
            return None
        told = {key: held["refusal_rate"][key] for key in ("value", "low", "high", "n", "unscored", "unit")}
        reason = record["reasons"].get(f"measured.{name}.refusal_rate.value")
        margin, kl = (arrays[f"{name}.{key}"] for key in ("margin", "kl"))
        seen[name] = Seen(tuple(held["steps"]), margin, kl, Measurement(**told, reason=reason))
    measured, cost = record["measured"], record["cost"]
    return Trial(seen, measured["length"], cost["trial_seconds"], record["model"]["digest"])


def _read_cell(out: Path, cell: Cell) -> dict[str, Any]:
    return store.read_record(out / CELLS / cell.name)[0]


def _write_summary(plan: Plan, out: Path, cells: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summary_of(plan, cells)
    store.check_values(summary)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    store.write_text(out / "summary.json", text)
    return summary


def _measure_side(
    plan: Plan,
    cell: Cell,
    halves: tuple[RowSet, RowSet, RowSet],
    rows: Mapping[str, RowSet],
    report: Report,
    *,
    first: bool,
) -> _Side:
    report("loading the model")
    options, recipe = plan.options, cell.regime.recipe
    opened = with_lora(open_model(plan.model), recipe.lora, options.seed)
    with undisturbed(opened.loaded.model):
        if first:  # data that cannot be used should end the job before the long part
            for held in rows.values():
                sample_tuning(opened.loaded, held, recipe, options)
        subject = measure_subject(opened, halves[0], recipe.lora, options, report=report)
        unseen = replace(options, max_safety=plan.held_out)
        held_out = answer_safety(opened, halves[1], unseen, subject.forward.passes)
        dear = measure_safety_side(subject) if set(cell.regime.predictors) - set(MEASURED) else None
    asked = {
        "assessed": Asked(subject.safety, _prompts(opened, halves[0])),
        "held_out": Asked(held_out, _prompts(opened, halves[1])),
    }
    harmless: tuple[Any, ...] = ()
    if plan.guarding is not None and plan.guarding.harmless is not None:
        held_rows = open_rows(plan.guarding.harmless).rows
        chosen = [held_rows[i] for i in spread(len(held_rows), plan.guarding.harmless_rows)]
        harmless = tuple(prompts_of(chosen, opened.loaded.tokenizer))
    return _Side(subject, asked, dear, halves[2].rows, harmless)


def _guarded(plan: Plan, cell: Cell, side: _Side) -> Guarded | None:
    return None if plan.guarding is None else Guarded(cell.guard, side.taught, side.harmless)


def _guarded_cell(plan: Plan, out: Path, cell: Cell, side: _Side, rows: RowSet, report: Report) -> dict[str, Any]:
    """Run a cell under its guard; nothing is foretold for it."""
    report("fine-tuning under the guard")
    with store.new_folder(out / CELLS / cell.name) as folder:
        trial = run_trial(
            plan.model,
            rows,
            cell.recipe,
            side.asked,
            cell.recipe.clock().grid(plan.options.grid),
            folder / "trainer",
            seed=plan.options.seed,
            answer_tokens=plan.options.response_tokens,
            max_tokens=plan.options.max_tokens,
            guarded=_guarded(plan, cell, side),
        )
        why = Reasons()
        record = {
            **_header(plan, cell, side, trial.digest),
            **_guard_of(plan, cell, trial, why),
            "measured": _measured_of(plan, trial, why),
            "cost": {"trial_seconds": trial.seconds},
            "reasons": dict(why),
        }
        _remove(folder / "trainer")
        held = {f"{name}.{key}": getattr(seen, key) for name, seen in trial.seen.items() for key in ("margin", "kl")}
        store.write_record(folder, record, held)
    return record


def _refused_cell(plan: Plan, out: Path, cell: Cell, side: _Side, reason: str) -> dict[str, Any]:
    """A cell whose guard stopped the run, with what it said."""
    guard = cell.guard
    record = {
        **_header(plan, cell, side, side.subject.loaded.digest),
        "guard": {"name": "none" if guard is None else guard.name},
        "refused": reason,
        "reasons": {},
    }
    with store.new_folder(out / CELLS / cell.name) as folder:
        store.write_record(folder, record, {})
    return record


def _header(plan: Plan, cell: Cell, side: _Side, digest: str) -> dict[str, Any]:
    return {
        "schema": CELL_SCHEMA,
        **provenance(str(side.subject.loaded.model.device)),
        "question": plan.question(cell),
        "name": cell.name,
        "model": {"name": plan.model, "digest": digest},
        "set": cell.set.name,
        "regime": cell.regime.name,
        "seed": cell.seed,
    }


def _guard_of(plan: Plan, cell: Cell, trial: Trial, why: Reasons) -> dict[str, Any]:
    """The guard of a cell, and what guards are compared by; nothing where the plan has no guards."""
    if trial.compared is None:
        return {}
    held, guard = trial.compared, cell.guard
    out: dict[str, Any] = {"guard": {"name": "none" if guard is None else guard.name, "strength": held.strength}}
    over = held.over_refusals
    none = "the plan names no harmless set" if over is None else over.reason or "the judge could tell no answer"
    out["compared"] = {
        "task_loss": {"before": held.task_loss[0], "after": held.task_loss[1], "unit": "nats per token"},
        "over_refusal_rate": why.number("compared.over_refusal_rate", None if over is None else over.value, none),
        "step_seconds": held.step_seconds,
        "extra_memory_gb": held.extra_gb,
        "did": [{"step": step, "what": what, "why": reason} for step, what, reason in held.did],
    }
    return out


def _measured_of(plan: Plan, trial: Trial, why: Reasons) -> dict[str, Any]:
    level = plan.options.level
    seen = {name: _measured(each, level, f"measured.{name}", why) for name, each in trial.seen.items()}
    return {**seen, "length": trial.length}


def _prompts(opened: Opened, rows: RowSet) -> tuple[Any, ...]:
    return tuple(prompts_of(list(rows.rows), opened.loaded.tokenizer))


def _assessment(
    plan: Plan, out: Path, cell: Cell, side: _Side, rows: RowSet, report: Report
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The assessment of a regime and set with its risks; read back where another seed made it."""
    folder = out / ASSESSMENTS / cell.assessment
    recipe = cell.regime.recipe
    question = plan.question(replace(cell, seed=recipe.seed))
    if (folder / store.RECORD).is_file():
        record, arrays = store.read_record(folder)
        if record.get("question") == question:
            return record, arrays
        raise InputError(f"{folder} belongs to another plan; give another output folder")
    with undisturbed(side.subject.loaded.model), store.new_folder(folder) as part:
        result, tuning, found = examine_subject(side.subject, rows, recipe, plan.options, report=report)
        report("predictors")
        case = case_of(side.subject, tuning, recipe, plan.options, found, side.dear)
        risks = predict(case, cell.regime.predictors)
        why = Reasons(result.record["reasons"])
        record = {**result.record, "question": question, "predictors": risks_record(risks, "predictors", why)}
        record["reasons"] = dict(why)
        store.write_record(part, record, result.arrays)
    return record, result.arrays


def _cell_record(
    plan: Plan, cell: Cell, assessment: Mapping[str, Any], arrays: Mapping[str, Tensor], trial: Trial
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    why = Reasons({k: v for k, v in assessment["reasons"].items() if k.startswith(("predictors.", "recipe."))})
    forecast = assessment["forecast"]
    anchor = arrays["anchor_margin"].double()[None]
    told = crossing([0, *forecast["steps"]], torch.cat([anchor, arrays["curved.margin"].double()]))
    predicted: dict[str, Any] = {"steps": forecast["steps"], "horizon_steps": forecast["horizon_steps"]}
    for key in ("margin_change", "safety_kl"):
        predicted[key] = {end: forecast[key][end] for end in ("value", "low", "high", "unit")}
        _known(predicted[key], f"predicted.{key}", why)
    predicted["collapse_step"] = why.number("predicted.collapse_step", told, "no collapse is foretold")
    measured = _measured_of(plan, trial, why)
    recipe = cell.recipe.as_dict()
    if recipe["lora"] is None:
        why["recipe.lora"] = "full fine-tuning"
    record = {
        "schema": CELL_SCHEMA,
        **provenance(assessment["model"]["device"]),
        "question": plan.question(cell),
        "name": cell.name,
        "model": {"name": plan.model, "digest": trial.digest},
        "safety": {"name": plan.safety, "assessed": plan.assessed, "held_out": plan.held_out},
        "set": cell.set.name,
        "tuning": {"digest": assessment["tuning"]["digest"], "rows": assessment["tuning"]["rows_read"]},
        "regime": cell.regime.name,
        "seed": cell.seed,
        "recipe": recipe,
        "predicted": predicted,
        "predictors": assessment["predictors"],
        **_guard_of(plan, cell, trial, why),
        "measured": measured,
        "cost": {
            "assessment_seconds": assessment["cost"]["seconds"],
            "assessment_passes": assessment["cost"]["fb_equivalents"] * assessment["cost"]["data_tokens"]
            / max(1, assessment["tuning"]["tokens"]),
            "sample_tokens": assessment["tuning"]["tokens"],
            "sample_rows": assessment["tuning"]["used"],
            "trial_seconds": trial.seconds,
        },
        "reasons": dict(why),
    }  # fmt: skip
    held = {f"{name}.{key}": getattr(seen, key) for name, seen in trial.seen.items() for key in ("margin", "kl")}
    return record, held


def _known(curve: Mapping[str, Any], path: str, why: Reasons) -> None:
    for end in ("value", "low", "high"):
        for place, value in enumerate(curve[end]):
            if value is None:
                why[f"{path}.{end}.{place}"] = "too few prompts or tuning batches"


def _measured(seen: Seen, level: float, path: str, why: Reasons) -> dict[str, Any]:
    out: dict[str, Any] = {"steps": list(seen.steps)}
    anchor = seen.margin[0]
    for key, values, unit in (
        ("margin_change", seen.margin - anchor, "nats"),
        ("safety_kl", seen.kl, "nats per token"),
    ):
        low, high = mean_interval(values.double(), level)
        ends = {"value": values.double().mean(-1), "low": low, "high": high}
        out[key] = {"unit": unit}
        for end, points in ends.items():
            flat = "one prompt, or no scatter between prompts"
            out[key][end] = [why.number(f"{path}.{key}.{end}.{i}", x, flat) for i, x in enumerate(points.tolist())]
        # standard error of the mean over prompts: what another draw of prompts would change
        error = values.double().std(-1) / math.sqrt(values.shape[-1])
        out[key]["error"] = error.tolist()
    out["margin_anchor"] = float(anchor.double().mean())
    out["below_zero"] = (seen.margin < 0).double().mean(-1).tolist()
    out["collapse_step"] = why.number(f"{path}.collapse_step", crossing(seen.steps, seen.margin), "no collapse")
    refusals = seen.refusals
    out["refusal_rate"] = {
        "value": why.number(f"{path}.refusal_rate.value", refusals.value, "the judge could tell no answer"),
        "low": why.number(f"{path}.refusal_rate.low", refusals.low, "the judge could tell no answer"),
        "high": why.number(f"{path}.refusal_rate.high", refusals.high, "the judge could tell no answer"),
        "n": refusals.n,
        "unscored": refusals.unscored,
        "unit": "share",
    }
    return out


def _remove(folder: Path) -> None:
    """Delete what the trainer left; its folder holds no result."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    if folder.exists():
        folder.rmdir()
