"""Runs cells of a validation: the safety side once per regime, an assessment per set, a fine-tune per cell."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltmeter import store
from tiltmeter.errors import InputError
from tiltmeter.jobs.assess import examine_subject
from tiltmeter.jobs.inputs import Opened, open_model, open_rows
from tiltmeter.jobs.predict import SafetySide, case_of, measure_safety_side, predict, risks_record
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Report, Subject, answer_safety, measure_subject, silent, with_lora
from tiltmeter.jobs.trial import Asked, Guarded, Refusals, Seen, Trial, judged, run_trial
from tiltmeter.jobs.tuning import sample_tuning
from tiltmeter.jobs.validation_cell import arrays_of, foretold_cell, guarded_cell, refusal_change_of, refused_cell
from tiltmeter.jobs.validation_plan import Cell, Plan
from tiltmeter.lm.conversation import prompts_of
from tiltmeter.lm.judge import Answer
from tiltmeter.lm.measurement import Measurement
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import spread
from tiltmeter.predictors.names import MEASURED

#: Parts of the output folder.
CELLS, ASSESSMENTS = "cells", "assessments"


@dataclass(frozen=True)
class Side:
    """The safety side under one regime, measured once.

    Attributes:
        subject: the aligned model with everything that no tuning set changes.
        asked: prompts that runs are measured on, by name.
        dear: what only some predictors need, or None.
        taught: prompts that guards learn from.
        harmless: prompts that should not be refused.
        before: what the aligned model does with each of these.
    """

    subject: Subject
    asked: dict[str, Asked]
    dear: SafetySide | None
    taught: tuple[dict[str, Any], ...] = ()
    harmless: tuple[Any, ...] = ()
    before: tuple[Answer, ...] = ()

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.subject.loaded.model.device)


@dataclass
class Runner:
    """Runs cells into one folder; holds one regime's model at a time.

    Attributes:
        plan: what the cells are of.
        out: the validation's folder.
        runs: folder of an earlier validation of the plan, whose runs are taken as they were measured, or None.
    """

    plan: Plan
    out: Path
    runs: Path | None = None
    _rows: dict[str, RowSet] = field(default_factory=dict)
    _halves: tuple[RowSet, RowSet, RowSet] | None = None
    _side: tuple[str, Side] | None = None

    def open(self) -> None:
        """Read all rows, so that what cannot be read ends the job before anything is measured.

        Raises:
            DataError: a source cannot be read, or the safety set has too few rows.
        """
        self._rows = {each.name: each.open() for each in self.plan.sets}
        self._halves = self.plan.split()

    def run(self, cell: Cell, report: Report = silent) -> dict[str, Any]:
        """Run a cell and store it; its folder is there whole or not at all.

        Raises:
            InputError: something in the plan cannot be used, or the folder holds parts of another plan.

        Cost: the safety side if the regime is new, the assessment if no other seed made it, the fine-tune.
        """
        if self._halves is None:
            self.open()
        side = self._side_of(cell, report)
        if cell.guard is not None:
            try:
                return self._guarded(cell, side, report)
            except InputError as refusal:  # that a guard cannot protect a run is a result too
                record = refused_cell(self.plan, cell, side.subject.loaded.digest, side.device, str(refusal))
                with store.new_folder(self.out / CELLS / cell.name) as folder:
                    store.write_record(folder, record, {})
                return record
        assessment, arrays = self._assessment(cell, side, report)
        report("fine-tuning")
        with store.new_folder(self.out / CELLS / cell.name) as folder:
            steps = assessment["forecast"]["steps"]
            kept = None if self.runs is None else _kept_trial(self.runs, self.plan, cell, steps)
            trial = kept or self._trial(cell, side, steps, folder)
            if trial.digest != assessment["model"]["digest"]:
                raise InputError(f"{self.plan.model} is not the model that was assessed; give another folder")
            record = foretold_cell(self.plan, cell, assessment, arrays, trial)
            store.write_record(folder, record, arrays_of(trial))
        return record

    def _guarded(self, cell: Cell, side: Side, report: Report) -> dict[str, Any]:
        """Run a cell under its guard; nothing is foretold for it."""
        report("fine-tuning under the guard")
        with store.new_folder(self.out / CELLS / cell.name) as folder:
            trial = self._trial(cell, side, cell.recipe.clock().grid(self.plan.options.grid), folder)
            record = guarded_cell(self.plan, cell, trial, side.device)
            store.write_record(folder, record, arrays_of(trial))
        return record

    def _trial(self, cell: Cell, side: Side, steps: Sequence[int], folder: Path) -> Trial:
        plan = self.plan
        trial = run_trial(
            plan.model,
            self._rows[cell.set.name],
            cell.recipe,
            side.asked,
            steps,
            folder / "trainer",
            seed=plan.options.seed,
            answer_tokens=plan.options.response_tokens,
            max_tokens=plan.options.max_tokens,
            level=plan.options.level,
            guarded=None if plan.guarding is None else Guarded(cell.guard, side.taught, side.harmless, side.before),
        )
        _remove(folder / "trainer")
        return trial

    def _side_of(self, cell: Cell, report: Report) -> Side:
        if self._side is None or self._side[0] != cell.regime.name:
            first = self._side is None
            self._side = None  # one model in memory at a time
            gc.collect()
            self._side = cell.regime.name, self._measure_side(cell, report, first)
        return self._side[1]

    def _measure_side(self, cell: Cell, report: Report, first: bool) -> Side:
        report("loading the model")
        assert self._halves is not None
        plan, (assessed, held_out, taught) = self.plan, self._halves
        options, recipe = plan.options, cell.regime.recipe
        opened = with_lora(open_model(plan.model), recipe.lora, options.seed)
        with undisturbed(opened.loaded.model):
            if first:  # data that cannot be used should end the job before the long part
                for held in self._rows.values():
                    sample_tuning(opened.loaded, held, recipe, options)
            subject = measure_subject(opened, assessed, recipe.lora, options, report=report)
            unseen = replace(options, max_safety=plan.held_out)
            answered = answer_safety(opened, held_out, unseen, subject.forward.passes)
            dear = measure_safety_side(subject) if set(cell.regime.predictors) - set(MEASURED) else None
        report("refusals of the aligned model")
        asked = {
            name: Asked(held, prompts, judged(opened.loaded, prompts, options.response_tokens))
            for name, held, prompts in (
                ("assessed", subject.safety, _prompts(opened, assessed)),
                ("held_out", answered, _prompts(opened, held_out)),
            )
        }
        harmless: tuple[Any, ...] = ()
        if plan.guarding is not None and plan.guarding.harmless is not None:
            held_rows = open_rows(plan.guarding.harmless).rows
            chosen = [held_rows[i] for i in spread(len(held_rows), plan.guarding.harmless_rows)]
            harmless = tuple(prompts_of(chosen, opened.loaded.tokenizer))
        before = judged(opened.loaded, harmless, options.response_tokens)
        return Side(subject, asked, dear, taught.rows, harmless, before)

    def _assessment(self, cell: Cell, side: Side, report: Report) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The assessment of a regime and set with its risks; read back where another seed made it."""
        plan, recipe = self.plan, cell.regime.recipe
        folder = self.out / ASSESSMENTS / cell.assessment
        question = plan.question(replace(cell, seed=recipe.seed))
        if (folder / store.RECORD).is_file():
            record, arrays = store.read_record(folder)
            if record.get("question") == question:
                return record, arrays
            raise InputError(f"{folder} belongs to another plan; give another output folder")
        rows = self._rows[cell.set.name]
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


