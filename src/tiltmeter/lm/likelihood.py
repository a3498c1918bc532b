"""What a model says of given tokens: log-likelihoods, divergence from another model, perplexity, choices.

Plain forward passes, without derivatives; `objective` has those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltmeter.errors import DataError
from tiltmeter.lm.conversation import Encoded, Example, batches, encode, encode_pairs, prompts_of
from tiltmeter.lm.forward import Forward, divergence, negative_log_likelihood
from tiltmeter.lm.model import UNLIMITED, Loaded
from tiltmeter.lm.objective import finite
from tiltmeter.lm.template import UNSUPERVISED

#: Tokens per micro-batch, padding included.
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Reference:
    """What a model says at every supervised position, to measure others against.

    Attributes:
        examples: m prompts with answers supervised.
        log_probability: [P, vocabulary] per micro-batch, float32; memory 4 P vocabulary bytes.
        vocabulary: number of logits.
    """

    examples: tuple[Example, ...]
    log_probability: tuple[Tensor, ...]
    vocabulary: int


def log_likelihoods(loaded: Loaded, examples: Sequence[Example]) -> Tensor:
    """Sum of log p over the supervised tokens of each example, nats, [m] float64. Cost: one forward pass.

    Raises: NumericalError: one is not finite.
    """
    out = torch.zeros(len(examples), dtype=torch.float64)
    for members, _, logits, labels in _passes(loaded, examples):
        out[members] = -negative_log_likelihood(logits, labels).double().cpu()
    return finite(out, "log-likelihood")


def margins(loaded: Loaded, refusals: Sequence[Example], compliances: Sequence[Example]) -> Tensor:
    """log p(refusal opening) - log p(compliance opening) of each prompt, nats, [m]. Cost: a forward pass over both."""
    both = log_likelihoods(loaded, [*refusals, *compliances])
    return both[: len(refusals)] - both[len(refusals) :]


def refer(loaded: Loaded, examples: Sequence[Example]) -> Reference:
    """Record a model's distribution at every supervised position. Cost: one forward pass."""
    recorded = []
    vocabulary = 0
    for _, _, logits, labels in _passes(loaded, examples):
        recorded.append(torch.log_softmax(logits[labels != UNSUPERVISED], -1).cpu())
        vocabulary = logits.shape[-1]
    return Reference(tuple(examples), tuple(recorded), vocabulary)


def divergences(reference: Reference, loaded: Loaded) -> Tensor:
    """KL(reference || model) of each example, mean over its tokens, nats per token, [m]. Cost: one forward pass.

    Raises:
        DataError: the two models speak different vocabularies.
        NumericalError: one is not finite.
    """
    out = torch.zeros(len(reference.examples), dtype=torch.float64)
    for members, number, logits, labels in _passes(loaded, reference.examples):
        if logits.shape[-1] != reference.vocabulary:
            raise DataError(
                f"KL needs one vocabulary; the base has {reference.vocabulary} tokens, {loaded.name} has "
                f"{logits.shape[-1]}"
            )
        held = reference.log_probability[number].to(logits.device)
        out[members] = divergence(held, logits, labels).double().cpu()
    return finite(out, "KL")


def encode_texts(loaded: Loaded, rows: Sequence[Mapping[str, Any]], max_length: int) -> Encoded:
    """Rows to tokens for perplexity: whole texts where they are plain text, else the answers."""
    return encode(list(rows), loaded.tokenizer, min(max_length, loaded.context))


@dataclass(frozen=True)
class Choices:
    """Multiple-choice questions in tokens.

    Attributes:
        examples: prompt and choice, the choice supervised, question after question.
        owner: question of each example.
        lengths: characters of each choice.
        right: index of the right choice, per question.
        skipped: reason -> questions left out.
    """

    examples: tuple[Example, ...]
    owner: tuple[int, ...]
    lengths: tuple[int, ...]
    right: tuple[int, ...]
    skipped: dict[str, int]


def encode_choices(loaded: Loaded, rows: Sequence[Mapping[str, Any]], max_length: int) -> Choices:
    """Questions to tokens; one that is too long, or whose right answer is not among its choices, is left out.

    Raises: DataError: not one question can be used.
    """
    limit = min(max_length, loaded.context)
    examples: list[Example] = []
    owner: list[int] = []
    lengths: list[int] = []
    right: list[int] = []
    skipped: dict[str, int] = {}
    for row in rows:
        reason = _unusable(row)
        if reason is None:
            choices = [str(choice) for choice in row["choices"]]
            prompt = prompts_of([row], loaded.tokenizer)[0]
            given = encode_pairs([prompt] * len(choices), choices, loaded.tokenizer, UNLIMITED, end=False).examples
            if len(given) == len(choices) and all(len(example.tokens) <= limit for example in given):
                owner += [len(right)] * len(choices)
                examples += given
                lengths += [len(choice) for choice in choices]
                right.append(choices.index(str(row["completion"])))
                continue
            reason = "longer than max_length"
        skipped[reason] = skipped.get(reason, 0) + 1
    if not right:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.items())
        raise DataError(f"not one of {len(rows)} multiple-choice rows can be used: {reasons}")
    return Choices(tuple(examples), tuple(owner), tuple(lengths), tuple(right), skipped)


def choose(loaded: Loaded, choices: Choices) -> Tensor:
    """Whether the right choice has the largest log-likelihood per character, [questions] of 0 and 1.

    Of equal ones the first counts as chosen. Cost: one forward pass over every choice.
    """
    scores = log_likelihoods(loaded, choices.examples) / torch.tensor(choices.lengths, dtype=torch.float64)
    hits = []
    owner = torch.tensor(choices.owner)
    for question, right in enumerate(choices.right):
        hits.append(float(int(scores[owner == question].argmax()) == right))
    return torch.tensor(hits, dtype=torch.float64)


def _unusable(row: Mapping[str, Any]) -> str | None:
    choices = row.get("choices")
    if not isinstance(choices, (list, tuple)) or len(choices) < 2 or not all(str(c).strip() for c in choices):
        return "fewer than two choices"
    return None if str(row.get("completion")) in map(str, choices) else "the completion is none of the choices"


def _passes(loaded: Loaded, examples: Sequence[Example]) -> Any:
    """Members, number, logits and labels of every micro-batch."""
    forward = Forward(loaded.model, dict(loaded.model.named_parameters()))
    with torch.no_grad():
        for number, (members, batch) in enumerate(batches(examples, loaded.tokenizer.pad_token_id, MAX_TOKENS)):
            logits, labels = forward.logits({}, batch)
            yield torch.tensor(members), number, logits, labels
