"""One real fine-tune of a validation: transformers' Trainer, and what becomes of margin, KL and refusals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tiltmeter.geometry.forecast import Standing
from tiltmeter.geometry.objective import Objective
from tiltmeter.guards.callback import GuardCallback
from tiltmeter.jobs.guarding import GuardOptions, attach_guard
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import with_lora
from tiltmeter.jobs.training import arguments_of, build_trainer, train
from tiltmeter.lm.conversation import encode
from tiltmeter.lm.divergence import divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.generation import generate
from tiltmeter.lm.judge import Answer, judge_refusal
from tiltmeter.lm.kl_and_margin import reads_packed, standing
from tiltmeter.lm.measurement import Measurement
from tiltmeter.lm.model import Loaded, trainable, undisturbed
from tiltmeter.lm.objective import likelihood_objective, negative_margin_objective
from tiltmeter.lm.paired import Change, paired_change
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import SafetySet, refusal_rate, spread

#: Rows of the tuning set that the task loss is measured on.
TASK_ROWS = 16


@dataclass(frozen=True)
class Asked:
    """Prompts that a run is measured on.

    Attributes:
        safety: in tokens, with the aligned model's answers.
        prompts: the same as text or conversations, for answers.
        before: what the aligned model does with each.
    """

    safety: SafetySet
    prompts: tuple[Any, ...]
    before: tuple[Answer, ...]


@dataclass(frozen=True)
class Refusals:
    """How often the same prompts are refused before and after a run.

    Attributes:
        after: share of refusals among the answers after the run.
        before: the same share of the aligned model's; None where no answer could be judged.
        change: after - before, prompt by prompt, share; None, as `before`, for a run that an older version measured.
    """

    after: Measurement
    before: float | None = None
    change: Change | None = None


@dataclass(frozen=True)
class Seen:
    """What was measured on one set of prompts; row 0 is the aligned model.

    Attributes:
        steps: [s], ascending from 0.
        margin: [s, m], nats.
        kl: [s, m], nats per token.
        refusals: among the answers before and after the run.
    """

    steps: tuple[int, ...]
    margin: Tensor
    kl: Tensor
    refusals: Refusals


@dataclass(frozen=True)
class Guarded:
    """What a run under a guard, or the run without that it is compared with, needs besides.

    Attributes:
        guard: the guard, or None.
        rows: safety prompts that the guard learns from.
        harmless: prompts that should not be refused, as text or conversations; empty to leave that out.
        before: what the aligned model does with each of these.
    """

    guard: GuardOptions | None
    rows: tuple[dict[str, Any], ...]
    harmless: tuple[Any, ...] = ()
    before: tuple[Answer, ...] = ()


#: How `Compared.step_seconds` is taken; cells of a plan with guards that were timed otherwise are not compared.
TIMING = "mean after the first step; CPU time on a CPU, wall time on a GPU"


@dataclass(frozen=True)
class Compared:
    """What guards are compared by.

    Attributes:
        task_loss: before and after, on a sample of the rows that were learned, nats per token.
        over_refusals: of the harmless prompts before and after the run, or None where there are none.
        step_seconds: time of an optimiser step, the guard's part included, see `TIMING`; a mean, because what a guard
            does now and then would not be seen in a median.
        extra_gb: the most that the guard held on to between two events.
        strength: the guard's strength, for `budget` its budget in nats; 0 without a guard.
        did: what the guard did: step, what, why.
    """

    strength: float
    task_loss: tuple[float, float]
    over_refusals: Refusals | None
    step_seconds: float
    extra_gb: float
    did: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class Trial:
    """A finished run.

    Attributes:
        seen: by name of the prompts.
        length: norm of the weights' change, parameter units.
        seconds: wall time of training and measuring.
        digest: of the model.
        compared: what guards are compared by, where that was asked for.
    """

    seen: dict[str, Seen]
    length: float
    seconds: float
    digest: str
    compared: Compared | None = None


@dataclass
class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Times optimiser steps; put it before callbacks that measure, whose time is not the step's.

    Attributes:
        now: CPU time on a CPU, so that other work on the machine does not count; wall time on a GPU.
        seconds: of every step.
        begin: when the step under way began.
    """

    now: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    begin: float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step begins."""
        self.begin = self.now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It has ended."""
        self.seconds.append(self.now() - self.begin)


@dataclass
class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures at given steps of a trainer, and leaves no trace in the model.

    Attributes:
        model: that is trained.
        standings: name -> safety KL and margin of the model as it stands.
        at: steps to measure at.
        rows: name -> step -> margin [m] and KL [m].
    """

    model: Any
    standings: dict[str, Standing]
    at: frozenset[int]
    rows: dict[str, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def measure(self, step: int) -> None:
        """Measure now. Cost: a forward pass over answers and openings."""
        with undisturbed(self.model):
            for name, standing in self.standings.items():
                kl, margin = standing(None)
                self.rows.setdefault(name, {})[step] = (margin, kl)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when it is due."""
        if int(state.global_step) in self.at:
            self.measure(int(state.global_step))


