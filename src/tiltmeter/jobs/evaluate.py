"""Evaluate: what does this model refuse, what can it do, and how does that compare with a base?"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.jobs.evaluate_record import Comparison, record_of
from tiltmeter.jobs.inputs import Opened, open_model, open_rows
from tiltmeter.jobs.probe import (
    Ability,
    Answered,
    Prompts,
    ability,
    answer,
    answer_examples,
    margins_of,
    read_prompts,
    same_tokens,
)
from tiltmeter.jobs.subject import Report, silent
from tiltmeter.lm.four_bit import count, dtype_name
from tiltmeter.lm.judging import Judge, RuleJudge
from tiltmeter.lm.likelihood import Reference, divergences, refer
from tiltmeter.lm.rows import RowSet


@dataclass(frozen=True)
class EvaluateOptions:
    """How much to evaluate.

    Attributes:
        max_safety: most safety prompts.
        max_harmless: most harmless prompts.
        max_capability: most rows of each capability set.
        response_tokens: length of answers.
        max_length: longest sequence, tokens.
        level: of the intervals.
        seed: of the bootstrap.
    """

    max_safety: int = 64
    max_harmless: int = 64
    max_capability: int = 100
    response_tokens: int = 40
    max_length: int = 512
    level: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_safety", "max_harmless", "max_capability", "response_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.max_length < self.response_tokens + 4:
            raise InputError(
                f"--max-length must leave room for a prompt beside {self.response_tokens} response tokens, got "
                f"{self.max_length}"
            )


@dataclass(frozen=True)
class Side:
    """What was measured of one model.

    Attributes:
        facts: name, digest and size, for the record.
        safety: answers to the safety prompts.
        harmless: answers to the harmless prompts, if there are any.
        margins: refusal margin of every safety prompt, nats.
        abilities: one for each capability set.
        kl: KL from the base on each set, nats per token; empty for the base itself.
        no_kl: why there is no KL.
        rules: what the rules say of the safety answers, where another judge was asked.
    """

    facts: dict[str, Any]
    safety: Answered
    harmless: Answered | None
    margins: Tensor
    abilities: tuple[Ability, ...]
    kl: dict[str, Tensor]
    no_kl: str | None
    rules: Answered


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        record: everything, as plain values (schema tiltmeter/evaluation/1).
        arrays: values by prompt or row.
    """

    record: dict[str, Any]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class _Base:
    """What is kept of the base once it has left the memory."""

    side: Side
    tokenizer: Any
    asked: dict[str, tuple[str, ...]]
    references: dict[str, Reference]


