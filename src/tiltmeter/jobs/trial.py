"""One real fine-tune of a validation: transformers' Trainer, and what becomes of margin, KL and refusals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tiltmeter.geometry.objective import Objective
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import with_lora
from tiltmeter.jobs.training import arguments_of, build_trainer, train
from tiltmeter.lm.conversation import encode
from tiltmeter.lm.divergence import divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.generation import generate
from tiltmeter.lm.judge import judge_refusal
from tiltmeter.lm.measurement import Measurement
from tiltmeter.lm.model import trainable, undisturbed
from tiltmeter.lm.objective import negative_margin_objective
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import SafetySet, refusal_rate


@dataclass(frozen=True)
class Asked:
    """Prompts that a run is measured on.

    Attributes:
        safety: in tokens, with the aligned model's answers.
        prompts: the same as text or conversations, for answers.
    """

    safety: SafetySet
    prompts: tuple[Any, ...]


@dataclass(frozen=True)
class Seen:
    """What was measured on one set of prompts; row 0 is the aligned model.

    Attributes:
        steps: [s], ascending from 0.
        margin: [s, m], nats.
        kl: [s, m], nats per token.
        refusals: share of refusals among the answers after the run.
    """

    steps: tuple[int, ...]
    margin: Tensor
    kl: Tensor
    refusals: Measurement


@dataclass(frozen=True)
class Trial:
    """A finished run.

    Attributes:
        seen: by name of the prompts.
        length: norm of the weights' change, parameter units.
        seconds: wall time of training and measuring.
        digest: of the model.
    """

    seen: dict[str, Seen]
    length: float
    seconds: float
    digest: str


@dataclass
class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures at given steps of a trainer, and leaves no trace in the model.

    Attributes:
        model: that is trained.
        pairs: name -> safety KL and minus the margin, on the model as it stands.
        at: steps to measure at.
        rows: name -> step -> margin [m] and KL [m].
    """

    model: Any
    pairs: dict[str, tuple[Objective, Objective]]
    at: frozenset[int]
    rows: dict[str, dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def measure(self, step: int) -> None:
        """Measure now. Cost: a forward pass over answers and openings."""
        with undisturbed(self.model):
            for name, (divergence, negative) in self.pairs.items():
                self.rows.setdefault(name, {})[step] = (-negative.losses(), divergence.losses())

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

    Cost: the run, a forward pass over all prompts' answers and openings per step, answers to all prompts at the end.
    """
    begin = time.perf_counter()
    opened = with_lora(open_model(model), recipe.lora, seed)
    loaded = opened.loaded
    forward = Forward(loaded.model, trainable(loaded.model))
    start = [p.detach().clone() for p in forward.parameters.values()]
    pad = loaded.tokenizer.pad_token_id
    pairs: dict[str, tuple[Objective, Objective]] = {}
    with undisturbed(loaded.model):
        for name, each in asked.items():
            held = each.safety
            pairs[name] = (
                divergence_objective(forward, held.responses, pad, max_tokens),
                negative_margin_objective(forward, held.refusals, held.compliances, pad, max_tokens),
            )
    encoded = encode(tuning.rows, loaded.tokenizer, min(recipe.max_length, loaded.context))
    fields = arguments_of(recipe, {"save_strategy": "no"}, folder, loaded.model.device)
    trainer = build_trainer(loaded, encoded.examples, recipe, fields)
    watch = Watch(loaded.model, pairs, frozenset({*steps, recipe.steps}))
    watch.measure(0)
    train(trainer, [watch], None)
    ends = zip(forward.parameters.values(), start, strict=True)
    length = sum(float((now.detach() - was).double().square().sum()) for now, was in ends) ** 0.5
    seen = {}
    for name, each in asked.items():
        texts = generate(loaded, list(each.prompts), answer_tokens)
        rate = refusal_rate([judge_refusal(text) for text in texts])
        rows = watch.rows[name]
        margin, kl = (torch.stack([rows[step][part] for step in rows]) for part in (0, 1))
        seen[name] = Seen(tuple(rows), margin, kl, rate)
    return Trial(seen, length, time.perf_counter() - begin, loaded.digest)
