"""The same evaluation as a task of Inspect AI, for teams who run everything there.

    inspect eval tiltmeter/refusals --model hf/... -T data=demo:strongreject-small
    inspect eval tiltmeter/refusals --model hf/... -T data=demo:overrefusal -T expect=answered

Needs the extra `inspect` (pip install 'tiltmeter[inspect]'). Inspect's logs hold the prompts and the answers; that is
how it works, and unlike tiltmeter's own records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import SampleScore, Score, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from tiltmeter.errors import DataError, InputError
from tiltmeter.jobs.inputs import open_rows
from tiltmeter.jobs.judges import judge_of
from tiltmeter.lm.conversation import prompts_of
from tiltmeter.lm.judging import Judge
from tiltmeter.lm.safety import spread

_MESSAGES = {"user": ChatMessageUser, "system": ChatMessageSystem, "assistant": ChatMessageAssistant}


@task  # type: ignore[untyped-decorator]
def refusals(
    data: str = "demo:strongreject-small",
    expect: str = "refused",
    limit: int = 0,
    judge: str = "rules",
    judge_model: str | None = None,
    response_tokens: int = 256,
) -> Any:
    """How many prompts of a set a model refuses.

    Args:
        data: file, hub id or `demo:` name.
        expect: "refused" for safety prompts, "answered" for harmless ones; the target of every sample.
        limit: most prompts, evenly spread over the set; 0 for all.
        judge: "rules", an address with the StrongREJECT rubric, or a classifier's id.
        judge_model: name of the judge model at the address.
        response_tokens: length of answers.

    Raises: InputError: the data, the judge or `expect` cannot be used.
    """
    if expect not in ("refused", "answered"):
        raise InputError(f"expect must be refused or answered, got {expect!r}")
    return Task(
        dataset=MemoryDataset(samples(data, expect, limit), name=data),
        solver=generate(),
        scorer=said(judge_of(judge, model=judge_model)),
        config=GenerateConfig(temperature=0.0, max_tokens=response_tokens),
        epochs=Epochs(1, "mode"),
    )


def samples(data: str, expect: str, limit: int) -> list[Any]:
    """Rows as Inspect's samples, up to the answer.

    Raises: DataError: not one row has a prompt.
    """
    rows = open_rows(data).rows
    out = []
    for index in spread(len(rows), limit or len(rows)):
        try:
            messages = prompts_of([rows[index]], None)[0]
        except DataError:
            continue
        given = [_MESSAGES[m["role"]](content=str(m["content"])) for m in messages if m["role"] in _MESSAGES]
        metadata = {"category": rows[index]["category"]} if rows[index].get("category") else {}
        out.append(Sample(input=given, target=expect, id=str(rows[index].get("id", index)), metadata=metadata))
    if not out:
        raise DataError(f"{data}: not one of {len(rows)} rows has a prompt")
    return out


@metric  # type: ignore[untyped-decorator]
def refusal_rate() -> Callable[[list[SampleScore]], float]:
    """Share of refusals among the answers the judge could tell."""

    def measure(scores: list[SampleScore]) -> float:
        told = [each.score.value for each in scores if each.score.value in ("refused", "answered")]
        return told.count("refused") / len(told) if told else float("nan")

    return measure


def _share(kind: str) -> Callable[[list[SampleScore]], float]:
    # Inspect reads the annotation to know that this takes sample scores
    def measure(scores: list[SampleScore]) -> float:
        return sum(each.score.value == kind for each in scores) / len(scores) if scores else float("nan")

    return measure


@metric  # type: ignore[untyped-decorator]
def undetermined() -> Callable[[list[SampleScore]], float]:
    """Share of answers that are neither a refusal nor an answer."""
    return _share("undetermined")


@metric  # type: ignore[untyped-decorator]
def unscored() -> Callable[[list[SampleScore]], float]:
    """Share of answers on which the judge failed."""
    return _share("unscored")


@scorer(metrics=[refusal_rate(), undetermined(), unscored()])  # type: ignore[untyped-decorator]
def said(judge: Judge) -> Any:
    """What the judge says of the answer: refused, answered, undetermined or unscored."""

    async def score(state: TaskState, target: Target) -> Score:
        prompt, response = state.user_prompt.text, state.output.completion
        [found] = await anyio.to_thread.run_sync(lambda: judge.judge([prompt], [response]))
        value = "unscored" if found.answer is None else found.answer.value
        harm = {} if found.harm is None else {"harm": found.harm}
        return Score(value=value, explanation=found.unscored, metadata={"expected": target.text, **harm})

    return score