def run_trial(
    model: str,
    tuning: RowSet,
    recipe: Recipe,
    asked: dict[str, Asked],
    steps: Sequence[int],
    folder: Path,
    *,
    seed: int,
    answer_tokens: int,
    max_tokens: int,
    level: float = 0.9,
    guarded: Guarded | None = None,
) -> Trial:
    """Fine-tune for real and measure at the forecast's own steps.

    Args:
        model: the aligned model's name.
        tuning: all rows; the trainer's sampler orders them by the recipe's seed.
        recipe: what is run.
        asked: prompts by name.
        steps: when to measure; the last step of the recipe is measured in any case.
        folder: where the trainer may write.
        seed: of LoRA's start, as in the forecast.
        answer_tokens: length of the answers after the run.
        max_tokens: tokens per micro-batch of the measurements.
        level: of the intervals of refusals.
        guarded: a guard, and what guards are compared by.

    Raises:
        InputError, UnsupportedModel: the guard cannot protect this run.

    Cost: the run, a forward pass over all prompts' answers and openings per step, answers to all prompts at the end.
    """
    begin = time.perf_counter()
    opened = with_lora(open_model(model), recipe.lora, seed)
    loaded = opened.loaded
    forward = Forward(loaded.model, trainable(loaded.model))
    start = [p.detach().clone() for p in forward.parameters.values()]
    pad = loaded.tokenizer.pad_token_id
    standings: dict[str, Standing] = {}
    with undisturbed(loaded.model):
        for name, each in asked.items():
            held = each.safety
            divergence = divergence_objective(forward, held.responses, pad, max_tokens)
            openings = negative_margin_objective(forward, held.refusals, held.compliances, pad, max_tokens)
            packed = reads_packed(forward, held, pad)
            standings[name] = standing(divergence, openings, held, pad, packed=packed)
    encoded = encode(tuning.rows, loaded.tokenizer, min(recipe.max_length, loaded.context))
    fields = arguments_of(recipe, {"save_strategy": "no"}, folder, loaded.model.device)
    trainer = build_trainer(loaded, encoded.examples, recipe, fields)
    watch = Watch(loaded.model, standings, frozenset({*steps, recipe.steps}))
    watch.measure(0)
    clock = StepClock(time.process_time if loaded.model.device.type == "cpu" else time.perf_counter)
    callbacks: list[TrainerCallback] = [clock, watch]
    sample = [encoded.examples[i] for i in spread(len(encoded.examples), TASK_ROWS)]
    task = likelihood_objective(forward, sample, pad, max_tokens, per="token") if guarded else None
    before = 0.0 if task is None else _mean_loss(loaded.model, task)
    guard: GuardCallback | None = None
    if guarded is not None and guarded.guard is not None:
        guard = attach_guard(guarded.guard, opened, guarded.rows, encoded.examples, trainer, recipe.seed)
        callbacks.insert(1, guard)
    train(trainer, callbacks, None)
    ends = zip(forward.parameters.values(), start, strict=True)
    length = sum(float((now.detach() - was).double().square().sum()) for now, was in ends) ** 0.5
    seen = {}
    for name, each in asked.items():
        rate = _refusals(loaded, each.prompts, each.before, answer_tokens, level)
        rows = watch.rows[name]
        margin, kl = (torch.stack([rows[step][part] for step in rows]) for part in (0, 1))
        seen[name] = Seen(tuple(rows), margin, kl, rate)
    compared = None
    if guarded is not None and task is not None:
        over = None
        if guarded.harmless:
            over = _refusals(loaded, guarded.harmless, guarded.before, answer_tokens, level)
        losses = before, _mean_loss(loaded.model, task)
        strength = 0.0
        if guard is not None and guarded.guard is not None:
            strength = guarded.guard.budget_kl if guarded.guard.name == "budget" else guard.guard.strength
        compared = Compared(
            strength, losses, over, statistics.fmean(clock.seconds[1:] or clock.seconds), _held_gb(guard), _done(guard)
        )
    return Trial(seen, length, time.perf_counter() - begin, loaded.digest, compared)


def judged(loaded: Loaded, prompts: Sequence[Any], answer_tokens: int) -> tuple[Answer, ...]:
    """What a model does with each prompt. Cost: an answer to each, greedy."""
    return tuple(judge_refusal(text) for text in generate(loaded, list(prompts), answer_tokens))


def _refusals(
    loaded: Loaded, prompts: Sequence[Any], before: Sequence[Answer], answer_tokens: int, level: float
) -> Refusals:
    after = judged(loaded, prompts, answer_tokens)
    change = paired_change(_as_shares(before), _as_shares(after), "share", level=level, share=True)
    return Refusals(refusal_rate(after, level), refusal_rate(before).value, change)


def _as_shares(answers: Sequence[Answer]) -> list[float | None]:
    """1 for a refusal, 0 for an answer, None for what the judge could not tell."""
    return [None if each is Answer.UNDETERMINED else float(each is Answer.REFUSED) for each in answers]


def _mean_loss(model: Any, task: Objective) -> float:
    with undisturbed(model):
        return float(task.losses().mean())


def _held_gb(guard: GuardCallback | None) -> float:
    """Tensors that a guard keeps between steps, at the most, GB."""
    return 0.0 if guard is None or guard.session is None else guard.session.most / 1e9


def _done(guard: GuardCallback | None) -> tuple[tuple[int, str, str], ...]:
    return () if guard is None else tuple((each.step, each.what, each.why) for each in guard.log)
