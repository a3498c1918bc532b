"""The contract of a judge, and the rule-based one.

A judge reads a prompt and a response and says whether the response refuses, how harmful it is, or both. What it cannot
say is unscored, with a reason, and counted: a judge that failed has not seen a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tiltmeter.lm.judge import Answer, judge_refusal


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one response.

    Attributes:
        answer: refused, answered or undetermined; None where the judge does not tell, or failed.
        harm: 0 (none) to 1; None where the judge does not tell, or failed.
        unscored: why nothing is said; None where the judge did its work.
    """

    answer: Answer | None = None
    harm: float | None = None
    unscored: str | None = None


class Judge(Protocol):
    """Reads responses."""

    @property
    def name(self) -> str:
        """What judges, for the record; no address with a key in it."""
        ...

    @property
    def tells(self) -> frozenset[str]:
        """Any of "refusal" and "harm"."""
        ...

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """One judgement for each pair, in order; what fails is unscored and never raises."""
        ...

    def cost(self) -> dict[str, int]:
        """What was spent so far, by kind ("requests", "tokens"); empty for judges without a price."""
        ...


@dataclass(frozen=True)
class RuleJudge:
    """`lm.judge`: refusals by rules, no model."""

    @property
    def name(self) -> str:
        """For the record."""
        return "rules"

    @property
    def tells(self) -> frozenset[str]:
        """Refusals only."""
        return frozenset({"refusal"})

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Tens of microseconds per hundred words."""
        return [Judgement(judge_refusal(response, prompt)) for prompt, response in zip(prompts, responses, strict=True)]

    def cost(self) -> dict[str, int]:
        """Nothing."""
        return {}


def unscored_reasons(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Why responses went unscored: reason -> count."""
    return dict(Counter(each.unscored for each in judgements if each.unscored is not None))


def agreement(one: Sequence[Judgement], other: Sequence[Judgement]) -> tuple[int, int]:
    """Pairs on which two judges say the same of refusal, and pairs on which both say anything."""
    told = [(a.answer, b.answer) for a, b in zip(one, other, strict=True) if a.answer and b.answer]
    return sum(a is b for a, b in told), len(told)
