"""From rows to token batches: the model's own chat template, and loss on exactly what the assistant says.

A conversation is rendered to text once and tokenised once, as it is in training. Which tokens are the answer is read
off the characters: rendering the conversation up to an answer, with the generation prompt, gives the text before it.
So the mask is right for templates that trim white space or rewrite history, and where tokenising the prompt alone
would give other tokens than tokenising it together with the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tiltmeter.errors import DataError
from tiltmeter.lm.dialogue import Message, Unusable, dialogue
from tiltmeter.lm.template import UNSUPERVISED, Marked, Writer


@dataclass(frozen=True)
class Example:
    """One conversation or text in tokens.

    Attributes:
        tokens: token ids.
        labels: the token id where supervised, -100 elsewhere; same length, not shifted. The first label is always
            -100: nothing predicts the first token.
        row: index of the row it came from.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    row: int

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(label != UNSUPERVISED for label in self.labels)

    def opened(self, count: int) -> Example:
        """The same up to the first `count` tokens of its last supervised stretch; itself where there are no more."""
        begin = self._last_stretch()
        end = len(self.tokens) if begin is None else begin + count
        return self if end >= len(self.tokens) else Example(self.tokens[:end], self.labels[:end], self.row)

    def answered(self) -> Example:
        """The same with only its last supervised stretch supervised: earlier turns are what it answers."""
        begin = self._last_stretch() or 0
        return Example(self.tokens, (UNSUPERVISED,) * begin + self.labels[begin:], self.row)

    def _last_stretch(self) -> int | None:
        """Where the last supervised stretch begins; None if nothing is supervised."""
        told = [place for place, label in enumerate(self.labels) if label != UNSUPERVISED]
        starts = [place for place in told if self.labels[place - 1] == UNSUPERVISED]
        return starts[-1] if starts else None


@dataclass(frozen=True)
class Encoded:
    """Examples, and what became of the rows that gave none.

    Attributes:
        examples: in the order of their rows.
        rows_read: number of rows given.
        truncated: examples cut to the maximal length that keep at least one supervised token.
        skipped: reason -> number of rows that gave no example.
    """

    examples: tuple[Example, ...]
    rows_read: int
    truncated: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """Examples side by side.

    Attributes:
        tokens: [b, T] long, right-padded. Under a causal mask padding to the right changes nothing to its left.
        labels: [b, T] long, -100 where not supervised, not shifted.
    """

    tokens: Tensor
    labels: Tensor

    @property
    def targets(self) -> tuple[Tensor, Tensor]:
        """What outputs are to predict, [b, t], and where these t of the labels' T - 1 columns stand; the others are
        supervised nowhere.
        """
        shifted = self.labels[:, 1:]
        keep = (shifted != UNSUPERVISED).any(0).nonzero()[:, 0]
        return shifted[:, keep], keep

    @property
    def together(self) -> int:
        """Neighbouring sequences that share their tokens and cannot be had apart."""
        return 1

    @property
    def read(self) -> Tensor:
        """Columns of tokens whose outputs are needed, ascending, long."""
        return self.targets[1]

    def inputs(self, device: torch.device, *, boolean: bool) -> dict[str, Tensor]:
        """What a model is called with. Right padding under a causal mask needs no attention mask.

        Args:
            device: of the model.
            boolean: whether its attention takes a mask of truth values, or one to be added to the scores.
        """
        return {"input_ids": self.tokens.to(device)}

    def arrange(self, logits: Tensor) -> Tensor:
        """Logits at `read`, [b, t, vocabulary], by sequence and target."""
        return logits

    def only(self, held: Tensor) -> tuple[Tensor, Batch]:
        """Some sequences, without the padding that only the others needed, and which they are [h]."""
        tokens, labels = self.tokens[held], self.labels[held]
        length = int((labels != UNSUPERVISED).any(0).nonzero().max()) + 1
        return held, Batch(tokens[:, :length], labels[:, :length])


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    supervise: Literal["completion", "all"] = "completion",
) -> Encoded:
    """Put rows into tokens and mark what is supervised.

    The formats are those of `dialogue.dialogue`. With a chat template, prompt and completion strings become a user and
    an assistant message, because that is how instruction-tuned models are called; TRL instead joins two plain strings
    without any template, so to reproduce that give a tokenizer without one. Without a template, strings are joined as
    they are, and closed with the end-of-text token, as TRL does.

    With "completion", all assistant turns of `messages` are supervised, or those of `completion` where the row has one.
    If the template rewrites history (some drop the reasoning of earlier answers), so that earlier answers do not stand
    in the text as they were given, only the last one is. What follows the last answer is left out. An answer begins
    behind the generation prompt; if that is not what stands before finished answers (some open a chain of thought),
    behind whatever does. Supervision runs up to and including the end-of-turn token, but, unlike TRL's, not over white
    space that the template puts behind it, which no model ever generates. A token that spans the boundary between
    prompt and answer counts as part of the answer only if all it has from the prompt is white space. Running text
    (`text`) is supervised whole.

    Args:
        rows: rows in any known format.
        tokenizer: a fast tokenizer of transformers.
        max_length: examples are cut to so many tokens, from the right.
        supervise: "completion", or "all" for every token of the conversation.

    Returns: the examples, and what was cut or skipped, with reasons.

    Raises:
        DataError: not one row can be used, or rows are conversations and the tokenizer has no chat template.
        ModelError: the tokenizer is not a fast one.
    """
    writer = Writer(tokenizer)
    return _collect(rows, lambda row: writer.mark(dialogue(row), supervise), writer, max_length)


