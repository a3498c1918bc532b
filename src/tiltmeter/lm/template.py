"""The chat template and the tokenizer: which characters, and which tokens, are what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from tiltmeter.errors import DataError, ModelError
from tiltmeter.lm.dialogue import Dialogue, Message, Unusable

#: Label of tokens without loss, as in transformers and PyTorch's cross entropy.
UNSUPERVISED = -100

#: Stands in for an answer to find out where the template puts it; no template can contain it by chance.
_SENTINEL = "\u2042tiltmeter\u2042"


@dataclass(frozen=True)
class Marked:
    """Text and the character ranges of it that are supervised.

    Attributes:
        text: what is tokenised.
        spans: ranges of characters, first and behind last.
        rendered: made by the chat template, which writes all special tokens itself.
        end: the end-of-text token is to be put behind it, supervised.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    rendered: bool
    end: bool = False


@dataclass(frozen=True)
class Token:
    """A token and its place in the text.

    Attributes:
        id: token id.
        start: its first character that is not white space; its first character if it is all white space.
        end: behind its last character.
        blank: nothing but white space.
    """

    id: int
    start: int
    end: int
    blank: bool


@dataclass(frozen=True)
class Writer:
    """Renders, marks and tokenises with one tokenizer."""

    tokenizer: Any

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"{type(self.tokenizer).__name__} does not say which characters its tokens stand for, so answers "
                f"cannot be told from prompts; a fast tokenizer (tokenizer.json) is needed"
            )

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.tokenizer.chat_template is not None

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of tokens that text is not made of, such as the end of a turn."""
        return frozenset(self.tokenizer.all_special_ids) | frozenset(self.tokenizer.added_tokens_decoder)

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, ask: bool = False) -> str:
        """Text of a conversation; with `ask`, the assistant is asked to speak next."""
        if not self.has_template:
            raise DataError(
                "the tokenizer has no chat template, so conversations cannot be put into tokens; use a chat model, "
                "set `tokenizer.chat_template`, or give `prompt` and `completion` strings, or `text`"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from error
        return text

    def mark(self, row: Dialogue, supervise: str) -> Marked:
        """Text of a dialogue and the character ranges of its answers."""
        everything = supervise == "all"
        if row.plain is not None and not (row.messages and self.has_template):
            prompt, completion = row.plain
            text = prompt + completion
            if not (completion or everything):
                raise Unusable("no completion")
            return Marked(text, ((0 if everything else len(prompt), len(text)),), rendered=False, end=True)
        if everything:
            text = self.render(row.messages, row.tools)
            return Marked(text, ((0, len(text)),), rendered=True)
        answers = [i for i in range(max(row.start, 1), len(row.messages)) if _is_answer(row.messages[i])]
        if not answers:
            raise Unusable("no completion")
        messages = row.messages[: answers[-1] + 1]
        text = self.render(messages, row.tools)
        earlier = [self.turn(text, messages[: i + 1], row.tools) for i in answers[:-1]]
        given = [span for span in earlier if span is not None]
        last = (self.start(text, messages, row.tools), len(text))
        return Marked(text, (*given, last) if len(given) == len(earlier) else (last,), rendered=True)

    def turn(self, text: str, messages: Sequence[Message], tools: Sequence[Any]) -> tuple[int, int] | None:
        """Where the last of the messages stands in a longer text; None if not there as it was given."""
        before = self.render(messages[:-1], tools, ask=True)
        part = self.render(messages, tools)
        end = _common(text, part)
        # Some templates close a whole conversation with a further token, which is not there between turns.
        closing = [token for token in self.tokens(part, rendered=True) if token.end > end] if end < len(part) else []
        if not text.startswith(before) or any(not token.blank and token.id not in self.special for token in closing):
            return None
        return len(before), end

    def start(self, text: str, messages: Sequence[Message], tools: Sequence[Any]) -> int:
        """Where the last of the messages, the end of the text, begins."""
        before = self.render(messages[:-1], tools, ask=True)
        if text.startswith(before):
            return len(before)
        # The generation prompt is not what the template puts before an answer (it may open a chain of thought which
        # finished answers are shown without). What it does put there is seen before an answer that cannot be missed.
        probe = self.render([*messages[:-1], {"role": "assistant", "content": _SENTINEL}], tools)
        start = probe.find(_SENTINEL)
        if start < 0 or probe[:start] != text[:start]:
            raise Unusable("the chat template does not show the answer as it was given")
        return start

    def tokens(self, text: str, rendered: bool) -> list[Token]:
        """All tokens of a text, each with its place."""
        encoding = self.tokenizer(text, add_special_tokens=not rendered, return_offsets_mapping=True, verbose=False)
        tokens, reached = [], 0
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            # Some tokenizers give offsets without the white space of a token, others with it: look at both alike.
            start, end = (start, end) if start < end else (reached, max(reached, end))
            piece = text[start:end]
            blank = not piece.strip()
            tokens.append(Token(token, start if blank else start + len(piece) - len(piece.lstrip()), end, blank))
            reached = max(reached, end)
        return tokens

    def labelled(self, marked: Marked) -> tuple[list[int], list[int]]:
        """Tokens of a marked text and their labels."""
        tokens = self.tokens(marked.text, marked.rendered)
        supervised: set[int] = set()
        for start, end in marked.spans:
            inside = [i for i, token in enumerate(tokens) if start <= token.start and token.end <= end]
            if (start, end) == (0, len(marked.text)):
                supervised.update(inside)
                continue
            kept = list(inside)
            while kept and tokens[kept[-1]].blank and tokens[kept[-1]].id not in self.special:
                kept.pop()
            # White space at the end is dropped behind an end-of-turn token only; elsewhere it is what ends the turn.
            supervised.update(kept if kept and tokens[kept[-1]].id in self.special else inside)
        ids = [token.id for token in tokens]
        eos = self.tokenizer.eos_token_id
        if not marked.rendered and eos is not None and ids[-1:] == [eos]:
            ids.pop()  # some tokenizers close every text; whether this one is to be closed is for us to say
        if marked.end and eos is not None:
            ids.append(eos)
            supervised.add(len(ids) - 1)
        return ids, [ids[i] if i in supervised and i > 0 else UNSUPERVISED for i in range(len(ids))]


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
