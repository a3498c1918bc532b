"""Finetune: the real run, watched. transformers' Trainer or TRL's SFTTrainer, with a tracker and an alarm."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from tiltmeter import store
from tiltmeter.errors import InputError, OutputExists
from tiltmeter.guards.callback import GuardCallback
from tiltmeter.guards.session import REST as GUARD_STATE
from tiltmeter.jobs.checkpoints import DIVIDED_OPTIMIZER, OPTIMIZER, check_checkpoint, check_optimizer, last_checkpoint
from tiltmeter.jobs.guarding import GuardOptions, attach_guard, prompts_for_guard
from tiltmeter.jobs.inputs import Opened, open_model, open_rows
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Report, silent, with_lora
from tiltmeter.jobs.track import (
    SCHEMA,
    Track,
    check_same_run,
    comparison_of,
    curves_of,
    exponent_of,
    path_of,
    read_assessment,
)
from tiltmeter.jobs.training import (
    KeepDividedOptimizer,
    KeepOptimizer,
    StopTogether,
    TrainerName,
    arguments_of,
    build_trainer,
    check_precision,
    train,
)
from tiltmeter.lm.conversation import Encoded, encode
from tiltmeter.lm.four_bit import count, dtype_name
from tiltmeter.lm.processes import everywhere, is_main, join, together
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.sharding import fulfilled, is_divided, read_whole_states
from tiltmeter.tracking.alarm import Budgets
from tiltmeter.tracking.anchor import TrackerOptions
from tiltmeter.tracking.callback import Listener, TrackerCallback
from tiltmeter.tracking.tracker import ROWS, Tracker

TRACK, MODEL = "track", "model"

#: Level of the intervals.
LEVEL = 0.9


@dataclass(frozen=True)
class Run:
    """Everything one fine-tune is made of, before it starts.

    Attributes:
        opened: the aligned model with the trained parameters marked.
        safety: safety rows.
        tuning: the tuning set.
        encoded: the same in tokens.
        recipe: what is run.
        seed: of LoRA's start.
    """

    opened: Opened
    safety: RowSet
    tuning: RowSet
    encoded: Encoded
    recipe: Recipe
    seed: int

    def about(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one."""
        settings = {key: value for key, value in self.recipe.as_dict().items() if value is not None}
        lora = {key: value for key, value in (settings.pop("lora", None) or {}).items() if value is not None}
        return {
            "model": self.opened.loaded.digest,
            "tuning": self.tuning.digest,
            "seed": self.seed,
            "recipe": store.digest_json([settings, lora]),
        }


