"""What a row says: data formats in use, all read as one kind of dialogue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiltmeter.errors import DataError

#: Columns that hold the prompt, its answer and a system prompt, in order of preference.
PROMPT_COLUMNS = ("prompt", "instruction", "question")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
SYSTEM_COLUMNS = ("system", "system_prompt")

#: ShareGPT names of the speakers.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Message = dict[str, Any]


class Unusable(DataError):
    """One row gives no example; the message is a reason of a few words, the same for all rows with that fault."""


@dataclass(frozen=True)
class Dialogue:
    """What one row says.

    Attributes:
        messages: the conversation, `role` and `content` each; empty for running text.
        start: assistant turns from this message on are the completion.
        plain: prompt and completion as they stood, if both were plain strings; ("", text) for running text.
        tools: definitions of the tools that the conversation may call.
    """

    messages: tuple[Message, ...]
    start: int = 0
    plain: tuple[str, str] | None = None
    tools: tuple[Any, ...] = ()


def dialogue(row: Mapping[str, Any]) -> Dialogue:
    """Read a row of any known format.

    Known are TRL's `messages`, `prompt` and `completion` (strings or messages), prompt alone, and `text`; ShareGPT's
    `conversations`; Alpaca's `instruction`, `input`, `output` (`context` counts as `input`); `question`, `answer`; and
    `response` for a completion. `system` or `system_prompt` goes first where the prompt is a string.

    Raises: Unusable: the row has none of these formats, or is empty.
    """
    row = {column: value for column, value in row.items() if value is not None}
    tools = _tools(row.get("tools"))
    for column in ("messages", "conversations"):
        if column in row:
            return Dialogue(_messages(row[column]), tools=tools)
    prompt = next((row[column] for column in PROMPT_COLUMNS if column in row), None)
    completion = next((row[column] for column in COMPLETION_COLUMNS if column in row), "")
    if prompt is None:
        if not isinstance(row.get("text"), str):
            raise Unusable(f"unknown columns {', '.join(sorted(row)) or '(none)'}")
        if not row["text"].strip():
            raise Unusable("empty text")
        return Dialogue((), plain=("", row["text"]))
    before = _turns(prompt, "user", "no prompt")
    after = _turns(completion, "assistant", "no completion") if completion else ()
    plain = None
    if isinstance(prompt, str):
        extra = row.get("input", row.get("context", "")) if "instruction" in row else ""
        if isinstance(extra, str) and extra.strip():
            prompt = f"{prompt}\n\n{extra}"
            before = ({"role": "user", "content": prompt},)
        system = next((row[column] for column in SYSTEM_COLUMNS if isinstance(row.get(column), str)), "")
        if system.strip():
            before = ({"role": "system", "content": system}, *before)
        elif isinstance(completion, str):
            plain = (prompt, completion)
    return Dialogue((*before, *after), len(before), plain, tools)


def _turns(value: Any, role: str, missing: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise Unusable(missing)
        return ({"role": role, "content": value},)
    return _messages(value)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise Unusable("messages are not a list of role and content")
    return tuple(_message(entry) for entry in value)


def _message(entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise Unusable("messages are not a list of role and content")
    # Arrow gives every message the union of all keys; templates ask whether a key is there, not whether it is None.
    message = {key: value for key, value in entry.items() if value is not None}
    if "from" in message:
        role = SPEAKERS.get(str(message["from"]).lower())
        if role is None:
            raise Unusable(f"unknown speaker {message['from']!r}")
        message = {"role": role, "content": message.get("value", "")}
    if not isinstance(message.get("role"), str):
        raise Unusable("messages are not a list of role and content")
    content = message.get("content", "")
    if isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise Unusable("message content is not text")
    return {**message, "content": content}


def _tools(value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):  # TRL keeps tools as JSON where their schemas differ
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Unusable("tools are not JSON") from error
    return tuple(value) if isinstance(value, (list, tuple)) else ()
