"""The part of an audit that asks the models: one model in memory, whose weights are exchanged tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.jobs.audit_overlap import OverlapFindings, measure_overlap
from tiltmeter.jobs.audit_weights import TensorChange
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.probe import Answered, Prompts, answer, answer_examples, margins_of
from tiltmeter.jobs.subject import Report
from tiltmeter.lm.hidden import Drift, drift, hidden_states
from tiltmeter.lm.judging import Judge
from tiltmeter.lm.likelihood import Reference, divergences, refer
from tiltmeter.lm.patch import check_names, write_weights
from tiltmeter.lm.weights import Pair


@dataclass(frozen=True)
class Point:
    """Safety KL and margin of one set of weights, by prompt.

    Attributes:
        kl: from the base, nats per token; None where the base gave only empty answers.
        margin: nats.
    """

    kl: Tensor | None
    margin: Tensor


@dataclass(frozen=True)
class ForwardFindings:
    """What the models said.

    Attributes:
        base_answers: to the safety prompts.
        tuned_answers: the same.
        base_harmless: to the harmless prompts, if there are any.
        tuned_harmless: the same.
        base: KL 0 and the margin.
        tuned: KL and margin.
        harmless_kl: on the base's answers to harmless prompts.
        layers: layer -> with this layer alone put back to the base.
        curve: (alpha, point) for base + alpha (tuned - base).
        safety_drift: of hidden states on safety prompts.
        harmless_drift: on as many harmless prompts.
        drift_prompts: how many were compared.
        overlap: with the safety subspace, or None.
        no_overlap: why not.
        supervised: tokens of the base's answers.
    """

    base_answers: Answered
    tuned_answers: Answered
    base_harmless: Answered | None
    tuned_harmless: Answered | None
    base: Point
    tuned: Point
    harmless_kl: Tensor | None
    layers: dict[str, Point]
    curve: tuple[tuple[float, Point], ...]
    safety_drift: Drift
    harmless_drift: Drift | None
    drift_prompts: int
    overlap: OverlapFindings | None
    no_overlap: str | None
    supervised: int


@dataclass
class _Asked:
    """The loaded model and what it is asked, whichever weights it has."""

    opened: Opened
    pair: Pair
    safety: Prompts
    harmless: Prompts | None
    judge: Judge
    tokens: int
    reference: Reference | None = None
    harmless_reference: Reference | None = None

    def answers(self) -> tuple[Answered, Answered | None]:
        loaded = self.opened.loaded
        rest = None if self.harmless is None else answer(loaded, self.harmless, self.judge, self.tokens)
        return answer(loaded, self.safety, self.judge, self.tokens), rest

    def point(self) -> Point:
        kl = None if self.reference is None else divergences(self.reference, self.opened.loaded)
        return Point(kl, margins_of(self.opened, self.safety))

    def states(self) -> tuple[Tensor, Tensor | None]:
        loaded = self.opened.loaded
        rest = None if self.harmless is None else hidden_states(loaded, self.harmless.conversations)
        return hidden_states(loaded, self.safety.conversations), rest

    def record(self, answered: Answered, prompts: Prompts) -> Reference | None:
        examples = answer_examples(self.opened.loaded, prompts, answered)
        return refer(self.opened.loaded, examples) if examples else None


def measure_forward(
    opened: Opened,
    pair: Pair,
    changes: tuple[TensorChange, ...],
    safety: Prompts,
    harmless: Prompts | None,
    judge: Judge,
    *,
    response_tokens: int,
    rank: int,
    alphas: Sequence[float],
    localise: bool,
    report: Report,
) -> ForwardFindings:
    """Ask the base, then the tuned model, then what lies between them.

    Args:
        opened: the base; its weights are exchanged in place and are the tuned ones at the end.
        pair: the checkpoints.
        changes: of the tensors that changed.
        safety: prompts to be refused.
        harmless: prompts to be answered, or None.
        judge: of the answers.
        response_tokens: length of answers.
        rank: directions of the safety subspace.
        alphas: points of the scaling curve.
        localise: whether to put back every layer by itself.
        report: told of every stage.

    Raises: UnsupportedModel: the checkpoints name their tensors otherwise than the loaded model.

    Cost: answers of two models; for each changed layer and each alpha one forward pass over answers and openings; for
    the overlap about 2.5 forward+backward passes over the answers.
    """
    model = opened.loaded.model
    check_names(model, pair)
    names = [each.name for each in changes]
    write_weights(model, pair, names, 0.0)  # as stored, so that patching a layer back gives exactly what is here now
    asked = _Asked(opened, pair, safety, harmless, judge, response_tokens)
    report("answers of the base")
    before, before_harmless = asked.answers()
    asked.reference = asked.record(before, safety)
    if harmless is not None and before_harmless is not None:
        asked.harmless_reference = asked.record(before_harmless, harmless)
    base, states = asked.point(), asked.states()
    report("overlap with the safety subspace")
    overlap, no_overlap = _overlap(asked, changes, rank)
    report("answers of the tuned model")
    write_weights(model, pair, names, 1.0)
    after, after_harmless = asked.answers()
    tuned, moved = asked.point(), asked.states()
    harmless_kl = None
    if asked.harmless_reference is not None:
        harmless_kl = divergences(asked.harmless_reference, opened.loaded)
    count = safety.m if harmless is None else min(safety.m, harmless.m)
    harmless_drift = None
    if states[1] is not None and moved[1] is not None:
        harmless_drift = drift(states[1], moved[1], count)
    layers = _localise(asked, changes, report) if localise else {}
    report("scaling curve")
    curve = _curve(asked, names, alphas, base, tuned)
    return ForwardFindings(
        before,
        after,
        before_harmless,
        after_harmless,
        base,
        tuned,
        harmless_kl,
        layers,
        curve,
        drift(states[0], moved[0], count),
        harmless_drift,
        count,
        overlap,
        no_overlap,
        0 if asked.reference is None else sum(e.supervised for e in asked.reference.examples),
    )


def _overlap(asked: _Asked, changes: tuple[TensorChange, ...], rank: int) -> tuple[OverlapFindings | None, str | None]:
    if asked.reference is None:
        return None, "the base gave only empty answers"
    if not rank:
        return None, "left out on request (--rank 0)"
    loaded = asked.opened.loaded
    if loaded.model.dtype not in (torch.float32, torch.float64):
        return None, "scores need float32 weights; use --dtype float32"
    return measure_overlap(loaded, asked.pair, changes, asked.reference.examples, rank), None


def _localise(asked: _Asked, changes: tuple[TensorChange, ...], report: Report) -> dict[str, Point]:
    """Put back one layer at a time; exact, no linearisation."""
    model, out = asked.opened.loaded.model, {}
    for layer in dict.fromkeys(each.layer for each in changes):
        report(f"patching back {layer}")
        held = [each.name for each in changes if each.layer == layer]
        write_weights(model, asked.pair, held, 0.0)
        out[layer] = asked.point()
        write_weights(model, asked.pair, held, 1.0)
    return out


def _curve(
    asked: _Asked, names: list[str], alphas: Sequence[float], base: Point, tuned: Point
) -> tuple[tuple[float, Point], ...]:
    out = []
    zero = Point(None if base.kl is None else torch.zeros_like(base.kl), base.margin)
    for alpha in sorted(set(alphas) | {0.0, 1.0}):
        known = {0.0: zero, 1.0: tuned}.get(alpha)
        if known is None:
            write_weights(asked.opened.loaded.model, asked.pair, names, alpha)
            known = asked.point()
        out.append((alpha, known))
    write_weights(asked.opened.loaded.model, asked.pair, names, 1.0)
    return tuple(out)
