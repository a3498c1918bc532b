"""The tracker inside transformers' Trainer and everything built on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tiltmeter.lm.processes import processes, summed
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


class Listener(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Hears the loss of every batch. Where several processes train, each hears its own rows, and they add them up.

    The main process has a `TrackerCallback`; every other one needs this by itself, in the same place.
    """

    def __init__(self) -> None:
        """Hear nothing yet."""
        self._losses: list[tuple[Tensor, bool]] = []
        self._batches: list[dict[str, Any]] = []
        self._tokens = 0
        self._keep_batches = False
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to listen to the model's losses."""
        if self._hook is not None:  # a run before was broken off
            self._hook.remove()
        self._hook = kwargs["model"].register_forward_hook(self._listen, with_kwargs=True)
        self._forget()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the batch of the step before."""
        self._forget()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Tell the main process what was heard."""
        self._heard()
        return control

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
            # a copy, because the trainer multiplies what the model returned by the number of processes, in place
            self._losses.append((loss.detach().clone(), kwargs.get("num_items_in_batch") is not None))
        if isinstance(tokens, Tensor):
            self._tokens += tokens.numel()
            if self._keep_batches:
                self._batches.append(kwargs)

    def _heard(self) -> tuple[float | None, int]:
        """Mean loss of the step's batch and its tokens, over all processes.

        Trainers divide by the whole batch's tokens, or average micro-batches.
        """
        total = float(torch.stack([loss.float() for loss, _ in self._losses]).sum()) if self._losses else 0.0
        averaged = sum(not summed_up for _, summed_up in self._losses)
        own = torch.tensor([total, float(averaged), float(len(self._losses)), float(self._tokens)], dtype=torch.float64)
        total, averaged, count, tokens = (own if processes() == 1 else summed(lambda: own, (4,))).tolist()
        if not count:
            return None, int(tokens)
        return (total / count if averaged else total), int(tokens)


class TrackerCallback(Listener):
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
        super().__init__()
        self.tracker = tracker
        self._log, self._stop = log, stop
        self._rate = 0.0
        self._loss: float | None = None
        self._measured: int | None = None
        self._keep_batches = bool(tracker.options.commutator_every)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the trainer's step, and begin to listen to the model's losses."""
        self.tracker.resume(int(state.global_step))
        self._measured = int(state.global_step)
        for path in Path(args.output_dir).glob("checkpoint-*"):
            number = path.name.partition("-")[2]
            if number.isdigit() and int(number) <= state.global_step:
                self.tracker.checkpoint(int(number), path)
        super().on_train_begin(args, state, control, **kwargs)

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
        self._loss, tokens = self._heard() if processes() > 1 else (None, self._tokens)
        self.tracker.observe(step, self._rate, tokens)
        final = control.should_training_stop or step >= state.max_steps
        if self.tracker.schedule.due(step) or control.should_save or final:
            self._measure(step, control, final=final)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take note of the checkpoint; one that was decided on after the step (each epoch, the best) is measured."""
        step = int(state.global_step)
        if step and self._measured != step:
            self._measure(step, control, final=False)
        self.tracker.checkpoint(step, Path(args.output_dir) / f"checkpoint-{step}")

    def _measure(self, step: int, control: TrainerControl, *, final: bool) -> None:
        if processes() == 1:  # reading the loss waits for the device, so only where it is needed
            self._loss = self._heard()[0]
        row = self.tracker.measure(step, task_loss=self._loss, final=final, batches=self._batches)
        self._measured = step
        self._report(row, control)
        if self._stop and self.tracker.breach is not None:
            control.should_training_stop = True

    def _report(self, row: Row, control: TrainerControl) -> None:
        if self._log is None:
            return
        told = {f"tiltmeter/{name}": float(row[name]) for name in LOGGED if row[name] is not None}
        wanted = control.should_log
        self._log(told)
        control.should_log = wanted  # logging clears it, and the trainer's own line of this step would be lost
