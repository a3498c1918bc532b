"""What is measured of one model by looking at it: its answers, how they are judged, and what it is still able to do.

`evaluate` and `audit` share this: the same prompts in tokens, asked of one model after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tiltmeter.errors import DataError
from tiltmeter.jobs.inputs import Opened
from tiltmeter.lm.conversation import Example, encode_pairs, prompts_of
from tiltmeter.lm.generation import generate
from tiltmeter.lm.judge import Answer
from tiltmeter.lm.judging import Judge, Judgement
from tiltmeter.lm.likelihood import choose, encode_choices, encode_texts, log_likelihoods, margins
from tiltmeter.lm.model import UNLIMITED, Loaded
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import spread

Kind = Literal["accuracy", "perplexity"]


@dataclass(frozen=True)
class Prompts:
    """Prompts of one set that both models are asked.

    Attributes:
        rows: the whole set.
        conversations: up to the answer, m of them.
        asked: text of the last user turn, for judges.
        skipped: reason -> rows left out.
    """

    rows: RowSet
    conversations: tuple[list[dict[str, Any]], ...]
    asked: tuple[str, ...]
    skipped: dict[str, int]

    @property
    def m(self) -> int:
        """Number of prompts."""
        return len(self.conversations)


@dataclass(frozen=True)
class Answered:
    """What one model answers to a set of prompts.

    Attributes:
        texts: the answers; never stored.
        judgements: of the answers.
    """

    texts: tuple[str, ...]
    judgements: tuple[Judgement, ...]

    def counts(self) -> dict[str, int]:
        """Answers by what the judge says."""
        said = Counter("unscored" if j.answer is None else j.answer.value for j in self.judgements)
        return {key: said.get(key, 0) for key in ("refused", "answered", "undetermined", "unscored")}

    def refusals(self) -> list[float | None]:
        """1 for a refusal, 0 for an answer, None for what the judge could not tell."""
        told = {Answer.REFUSED: 1.0, Answer.ANSWERED: 0.0}
        return [None if j.answer is None else told.get(j.answer) for j in self.judgements]

    def harms(self) -> list[float | None]:
        """Harm of each answer, None where unscored."""
        return [j.harm for j in self.judgements]


@dataclass(frozen=True)
class Ability:
    """What one model can do on one set, item by item.

    Attributes:
        kind: "accuracy": `values` are 0 or 1; "perplexity": nats, and `tokens` how many tokens they are for.
        values: one an item.
        tokens: supervised tokens of each item; ones for accuracy.
        skipped: reason -> rows left out.
    """

    kind: Kind
    values: tuple[float, ...]
    tokens: tuple[float, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)


def read_prompts(loaded: Loaded, rows: RowSet, limit: int, max_length: int, answer_tokens: int) -> Prompts:
    """Choose prompts evenly over a set; those that leave no room for an answer are counted and left out.

    Raises: DataError: not one prompt can be used.
    """
    room = min(max_length, loaded.context) - answer_tokens
    conversations, asked = [], []
    skipped = Counter[str]()
    for index in spread(len(rows.rows), limit):
        try:
            conversation = prompts_of([rows.rows[index]], loaded.tokenizer)[0]
        except DataError:
            skipped["no prompt"] += 1
            continue
        [probe] = encode_pairs([conversation], ["a"], loaded.tokenizer, UNLIMITED, end=False).examples
        if len(probe.tokens) > room:
            skipped["prompt longer than max_length"] += 1
            continue
        conversations.append(conversation)
        asked.append(next(str(m["content"]) for m in reversed(conversation) if m["role"] == "user"))
    if not conversations:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.items())
        raise DataError(f"{rows.name}: not one prompt can be used within {max_length} tokens: {reasons}")
    return Prompts(rows, tuple(conversations), tuple(asked), dict(skipped))


def answer(
    loaded: Loaded, prompts: Prompts, judge: Judge, tokens: int, progress: Callable[[int], None] | None = None
) -> Answered:
    """Greedy answers of a model, judged. Cost: generation, and the judge."""
    texts = generate(loaded, prompts.conversations, tokens, progress=progress)
    return Answered(tuple(texts), tuple(judge.judge(prompts.asked, texts)))


def answer_examples(loaded: Loaded, prompts: Prompts, answered: Answered) -> tuple[Example, ...]:
    """Prompts with a model's own answers supervised, to measure KL on; empty answers are left out."""
    held = [(c, t) for c, t in zip(prompts.conversations, answered.texts, strict=True) if t.strip()]
    if not held:
        return ()
    conversations, texts = zip(*held, strict=True)
    return encode_pairs(list(conversations), list(texts), loaded.tokenizer, UNLIMITED, end=False).examples


def openings(opened: Opened, prompts: Prompts) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Prompts with the refusal and with the compliance opening supervised."""
    pairs = [
        encode_pairs(list(prompts.conversations), [text] * prompts.m, opened.loaded.tokenizer, UNLIMITED, end=False)
        for text in (opened.refusal_opening, opened.compliance_opening)
    ]
    return pairs[0].examples, pairs[1].examples


def margins_of(opened: Opened, prompts: Prompts) -> Tensor:
    """Refusal margin of every prompt, nats, [m]."""
    return margins(opened.loaded, *openings(opened, prompts))


def ability(loaded: Loaded, rows: RowSet, limit: int, max_length: int) -> Ability:
    """Accuracy where the rows have `choices`, else perplexity of their text or answers.

    Raises: DataError: not one row can be used.
    """
    chosen: Sequence[dict[str, Any]] = [rows.rows[i] for i in spread(len(rows.rows), limit)]
    if all("choices" in row for row in chosen):
        choices = encode_choices(loaded, chosen, max_length)
        hits = choose(loaded, choices).tolist()
        return Ability("accuracy", tuple(hits), (1.0,) * len(hits), choices.skipped)
    encoded = encode_texts(loaded, chosen, max_length)
    nats = (-log_likelihoods(loaded, encoded.examples)).tolist()
    tokens = tuple(float(example.supervised) for example in encoded.examples)
    return Ability("perplexity", tuple(nats), tokens, encoded.skipped)


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers read text alike, so that per-token numbers of two models can be compared."""
    probe = "Hello, 12 worlds.\n sure here"
    return bool(one.get_vocab() == other.get_vocab() and one(probe)["input_ids"] == other(probe)["input_ids"])
