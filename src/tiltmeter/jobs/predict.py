"""All predictors on one assessment: what was measured already is handed on, so that most of them cost nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.jobs.measure import Findings
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Options, Subject
from tiltmeter.jobs.tuning import Tuning
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.hidden import answer_states
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.objective import likelihood_objective
from tiltmeter.lm.template import UNSUPERVISED
from tiltmeter.predictors.canary import run_canary
from tiltmeter.predictors.contract import FEWER, REHEARSED, Case, Measured, Risk, States, gradient_of
from tiltmeter.predictors.names import MEASURED, PREDICTORS


@dataclass(frozen=True)
class SafetySide:
    """What the dearer predictors need of the safety set, measured once for any number of tuning sets.

    Attributes:
        anchors: gradients [n] of the likelihood loss of the compliant and of the refusing openings.
        alignment: hidden states at the end of the safety prompts, [m, width].
        refusals: mean states over the refusal openings, [m, width].
        compliances: mean states over the compliance openings, [m, width].
    """

    anchors: tuple[Tensor, Tensor]
    alignment: Tensor
    refusals: Tensor
    compliances: Tensor


def measure_safety_side(subject: Subject) -> SafetySide:
    """Measure it. Cost: one gradient and one forward pass over both openings, one forward pass over the prompts."""
    safety, loaded, pad = subject.safety, subject.loaded, subject.loaded.tokenizer.pad_token_id
    compliant, refusing = (
        likelihood_objective(subject.forward, examples, pad, subject.max_tokens, per="response").gradient()
        for examples in (safety.compliances, safety.refusals)
    )
    with undisturbed(loaded.model):
        alignment = answer_states(loaded, [_prompt_end(example) for example in safety.refusals])
        refusals, compliances = (answer_states(loaded, e) for e in (safety.refusals, safety.compliances))
    return SafetySide((compliant, refusing), alignment, refusals, compliances)


def _prompt_end(example: Example) -> Example:
    """The prompt of an example, its last token marked in the place of supervision."""
    begin = next(place for place, label in enumerate(example.labels) if label != UNSUPERVISED)
    end = max(1, begin)  # running text has no prompt: its first token stands for it
    labels = (UNSUPERVISED,) * (end - 1) + (example.tokens[end - 1],)
    return Example(example.tokens[:end], labels, example.row)


def measured_of(found: Findings) -> Measured:
    """What predictors may use of an assessment's findings."""
    noise = found.noise
    share = torch.where(noise.covered > 0, noise.drawn / noise.covered.square().clamp_min(1e-300), 0.0)
    factors = {name: noise.energy_factor() for name in found.values}
    factors[REHEARSED] = found.rehearsed.energy_factor()
    paths = dict(found.values)
    if found.check is not None:
        paths[FEWER], factors[FEWER] = found.check.values, found.check.noise.energy_factor()
    return Measured(
        paths,
        found.overlap_groups,
        found.no_overlap,
        found.coupling,
        found.no_coupling,
        found.tuning_loss,
        found.gradient_norm,
        found.projected,
        None if found.random_walk is None else found.random_walk[0],
        found.covered,
        sum(found.look_rows) / found.look_rows[0],
        noise.margin_scatter(),
        noise.speed / 2 * (share + noise.sampled).sqrt(),
        *found.rehearsed.path_scatter(),
        *found.rehearsed.apart_scatter(found.rehearsed if found.check is None else found.check.noise),
        factors,
    )


def case_of(
    subject: Subject, tuning: Tuning, recipe: Recipe, options: Options, found: Findings, side: SafetySide | None
) -> Case:
    """The case that predictors see. Cost: with `side`, one gradient of the sample, a canary, one forward pass."""
    case = Case(
        subject.divergence,
        subject.negative_margin,
        subject.anchor_margin,
        subject.margin_gradient,
        subject.sensitivity,
        subject.no_sensitivity,
        tuning.objective,
        tuning.batches,
        recipe.metric,
        recipe.clock(),
        measured_of(found),
        recipe.max_grad_norm or None,
        options.seed,
        no_states="hidden states were not asked for",
    )
    if side is None:
        return case
    states = States(*_task_states(subject, tuning, side))
    case = replace(case, gradient=gradient_of(case), anchors=side.anchors, states=states, no_states=None)
    return replace(case, canary=run_canary(case))


def _task_states(subject: Subject, tuning: Tuning, side: SafetySide) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    examples, loaded = tuning.encoded.examples, subject.loaded
    with undisturbed(loaded.model):
        task = answer_states(loaded, [_prompt_end(example) for example in examples])
        answers = answer_states(loaded, examples)
    return task, side.alignment, answers, side.refusals, side.compliances


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Predictors by name; "all" and "measured" stand for groups.

    Raises:
        InputError: a name is unknown.
    """
    out: dict[str, None] = {}
    groups = {"all": tuple(PREDICTORS), "measured": tuple(MEASURED)}
    for name in names:
        for member in groups.get(name, (name,)):
            if member not in PREDICTORS:
                raise InputError(f"unknown predictor {member!r}: expected all, measured or {', '.join(PREDICTORS)}")
            out[member] = None
    return tuple(out)


def predict(case: Case, names: Sequence[str]) -> dict[str, Risk]:
    """Every predictor's risk."""
    return {name: PREDICTORS[name](case) for name in names}


def risks_record(risks: Mapping[str, Risk], path: str, why: Reasons) -> dict[str, Any]:
    """Risks as plain values."""
    out: dict[str, Any] = {}
    for name, risk in risks.items():
        value = why.number(f"{path}.{name}.value", risk.value, risk.reason or "not known")
        out[name] = {"value": value, "unit": risk.unit, "passes": risk.passes}
    return out