def finetune(
    model: str,
    safety: str,
    tuning: str,
    recipe: Recipe,
    out: Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    options: TrackerOptions | None = None,
    budgets: Budgets | None = None,
    stop_on_budget: bool = False,
    assessment: Path | None = None,
    resume: bool = False,
    trainer: TrainerName = "transformers",
    callbacks: Sequence[TrainerCallback] = (),
    guard: GuardOptions | None = None,
    seed: int = 0,
    refusal_opening: str | None = None,
    compliance_opening: str | None = None,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Track:
    """Fine-tune a model for real, and measure what becomes of its safety.

    Args:
        model: hub id, folder, GGUF file, adapter folder or `demo:` name of the aligned model.
        safety: safety prompts: file, hub id or `demo:` name.
        tuning: what the model is tuned on.
        recipe: what is run; the same that `assess` reads.
        out: folder of the run: `checkpoint-N`, `track` (rows while it runs), `model` and the record at its end.
        arguments: the recipe file's own fields; what the recipe does not hold goes to the trainer as it is.
        options: how much to measure.
        budgets: limits of the alarm; without any it watches for the loss of a third of the margin, at least 1 nat.
        stop_on_budget: end the run when the alarm fires.
        assessment: folder of an assessment of this very run, to lay beside it.
        resume: go on from the last whole checkpoint in `out`.
        trainer: transformers' Trainer, or TRL's SFTTrainer; both take the same steps.
        callbacks: further callbacks; they come before the tracker's, which measures what they left.
        guard: keeps safety while training; it learns from safety prompts that the tracker does not measure, where
            there are enough.
        seed: of LoRA's start, as in `assess`.
        refusal_opening: how a refusal of this model begins; by default the usual one of its kind.
        compliance_opening: how a compliant answer begins.
        adapter: an adapter folder to merge into `model` first.
        dtype: of the weights.
        device: "auto", "cpu", "cuda", ...
        trust_remote_code: run code that a hub model brings along.
        report: told of every stage.

    Started in several processes (`accelerate launch`, torchrun), it trains with the trainer's own data parallelism; the
    main process alone measures and writes, and the others come back with an empty record. Where they divide the weights
    (FSDP2), all of them measure, since a weight is gathered by all.

    Returns: the track, also written to `out`; the record comes last.

    Raises:
        OutputExists: `out` holds a run and `resume` was not given, or the run is finished.
        InputError: model, data, recipe or assessment cannot be used, or `out` holds another run.
        UnsupportedModel: the guard cannot protect this model, as it is divided among processes.
        ModelError: a checkpoint to resume from is damaged or does not fit.

    Cost: that of the run, plus `record["overhead"]`.
    """
    join(device)
    together(lambda: _check_folder(out, resume))
    foretold = None if assessment is None else read_assessment(assessment)
    report("loading the model")
    opened = open_model(model, adapter=adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    opened = replace(
        opened,
        refusal_opening=refusal_opening or opened.refusal_opening,
        compliance_opening=compliance_opening or opened.compliance_opening,
    )
    opened = with_lora(opened, recipe.lora, seed)
    parts = is_divided(opened.loaded.model)
    loaded, rows = opened.loaded, open_rows(tuning)
    encoded = encode(rows.rows, loaded.tokenizer, min(recipe.max_length, loaded.context))
    run = Run(opened, open_rows(safety), rows, encoded, recipe, seed)
    if foretold is not None:
        check_same_run(foretold, _facts(run, Reasons()))
    fields = arguments_of(recipe, arguments or {}, out, loaded.model.device)
    check_precision(fields, loaded.model.device)
    keeps = parts and not fields.get("save_only_model")
    if parts:
        fields["save_only_model"] = True  # the trainer does not save more there
    keeper = DIVIDED_OPTIMIZER if parts and recipe.lora is None else OPTIMIZER
    with fulfilled(loaded.model):
        started = build_trainer(loaded, encoded.examples, recipe, fields, kind=trainer)
    needs = [*([] if guard is None else [GUARD_STATE]), *([keeper] if parts else [])]
    checkpoint = last_checkpoint(out, needs) if resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint, loaded.model)
        check_optimizer(checkpoint, keeper)
    report("measuring the aligned model")
    trackers: list[Tracker] = []

    def track_run(folder: Path) -> None:
        tracker = Tracker(
            loaded.model,
            loaded.tokenizer,
            run.safety.rows,
            folder,
            options=_options(options or TrackerOptions(), opened, foretold),
            budgets=budgets,
            about=run.about(),
            resume=resume,
        )
        trackers.append(tracker)

    if parts:
        scratch = None if is_main() else TemporaryDirectory(prefix="tiltmeter-")  # what nobody will read
        folder = out / TRACK if scratch is None else Path(scratch.name) / TRACK

        def begin() -> None:
            """All must do the same, and so begin with the same rows."""
            if scratch is None or not resume:
                return
            if not (out / TRACK).is_dir():
                raise InputError(f"this process does not see {out}: to resume, all need the run's folder")
            shutil.copytree(out / TRACK, folder)

        everywhere(begin)  # before the main one writes
        track_run(folder)
    else:
        together(lambda: track_run(out / TRACK))
    guarding = None if guard is None else _guarded(guard, run, started, options or TrackerOptions())
    report("training")
    watchers: list[Listener] = [TrackerCallback(tracker, started.log, stop=stop_on_budget) for tracker in trackers]
    watchers = watchers or [Listener()]
    # where all measure, they must know before they do whether one of them wants to stop or to save
    agreed = [StopTogether()] if parts else []
    kept: list[TrainerCallback] = [KeepOptimizer()] if keeps and keeper == OPTIMIZER else []
    if keeper == DIVIDED_OPTIMIZER:
        read_whole_states(loaded.model)
        kept = [KeepDividedOptimizer(checkpoint, write=keeps)]
    train(started, [*callbacks, *agreed, *kept, *([] if guarding is None else [guarding[0]]), *watchers], checkpoint)
    report("writing the result")
    started.save_model(str(out / MODEL))
    if not is_main():
        return Track({}, {}, False)
    [tracker] = trackers
    given = budgets is not None and budgets.given
    track = _track(run, tracker, foretold, started, trainer, given=given)
    if guard is None or guarding is None:
        track.record["guard"] = None
        track.record["reasons"]["guard"] = "no guard was given"
    else:
        log = [{"step": entry.step, "what": entry.what, "why": entry.why} for entry in guarding[0].log]
        strength = guarding[0].guard.strength
        settings = {"budget_kl": guard.budget_kl, "strength": strength, "answer_tokens": guard.answer_tokens}
        settings["opening_tokens"] = guard.opening
        track.record["guard"] = {"name": guard.name, **settings, "prompts_shared": guarding[1], "log": log}
    store.write_record(out, track.record, track.arrays)
    return track


def _guarded(guard: GuardOptions, run: Run, trainer: Any, options: TrackerOptions) -> tuple[GuardCallback, bool]:
    """The guard's callback, and whether its prompts are also the tracker's."""
    rows, shared = prompts_for_guard(run.safety.rows, options.max_safety)
    callback = attach_guard(guard, run.opened, rows, run.encoded.examples, trainer, run.seed)
    return callback, shared


def assessed_options(options: TrackerOptions, assessment: Mapping[str, Any]) -> TrackerOptions:
    """Options that measure the prompts an assessment measured, at the steps it speaks of."""
    safety = assessment["safety"]
    length = re.search(r"at most (\d+) tokens", safety["responses"])
    return replace(
        options,
        max_safety=safety["used"] + sum(safety["skipped"].values()),
        response_tokens=int(length[1]) if length else options.response_tokens,
        also=tuple(sorted({*options.also, *assessment["forecast"]["steps"]})),
    )


def _options(options: TrackerOptions, opened: Opened, foretold: Mapping[str, Any] | None) -> TrackerOptions:
    options = replace(options, refusal_opening=opened.refusal_opening, compliance_opening=opened.compliance_opening)
    return options if foretold is None else assessed_options(options, foretold)


def _check_folder(out: Path, resume: bool) -> None:
    if (out / store.RECORD).exists():
        raise OutputExists(f"{out} holds a finished run; results are never overwritten. Give another folder.")
    if not resume and out.exists() and any(out.iterdir()):
        raise OutputExists(f"{out} is not empty. Go on with --resume, or give another folder.")
    if resume and not (out / TRACK / ROWS).exists():
        raise InputError(f"there is no run to resume in {out}; leave --resume out to begin one")


def _facts(run: Run, why: Reasons) -> dict[str, Any]:
    """Model, data and recipe in the words of an assessment."""
    loaded = run.opened.loaded
    sizes = [p.numel() for p in loaded.model.parameters() if p.requires_grad]
    recipe = run.recipe.as_dict()
    if recipe["lora"] is None:
        why["recipe.lora"] = "full fine-tuning"
    elif recipe["lora"]["targets"] is None:
        why["recipe.lora.targets"] = "peft's own choice for this architecture"
    return {
        "model": {
            "name": loaded.name,
            "digest": loaded.digest,
            "parameters": sum(count(p) for p in loaded.model.parameters()) - (sum(sizes) if recipe["lora"] else 0),
            "dtype": dtype_name(loaded.model),
            "device": str(loaded.model.device),
        },
        "space": {"kind": recipe["regime"], "size": sum(sizes)},
        "safety": {"name": run.safety.name, "digest": run.safety.digest},
        "tuning": {
            "name": run.tuning.name,
            "digest": run.tuning.digest,
            "rows_read": run.encoded.rows_read,
            "used": len(run.encoded.examples),
            "truncated": run.encoded.truncated,
            "skipped": run.encoded.skipped,
        },
        "recipe": recipe,
    }


def _track(
    run: Run, tracker: Tracker, foretold: Mapping[str, Any] | None, trainer: Any, kind: TrainerName, *, given: bool
) -> Track:
    why, rows = Reasons(), tracker.rows
    facts = _facts(run, why)
    held = tracker.anchor.safety
    facts["safety"] |= {
        "rows_read": held.rows_read,
        "used": held.m,
        "truncated": held.truncated,
        "skipped": held.skipped,
        "responses": held.source,
        "refusal_opening": run.opened.refusal_opening,
        "compliance_opening": run.opened.compliance_opening,
    }
    curves = curves_of(rows, LEVEL, why)
    path, arrays = path_of(tracker, why)
    spent = tracker.overhead()
    untimed = "no step was timed"
    overhead = {key: why.number(f"overhead.{key}", value, untimed) for key, value in spent.items()}
    comparison = None if foretold is None else comparison_of(foretold, curves, why)
    if comparison is None:
        why["comparison"] = "no assessment was given"
    done = int(trainer.state.global_step)
    record = {
        "schema": SCHEMA,
        **provenance(str(run.opened.loaded.model.device)),
        "seed": run.seed,
        "level": LEVEL,
        **facts,
        "run": {"trainer": kind, "steps": done, "stopped_early": done < run.recipe.steps},
        "alarm": _alarm(tracker, given, why),
        "curves": curves,
        "exponent": exponent_of(rows, LEVEL, why),
        "path": path,
        "comparison": comparison,
        "overhead": {**overhead, "anchor_seconds": tracker.anchor_seconds, "every": tracker.schedule.every},
        "reasons": dict(why),
    }
    arrays["steps"] = torch.tensor(curves["steps"])
    for key in ("safety_kl", "margin"):
        arrays[f"per_prompt.{key}"] = torch.tensor([row["per_prompt"][key] for row in rows], dtype=torch.float64)
    return Track(record, arrays, given and tracker.breach is not None)


def _alarm(tracker: Tracker, given: bool, why: Reasons) -> dict[str, Any]:
    breach = tracker.breach
    out: dict[str, Any] = {"budgets": tracker.budgets.as_dict(), "given": given, "fired": breach is not None}
    silent = "the run stayed inside the budget"
    out["step"] = why.number("alarm.step", None if breach is None else breach.step, silent)
    out["last_inside"] = why.number("alarm.last_inside", None if breach is None else breach.last_inside, silent)
    for key in ("step", "last_inside"):
        out[key] = None if out[key] is None else int(out[key])
    out["checkpoint"] = None if breach is None or breach.checkpoint is None else breach.checkpoint.name
    if out["checkpoint"] is None:
        why["alarm.checkpoint"] = silent if breach is None else "no checkpoint was measured inside the budget"
    out["text"] = "inside the budget at every measured step" if breach is None else breach.text
    return out
