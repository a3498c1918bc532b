"""The tracker inside transformers' Trainer and everything built on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tiltmeter.tracking.rows import Row
from tiltmeter.tracking.tracker import Tracker

#: Row keys that go to the trainer's log.
LOGGED = (
    "safety_kl",
    "margin",
    "refusal_rate",
    "drift_energy",
    "drift_outside",
    "subspace_overlap",
    "commutator_defect",
    "weight_change",
)


class TrackerCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures at the tracker's steps, resumes with the trainer, logs, and can stop the run.

    One line puts it in: `trainer.add_callback(TrackerCallback(tracker, trainer.log))`. A callback is not told of its
    trainer, and reporters run before callbacks that users add, so the numbers reach TensorBoard, W&B and the rest only
    through the trainer's own `log`; without it they go to `rows.jsonl` alone.

    Attributes:
        tracker: made on the aligned model, before training.
    """

    def __init__(
        self, tracker: Tracker, log: Callable[[dict[str, float]], None] | None = None, *, stop: bool = False
    ) -> None:
        """Follow a trainer.

        Args:
            tracker: made on the model that the trainer trains.
            log: the trainer's own `log`.
            stop: end the run when the alarm fires.
        """
        self.tracker = tracker
        self._log, self._stop = log, stop
        self._losses: list[tuple[Tensor, bool]] = []
        self._batches: list[dict[str, Any]] = []
        self._tokens = 0
        self._rate = 0.0
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the trainer's step, and begin to listen to the model's losses."""
        self.tracker.resume(int(state.global_step))
        for path in Path(args.output_dir).glob("checkpoint-*"):
            number = path.name.partition("-")[2]
            if number.isdigit() and int(number) <= state.global_step:
                self.tracker.checkpoint(int(number), path)
        self._hook = kwargs["model"].register_forward_hook(self._listen, with_kwargs=True)
        self._forget()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the batch of the step before."""
        self._forget()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the learning rate of this step, before the schedule moves it on."""
        self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure when it is due, and whenever a checkpoint will be saved, so that each has its row."""
        step = int(state.global_step)
        self.tracker.observe(step, self._rate, self._tokens)
        final = control.should_training_stop or step >= state.max_steps
        if not (self.tracker.schedule.due(step) or control.should_save or final):
            return control
        row = self.tracker.measure(step, task_loss=self._task_loss(), final=final, batches=self._batches)
        self._report(row, control)
        if self._stop and self.tracker.breach is not None:
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take note of the checkpoint."""
        step = int(state.global_step)
        self.tracker.checkpoint(step, Path(args.output_dir) / f"checkpoint-{step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop listening."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _forget(self) -> None:
        self._losses.clear()
        self._batches.clear()
        self._tokens = 0

    def _listen(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss of every micro-batch, without waiting for the device."""
        if not module.training or not isinstance(output, dict):
            return
        loss, tokens = output.get("loss"), kwargs.get("input_ids")
        if loss is not None:
            self._losses.append((loss.detach(), kwargs.get("num_items_in_batch") is not None))
        if isinstance(tokens, Tensor):
            self._tokens += tokens.numel()
            if self.tracker.options.commutator_every:
                self._batches.append(kwargs)

    def _task_loss(self) -> float | None:
        """Mean loss of the step's batch: trainers divide by the whole batch's tokens, or average micro-batches."""
        if not self._losses:
            return None
        total = float(torch.stack([loss.float() for loss, _ in self._losses]).sum())
        return total if all(summed for _, summed in self._losses) else total / len(self._losses)

    def _report(self, row: Row, control: TrainerControl) -> None:
        if self._log is None:
            return
        told = {f"tiltmeter/{name}": float(row[name]) for name in LOGGED if row[name] is not None}
        wanted = control.should_log
        self._log(told)
        control.should_log = wanted  # logging clears it, and the trainer's own line of this step would be lost
