"""The tracker: measures a model against the aligned one it began as, row by row, in its own folder.

It needs no trainer: call `after_step` once per optimiser step. `callback.TrackerCallback` does so for transformers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tiltmeter import store
from tiltmeter.errors import DegenerateError, InputError, OutputExists
from tiltmeter.geometry.sensitivity import Sensitivity
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.four_bit import count
from tiltmeter.lm.gathered import parts_together
from tiltmeter.lm.generation import generate
from tiltmeter.lm.judge import judge_refusal
from tiltmeter.lm.kl_and_margin import reads_packed, standing
from tiltmeter.lm.measurement import Measurement
from tiltmeter.lm.model import trainable, undisturbed, wrap
from tiltmeter.lm.objective import likelihood_objective, negative_margin_objective
from tiltmeter.lm.rows import digest_of, read_rows
from tiltmeter.lm.safety import refusal_rate
from tiltmeter.lm.sharding import is_divided
from tiltmeter.tracking.alarm import Breach, Budgets, check_budgets, default_budgets, find_breach
from tiltmeter.tracking.anchor import Anchor, TrackerOptions, measure_anchor, measure_subspace, usable_prompts
from tiltmeter.tracking.anchor_store import FOLDER, read_anchor, write_anchor
from tiltmeter.tracking.drift import measure_drift, subspace, subspace_overlap
from tiltmeter.tracking.measured import Measured, row_of
from tiltmeter.tracking.probe import Commutator, batch_examples, measure_commutator
from tiltmeter.tracking.rows import Row, RowFile
from tiltmeter.tracking.schedule import UNKNOWN, Schedule, interval

ROWS, RATES, TIMES, SETTINGS, SKETCHES = "rows.jsonl", "rates.jsonl", "times.jsonl", "settings.json", "sketches"

#: What a sketch of all parameters costs, in tokens of a forward pass.
SKETCH_TOKENS = 300

logger = logging.getLogger("tiltmeter")


class Tracker:
    """Measures safety KL, margin, drift and task loss of a model in training, and raises the alarm.

    The model must be the aligned one, with the parameters to be trained marked by `requires_grad`, when the tracker is
    made. Everything goes to `folder`: the anchor, `rows.jsonl`, learning rates, times, sketches of the weights. A
    measurement leaves no trace in the model, its gradients, or the random state.

    Attributes:
        folder: of the run's measurements.
        anchor: what is measured against.
        rows: measured rows; row 0 is the anchor.
        budgets: limits of the alarm.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        safety: str | Path | Sequence[Mapping[str, Any]],
        folder: str | Path,
        *,
        options: TrackerOptions | None = None,
        budgets: Budgets | None = None,
        about: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """Measure the anchor, or read back that of a run to be resumed.

        Args:
            model: a causal language model of transformers or PEFT.
            tokenizer: its tokenizer.
            safety: safety prompts, as rows, or a file or hub id of such.
            folder: for the measurements; must be new unless `resume`.
            options: how much to measure.
            budgets: limits; by default a third of the aligned model's margin, at least 1 nat.
            about: JSON values that say what the run is; a resumed run must have the same.
            resume: go on in a folder that is there already; then call `resume(step)` before the next step.

        Raises:
            OutputExists: the folder holds a run and `resume` was not given.
            InputError: the folder belongs to another run, or the aligned model does not keep the budgets.
            DataError: the safety rows, or what the folder holds, cannot be used.
        """
        self.folder = Path(folder)
        self.options = options or TrackerOptions()
        self.loaded = wrap(model, tokenizer)
        safety_rows = list(read_rows(safety).rows if isinstance(safety, (str, Path)) else safety)
        self.forward = Forward(model, trainable(model, parts=True))
        if self.forward.whole.size == 0:
            raise InputError("the model has no trainable parameters; mark those to be trained with requires_grad first")
        self._prompts = usable_prompts(self.loaded, safety_rows, self.options)
        told = {"space": self.forward.whole.digest, "safety": digest_of(safety_rows), **(about or {})}
        begin = time.perf_counter()
        self.anchor = self._open_anchor(safety_rows, told, resume)
        pad = self.loaded.tokenizer.pad_token_id
        divergence = self.anchor.divergence(self.forward, pad, self.options.max_tokens)
        safety_set = self.anchor.safety
        self._margin = negative_margin_objective(
            self.forward, safety_set.refusals, safety_set.compliances, pad, self.options.max_tokens
        )
        with undisturbed(model):
            packed = reads_packed(self.forward, safety_set, pad)
        self._standing = standing(divergence, self._margin, safety_set, pad, packed=packed)
        self._sensitivity: Sensitivity | None = subspace(self.anchor, self.forward, pad, self.options)
        self._rows = RowFile(self.folder / ROWS)
        self._rates = RowFile(self.folder / RATES, durable=False)
        self._times = RowFile(self.folder / TIMES, durable=False)
        self._checkpoints: dict[int, Path] = {}
        self._told: int | None = None
        self.schedule = self._open_schedule()
        self.budgets = budgets or Budgets()
        if not self.rows:
            self.measure(0)
        if not self.budgets.given:
            self.budgets = default_budgets(self.rows[0]["margin"])
        self.anchor_seconds = time.perf_counter() - begin
        check_budgets(self.budgets, self.rows[0])
        self._last = time.perf_counter()

    @property
    def rows(self) -> list[Row]:
        """Measured rows."""
        return self._rows.rows

    @property
    def breach(self) -> Breach | None:
        """The first row over budget, with the last checkpoint inside; None while there is none."""
        there = {step: path for step, path in self._checkpoints.items() if path.exists()}
        return find_breach(self.rows, self.budgets, there)

    def after_step(
        self,
        step: int,
        learning_rate: float,
        *,
        task_loss: float | None = None,
        tokens: int | None = None,
        batches: Sequence[Mapping[str, Any]] = (),
    ) -> Row | None:
        """Tell the tracker of an optimiser step; it measures when it is due.

        Args:
            step: 1 for the first.
            learning_rate: the one that this step was taken with.
            task_loss: of the batch this step was taken on, before the step, nats per token.
            tokens: of that batch; the first step's decide the interval where none was given.
            batches: that batch's micro-batches (`input_ids`, `labels`, `attention_mask`), for the commutator probe.

        Returns: the row, if one was measured.
        """
        self.observe(step, learning_rate, tokens)
        return self.measure(step, task_loss=task_loss, batches=batches) if self.schedule.due(step) else None

    def observe(self, step: int, learning_rate: float, tokens: int | None = None) -> None:
        """Take note of a step without measuring."""
        self._rates.add({"step": step, "rate": float(learning_rate)})
        if step == 1 and tokens:
            self._settle(tokens)

    def measure(
        self,
        step: int,
        *,
        task_loss: float | None = None,
        final: bool = False,
        batches: Sequence[Mapping[str, Any]] = (),
    ) -> Row:
        """Measure now and append a row.

        Args:
            step: optimiser steps taken so far.
            task_loss: see `after_step`.
            final: whether the run ends here; quantities left out for their cost are then measured.
            batches: see `after_step`.

        Cost: a forward pass over answers and openings, one read of the weights; see `drift` for large spaces.
        """
        begin = time.perf_counter()
        training = begin - self._last if self.rows else 0.0
        model = self.forward.model
        with undisturbed(model), parts_together(self.forward.parameters):
            kl, margin = self._standing(None)
            dear = final or (step & (step - 1)) == 0
            drift = measure_drift(self.anchor, self.forward, self._sensitivity, self.options, dear=dear)
            overlap, no_overlap = self._turned(step)
            rate = self._refusals(step)
            turn, no_turn = self._commutator(step, batches)
        rates = [seen["rate"] for seen in self._rates.rows]
        found = Measured(kl, margin, drift, overlap, no_overlap, rate, task_loss, turn, no_turn)
        row = row_of(step, found, rates)
        if drift.sketch is not None:
            self._save_sketch(step, drift.sketch)
        self._rows.add(row)
        self._times.add({"step": step, "measuring": time.perf_counter() - begin, "training": training})
        self._warn()
        self._last = time.perf_counter()
        return self.rows[-1]

    def resume(self, step: int) -> None:
        """Go on from a checkpoint: rows after it are dropped, since the run will come by them again."""
        for file in (self._rows, self._rates, self._times):
            file.resume(step)
        for path in (self.folder / SKETCHES).glob("*.safetensors"):
            if int(path.stem) > step:
                path.unlink()
        self._checkpoints = {at: path for at, path in self._checkpoints.items() if at <= step}
        self._told = None
        self._warn()
        self._last = time.perf_counter()

    def checkpoint(self, step: int, path: str | Path) -> None:
        """Take note of a saved checkpoint, so that the alarm can name it."""
        self._checkpoints[step] = Path(path)

    def overhead(self) -> dict[str, float | None]:
        """Seconds spent measuring and training so far, and the shares of it; None before anything was measured.

        `share` is over the whole run so far, the dense start included; `share_at_interval` is what measuring costs
        from `every` steps on: a median measurement against `every` mean steps.
        """
        done = [row for row in self._times.rows if row["step"] > 0]
        measuring, training = sum(row["measuring"] for row in done), sum(row["training"] for row in done)
        steps = done[-1]["step"] if done else 0
        out: dict[str, float | None] = {"measuring_seconds": measuring, "training_seconds": training}
        out["share"] = measuring / training if training > 0 else None
        middle = sorted(row["measuring"] for row in done)[len(done) // 2] if done else 0.0
        out["share_at_interval"] = middle / (self.schedule.every * training / steps) if training > 0 else None
        return out

    def _open_anchor(self, rows: list[Any], about: Mapping[str, Any], resume: bool) -> Anchor:
        there = (self.folder / FOLDER).exists()
        if there and not resume:
            raise OutputExists(f"{self.folder} holds a run already. Resume it, or give another folder.")
        if there:
            return read_anchor(self.folder, self.options, about, self.forward.parameters)
        with undisturbed(self.forward.model):
            anchor = measure_anchor(self.loaded, rows, self.options)
        write_anchor(self.folder, anchor, self.options, about, self.forward.parameters)
        return anchor

    def _open_schedule(self) -> Schedule:
        settings, also = self.folder / SETTINGS, frozenset(self.options.also)
        if self.options.every is not None:
            return Schedule(self.options.every, also)
        if settings.exists():
            return Schedule(int(json.loads(settings.read_text(encoding="utf-8"))["every"]), also)
        return Schedule(UNKNOWN, also)

    def _settle(self, tokens: int) -> None:
        """Choose the interval from what a step and a measurement cost, once; a resumed run reads it back."""
        if self.options.every is not None or (self.folder / SETTINGS).exists():
            return
        whole = sum(count(p) for p in self.forward.model.parameters())
        share = self.forward.whole.size / whole
        work = self._standing.work + SKETCH_TOKENS * share
        self.schedule = Schedule(interval(work, tokens, frozen=share < 0.5), frozenset(self.options.also))
        store.write_text(self.folder / SETTINGS, json.dumps({"every": self.schedule.every}))

    def _turned(self, step: int) -> tuple[float | None, str]:
        every = self.options.refresh_every
        if not every or step == 0 or len(self.rows) % every:
            return None, "the subspace was not refreshed at this step"
        if not self.anchor.columns:
            return None, self.anchor.no_subspace or "the directions of so large a space are not kept"
        pad = self.loaded.tokenizer.pad_token_id
        _, _, now, reason = measure_subspace(self.forward, self.anchor.safety.responses, pad, self.options)
        return (subspace_overlap(self.anchor.columns, tuple(now)), "") if now else (None, reason or "no subspace")

    def _refusals(self, step: int) -> Measurement | None:
        every = self.options.refusal_every
        if step == 0 and self.anchor.safety.source.startswith("generated"):
            return self.anchor.safety.refusal_rate()
        if not every or len(self.rows) % every:
            return None
        answers = generate(self.loaded, self._prompts, self.options.response_tokens)
        return refusal_rate([judge_refusal(answer) for answer in answers])

    def _commutator(self, step: int, batches: Sequence[Mapping[str, Any]]) -> tuple[Commutator | None, str]:
        every = self.options.commutator_every
        if not every or step == 0 or len(self.rows) % every:
            return None, "not measured at this step, since it costs four gradients"
        if is_divided(self.forward.model):
            return None, "every process has other rows, and where weights are divided they can only work on the same"
        examples, reason = batch_examples(batches)
        if not examples:
            return None, reason
        pad = self.loaded.tokenizer.pad_token_id
        task = likelihood_objective(self.forward, examples, pad, self.options.max_tokens, per="token")
        basis = None if self._sensitivity is None else self._sensitivity.basis
        try:
            return measure_commutator(self._margin, task, basis=basis), ""
        except DegenerateError as error:
            return None, str(error)

    def _save_sketch(self, step: int, sketch: torch.Tensor) -> None:
        folder = self.folder / SKETCHES
        folder.mkdir(exist_ok=True)
        part = folder / f".{_name(step)}.part"
        save_file({"sketch": sketch}, part)
        part.replace(folder / _name(step))

    def _warn(self) -> None:
        breach = self.breach
        if breach is not None and breach.step != self._told:
            self._told = breach.step
            logger.warning("%s", breach.text)


def _name(step: int) -> str:
    return f"{step:09d}.safetensors"