def is_finished(out: Path, plan: Plan, cell: Cell) -> bool:
    """Whether the cell is there.

    Raises:
        InputError: one of another plan is.
    """
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


def read_cell(out: Path, cell: Cell) -> dict[str, Any]:
    """Record of a finished cell."""
    return store.read_record(out / CELLS / cell.name)[0]


def _kept_trial(runs: Path, plan: Plan, cell: Cell, steps: Sequence[int]) -> Trial | None:
    """The run of a cell of an earlier validation, if it asked the same and was measured at these steps."""
    folder = runs / CELLS / cell.name
    if plan.guarding is not None or not (folder / store.RECORD).is_file():
        return None
    record, arrays = store.read_record(folder)
    if record.get("run") != plan.run(cell):
        raise InputError(f"{folder} is a run of another plan (model, prompts, set, recipe or answers differ)")
    seen = {}
    for name in ("assessed", "held_out"):
        held = record["measured"][name]
        if not {*steps} <= {*held["steps"]}:
            return None
        told = {key: held["refusal_rate"][key] for key in ("value", "low", "high", "n", "unscored", "unit")}
        reason = record["reasons"].get(f"measured.{name}.refusal_rate.value")
        margin, kl = (arrays[f"{name}.{key}"] for key in ("margin", "kl"))
        refusals = Refusals(Measurement(**told, reason=reason), *refusal_change_of(record, f"measured.{name}"))
        seen[name] = Seen(tuple(held["steps"]), margin, kl, refusals)
    measured, cost = record["measured"], record["cost"]
    return Trial(seen, measured["length"], cost["trial_seconds"], record["model"]["digest"])


def _prompts(opened: Opened, rows: RowSet) -> tuple[Any, ...]:
    return tuple(prompts_of(list(rows.rows), opened.loaded.tokenizer))


def _remove(folder: Path) -> None:
    """Delete what the trainer left; its folder holds no result."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    if folder.exists():
        folder.rmdir()