def encode_pairs(
    prompts: Sequence[str | list[Message]],
    completions: Sequence[str],
    tokenizer: Any,
    max_length: int,
    end: bool,
) -> Encoded:
    """Put prompts with given answers into tokens; the answers are supervised.

    Args:
        prompts: each a string, which becomes a user message, or a conversation.
        completions: as many answers.
        tokenizer: a fast tokenizer; without a chat template the text of a single user message is used as it is.
        max_length: examples are cut to so many tokens, from the right.
        end: close the answer as the template closes a turn; False for openings such as "Sure, here".

    Returns: the examples; `row` is the index of the pair.

    Raises:
        DataError: the numbers differ, or not one pair can be used.
        ModelError: the tokenizer is not a fast one.
    """
    if len(prompts) != len(completions):
        raise DataError(f"{len(prompts)} prompts but {len(completions)} completions; expected as many")
    writer = Writer(tokenizer)

    def mark(pair: tuple[str | list[Message], str]) -> Marked:
        prompt, completion = pair
        if not completion.strip():
            raise Unusable("no completion")
        if not isinstance(prompt, str) and not writer.has_template:
            prompt = prompt_text(prompt, tokenizer)
        if end:
            return writer.mark(dialogue({"prompt": prompt, "completion": completion}), "completion")
        before = prompt_text(prompt, tokenizer)
        return Marked(before + completion, ((len(before), len(before + completion)),), writer.has_template)

    return _collect(list(zip(prompts, completions, strict=True)), mark, writer, max_length)


def prompts_of(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[list[Message]]:
    """The conversation of each row up to the answer, for generation.

    A conversation that ends with an assistant turn is given without that turn; any other as it is.

    Raises: DataError: a row has no prompt, named by its index.
    """
    prompts = []
    for index, row in enumerate(rows):
        try:
            read = dialogue(row)
        except Unusable as error:
            raise DataError(f"row {index} has no prompt to answer: {error}") from error
        messages = list(read.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"row {index} has no prompt to answer: it begins with the answer, or is plain text")
        prompts.append(messages)
    return prompts


def prompt_text(prompt: str | Sequence[Message], tokenizer: Any) -> str:
    """The text after which a model begins its answer.

    Args:
        prompt: a string, which counts as a user message, or a conversation.
        tokenizer: without a chat template the text of a single user message is used as it is.

    Raises: DataError: a conversation, but no chat template; or the template refuses it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template is None and len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return Writer(tokenizer).render(messages, ask=True)


def prompt_tokens(prompt: str | Sequence[Message], tokenizer: Any) -> list[int]:
    """`prompt_text` in tokens, as `encode` puts it before an answer: special tokens once, and no end of text."""
    writer = Writer(tokenizer)
    return writer.labelled(Marked(prompt_text(prompt, tokenizer), (), writer.has_template))[0]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Lay examples side by side, padded on the right.

    Args:
        examples: at least one.
        pad_id: token put where there is nothing; its label is always -100, so it may be the end-of-text token.
    """
    if not examples:
        raise DataError("no examples to put into a batch")
    length = max(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), length), pad_id, dtype=torch.long)
    labels = torch.full((len(examples), length), UNSUPERVISED, dtype=torch.long)
    for i, example in enumerate(examples):
        tokens[i, : len(example.tokens)] = torch.tensor(example.tokens)
        labels[i, : len(example.labels)] = torch.tensor(example.labels)
    return Batch(tokens, labels)


def batches(examples: Sequence[Example], pad_id: int, max_tokens: int) -> list[tuple[list[int], Batch]]:
    """Group examples of similar length, so that little is spent on padding.

    Args:
        examples: any number.
        pad_id: as for `collate`.
        max_tokens: most tokens in a batch, padding included; a longer example is alone in its batch.

    Returns: indices into `examples` and the batch of these, for every batch. Indices rise within a batch, and batches
        stand in the order of their first example; every example is in exactly one.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].tokens)):  # stable, so deterministic
        if groups and (len(groups[-1]) + 1) * len(examples[index].tokens) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    ordered = sorted(sorted(group) for group in groups)
    return [(group, collate([examples[i] for i in group], pad_id)) for group in ordered]


def _collect(rows: Sequence[Any], mark: Callable[[Any], Marked], writer: Writer, max_length: int) -> Encoded:
    """Encode row by row, counting what is cut and what is skipped."""
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    truncated = 0
    for index, row in enumerate(rows):
        try:
            tokens, labels = writer.labelled(mark(row))
        except Unusable as error:
            skipped[str(error)] += 1
            continue
        example = Example(tuple(tokens[:max_length]), tuple(labels[:max_length]), index)
        if not example.supervised:
            whole = Example(tuple(tokens), tuple(labels), index)
            skipped["prompt longer than max_length" if whole.supervised else "nothing to supervise"] += 1
            continue
        truncated += len(tokens) > max_length
        examples.append(example)
    if not examples:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common()) or "there are none"
        raise DataError(f"not one of {len(rows)} rows can be used: {reasons}")
    return Encoded(tuple(examples), len(rows), truncated, dict(skipped))
