"""A guard as a callback of transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tiltmeter.errors import InputError, UnsupportedModel
from tiltmeter.guards.budget import CurvatureBudget
from tiltmeter.guards.contract import Decision, Guard
from tiltmeter.guards.ema import AverageWeights
from tiltmeter.guards.safe_lora import SafeLora
from tiltmeter.guards.safety import SafetySource
from tiltmeter.guards.session import Session
from tiltmeter.guards.trainee import Trainee
from tiltmeter.lm.model import trainable

#: Guards that settle what the trained model is after the last step.
SETTLING = AverageWeights, CurvatureBudget, SafeLora

#: Builds the safety source from the model as it is before training.
Source = Callable[[Any], SafetySource]


class GuardCallback(TrainerCallback):  # type: ignore[misc]
    """Guards a fine-tune: `Trainer(..., callbacks=[GuardCallback(guard, source)])`.

    The guard's state goes into every checkpoint, and a run that is resumed without it is refused. After training,
    `log` holds what the guard did and why.
    """

    def __init__(self, guard: Guard, source: Source | SafetySource, seed: int = 0) -> None:
        """Prepare a guard.

        Args:
            guard: the method.
            source: the safety source, or what builds it from the model when training begins; of a model that is
                trained again, the anchor stays what it was at first. To be able to resume, give a source that was built
                from the very model that is trained before its checkpoint is loaded: a checkpoint is not the anchor any
                more.
            seed: for guards that draw examples.
        """
        self.guard = guard
        self._build = source if callable(source) else None
        self.source = None if callable(source) else source
        self._watched: Any = None
        self.seed = seed
        self.session: Session | None = None

    @property
    def log(self) -> list[Decision]:
        """What the guard did."""
        return self.guard.memory.log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start the guard, or go on where it left off.

        Raises:
            InputError: it cannot protect this run; nothing has been trained yet.
        """
        if self.guard.strength == 0:
            return
        _check_arguments(args, self.guard)
        model = given["model"]
        resumed = Path(args.output_dir) / f"checkpoint-{state.global_step}" if state.global_step else None
        if self._build is not None and (self.source is None or model is not self._watched):
            if resumed is not None:
                raise InputError(
                    f"training resumes at step {state.global_step}, so this model is not the anchor any more: give "
                    "GuardCallback a safety source that was built from the aligned model, not a function"
                )
            self.source, self._watched = self._build(model), model
        assert self.source is not None
        steps = state.max_steps if state.max_steps > 0 else None
        trainee = Trainee(
            trainable(model, parts=True), given["optimizer"], self.source, state.global_step, self.seed, steps
        )
        self.session = Session(self.guard, trainee)
        self.session.begin(resumed)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Gradients are accumulated and clipped."""
        if self.session is not None:
            self.session.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The optimiser has moved."""
        if self.session is not None:
            self.session.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Put the guard's state into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.session is not None:
            self.session.save_in(folder, main=state.is_world_process_zero)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Let the guard finish, before the model is saved a last time."""
        if self.session is not None:
            self.session.end()


def _check_arguments(args: TrainingArguments, guard: Guard) -> None:
    """Refuse what would leave the model unprotected in silence."""
    if args.fp16 and not args.max_grad_norm:
        raise UnsupportedModel(
            "with fp16 and no gradient clipping, gradients are still multiplied by the loss scale when a guard sees "
            "them: set max_grad_norm (1.0, say), or train in bf16"
        )
    if args.deepspeed or getattr(args, "fsdp", None):
        raise UnsupportedModel(
            "a guard is built from the aligned model before a trainer divides it among processes, as DeepSpeed and "
            "TrainingArguments(fsdp=...) do. Use tiltmeter finetune under accelerate launch --use_fsdp "
            "--fsdp_version 2, which divides the model first, or train on one device or with plain data parallelism"
        )
    if args.load_best_model_at_end and isinstance(guard, SETTLING):
        raise UnsupportedModel(
            f"load_best_model_at_end would put back a checkpoint after {type(guard).__name__} has finished with the "
            "last step's weights, and so undo what it did or never looked at: leave it out, or choose a guard that "
            "acts on gradients alone (safegrad, replay, ewc, ...)"
        )