def evaluate(
    model: str,
    safety: str,
    *,
    harmless: str | None = None,
    capability: Sequence[str] = (),
    base: str | None = None,
    judge: Judge | None = None,
    options: EvaluateOptions | None = None,
    refusal_opening: str | None = None,
    compliance_opening: str | None = None,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Evaluation:
    """Measure refusals, over-refusals and abilities of a model, and their change from a base.

    Args:
        model: hub id, folder, GGUF file, adapter or `demo:` name.
        safety: prompts that should be refused: file, hub id or `demo:` name.
        harmless: prompts that should be answered.
        capability: sets to measure ability on: rows with `choices` give accuracy, others perplexity.
        base: the model before tuning, of the same tokenizer, for changes and KL.
        judge: who reads the answers; the rules by default.
        options: how much to measure.
        refusal_opening: how a refusal begins; by default that of the model (or of the base, where there is one).
        compliance_opening: how a compliant answer begins.
        adapter: to merge into `model` first.
        dtype: of the weights.
        device: "auto", "cpu", "cuda", ...
        trust_remote_code: run code that a hub model brings along.
        report: told of every stage.

    Returns: the evaluation; nothing is written, and no prompt or answer is in it.

    Raises: InputError: something given cannot be used. NumericalError: a likelihood is not finite.

    Cost: per model, greedy answers to all prompts and one forward pass over openings and capability rows. The two
    models are in memory one after the other.
    """
    options, judge = options or EvaluateOptions(), judge or RuleJudge()
    begin = time.perf_counter()
    sets = _Sets(
        open_rows(safety), None if harmless is None else open_rows(harmless), tuple(open_rows(c) for c in capability)
    )
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    given = {"refusal_opening": refusal_opening, "compliance_opening": compliance_opening}
    held = None
    if base is not None:
        report(f"loading {base}")
        opened = _with_openings(open_model(base, **loading), given)  # type: ignore[arg-type]
        # a fine-tune of an embedded model is a plain folder, and speaks as its base did
        given = {"refusal_opening": opened.refusal_opening, "compliance_opening": opened.compliance_opening}
        held = _measure_base(opened, sets, judge, options, report)
        del opened
        gc.collect()
    report(f"loading {model}")
    opened = _with_openings(open_model(model, adapter=adapter, **loading), given)  # type: ignore[arg-type]
    prompts = sets.read(opened, options)
    side = _measure(opened, prompts, sets, judge, options, report, held)
    return _result(opened, prompts, sets, side, held, judge, options, time.perf_counter() - begin)


@dataclass(frozen=True)
class _Sets:
    safety: RowSet
    harmless: RowSet | None
    capability: tuple[RowSet, ...]

    def read(self, opened: Opened, options: EvaluateOptions) -> dict[str, Prompts]:
        """Prompts by set."""
        limits = {"safety": options.max_safety, "harmless": options.max_harmless}
        rows = {"safety": self.safety, "harmless": self.harmless}
        return {
            name: read_prompts(opened.loaded, held, limits[name], options.max_length, options.response_tokens)
            for name, held in rows.items()
            if held is not None
        }


def _with_openings(opened: Opened, given: dict[str, str | None]) -> Opened:
    return replace(
        opened,
        refusal_opening=given["refusal_opening"] or opened.refusal_opening,
        compliance_opening=given["compliance_opening"] or opened.compliance_opening,
    )


def _measure_base(opened: Opened, sets: _Sets, judge: Judge, options: EvaluateOptions, report: Report) -> _Base:
    prompts = sets.read(opened, options)
    side = _measure(opened, prompts, sets, judge, options, report, None)
    references = {}
    for name, answers in (("safety", side.safety), ("harmless", side.harmless)):
        if answers is not None:
            examples = answer_examples(opened.loaded, prompts[name], answers)
            if examples:
                references[name] = refer(opened.loaded, examples)
    asked = {name: held.asked for name, held in prompts.items()}
    return _Base(side, opened.loaded.tokenizer, asked, references)


def _measure(
    opened: Opened,
    prompts: dict[str, Prompts],
    sets: _Sets,
    judge: Judge,
    options: EvaluateOptions,
    report: Report,
    base: _Base | None,
) -> Side:
    loaded = opened.loaded
    answers: dict[str, Answered] = {}
    for name, asked in prompts.items():
        report(f"answers of {loaded.name} to {asked.rows.name}")
        answers[name] = answer(loaded, asked, judge, options.response_tokens)
    report(f"margins and abilities of {loaded.name}")
    abilities = tuple(ability(loaded, rows, options.max_capability, options.max_length) for rows in sets.capability)
    kl, reason = _kl(opened, base)
    safety = answers["safety"]
    ruled = RuleJudge().judge(prompts["safety"].asked, safety.texts)
    return Side(
        {
            "name": loaded.name,
            "digest": loaded.digest,
            "parameters": sum(count(p) for p in loaded.model.parameters()),
            "dtype": dtype_name(loaded.model),
            "device": str(loaded.model.device),
        },
        safety,
        answers.get("harmless"),
        margins_of(opened, prompts["safety"]),
        abilities,
        kl,
        reason,
        Answered(safety.texts, tuple(ruled)),
    )


def _kl(opened: Opened, base: _Base | None) -> tuple[dict[str, Tensor], str | None]:
    if base is None:
        return {}, "no base was given"
    if not same_tokens(base.tokenizer, opened.loaded.tokenizer):
        return {}, "the two models have different tokenizers"
    return {name: divergences(held, opened.loaded) for name, held in base.references.items()}, None


def _result(
    opened: Opened,
    prompts: dict[str, Prompts],
    sets: _Sets,
    side: Side,
    base: _Base | None,
    judge: Judge,
    options: EvaluateOptions,
    seconds: float,
) -> Evaluation:
    old = None if base is None else base.side
    # what is compared item by item must be the same items, read alike
    same_items = base is not None and base.asked == {name: held.asked for name, held in prompts.items()}
    tokens_alike = base is not None and same_tokens(base.tokenizer, opened.loaded.tokenizer)
    both = Comparison(old, same_items, tokens_alike)
    record = record_of(opened, prompts, sets.capability, side, both, judge, options, seconds)
    arrays = {"margin": side.margins}
    if old is not None:
        arrays["base.margin"] = old.margins
    arrays |= {f"kl.{name}": values for name, values in side.kl.items()}
    return Evaluation(record, arrays)
