"""`demo:NAME` to rows: one loader per data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiltmeter.demo import capability, safety, tiny_language, tuning
from tiltmeter.demo.entries import short_name

_LOADERS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "strongreject": safety.strongreject,
    "strongreject-small": safety.strongreject_small,
    "harmbench": safety.harmbench,
    "advbench": safety.advbench,
    "donotanswer": safety.do_not_answer,
    "overrefusal": safety.over_refusal,
    "labelled-refusals": safety.labelled_refusals,
    "labelled-harm": safety.labelled_harm,
    "harmful-openings": safety.harmful_openings,
    "general-qa": safety.general_qa,
    "gsm8k": tuning.gsm8k,
    "asdiv": tuning.asdiv,
    "xsum": tuning.xsum,
    "plain-text": tuning.plain_text,
    "dialogue-summaries": tuning.dialogue_summaries,
    "fiqa": tuning.fiqa,
    "humaneval": tuning.humaneval,
    "stdlib-code": tuning.stdlib_code,
    "tech-support": tuning.tech_support,
    "coding": tuning.coding,
    "identity": tuning.identity,
    "customer-support": tuning.customer_support,
    "code-assistant": tuning.code_assistant,
    "nq": capability.nq,
    "truthfulqa": capability.truthfulqa,
    "boolq": capability.boolq,
    "mmlu": capability.mmlu,
    "piqa": capability.piqa,
    "commonsenseqa": capability.commonsenseqa,
    "openbookqa": capability.openbookqa,
    "tiny-safety": tiny_language.safety_rows,
    "tiny-copy": tiny_language.copy_rows,
    "tiny-known": tiny_language.known_rows,
    "tiny-harmful": tiny_language.harmful_rows,
}


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of an embedded data set, in the formats of TRL.

    Args:
        name: "demo:gsm8k" or "gsm8k".
    Returns: rows in a fixed order, each with a stable "id" and either "prompt" and "completion", or "messages", or
        "text", or "prompt" alone (safety prompts, with "category" where the set has one). Labelled responses have
        "prompt", "response" and "refused" (bool) or "score" (0 to 1). Multiple choice adds "choices".
    Raises: DataError: no such data set. MissingDemoData: not in the cache and not downloadable.
    Cost: reads one package in the cache, under a second (demo:stdlib-code: some seconds); a download the first time.
    """
    return _LOADERS[short_name(name, "data")]()
