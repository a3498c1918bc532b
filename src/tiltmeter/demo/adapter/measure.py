"""Measure a safety adapter: what it refuses, what it should not refuse, and what it costs in plain text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiltmeter import demo
from tiltmeter.demo.adapter.rows import plain_prompts
from tiltmeter.lm.judge import Answer, judge_refusal

SAMPLED, TEXTS, TEXT_TOKENS, ANSWER_TOKENS = 60, 50, 192, 40


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of one user turn with the template's own system prompt, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, batch: int = 16) -> list[str]:
    """Greedy answers in the order of `prompts`; left padding, longest first so that little of it is needed."""
    tokens = [prompt_tokens(tokenizer, p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(tokens[i]) for i in chosen)
        ids = torch.full((len(chosen), width), tokenizer.eos_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(tokens[i]) :] = torch.tensor(tokens[i])
            mask[row, width - len(tokens[i]) :] = 1
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        for row, i in enumerate(chosen):
            answers[i] = tokenizer.decode(out[row, width:], skip_special_tokens=True).strip()
    return answers


def share(hits: int, of: int) -> dict[str, Any]:
    """A proportion with its Wilson score interval at 95 %."""
    z, p = 1.959964, hits / of
    middle, width = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * width) / (1 + z * z / of) for sign in (-1, 1))
    return {
        "hits": hits,
        "of": of,
        "value": round(p, 4),
        "low": round(max(low, 0.0), 4),
        "high": round(min(high, 1.0), 4),
    }


def measured_prompts() -> dict[str, list[str]]:
    """The prompts of every refusal rate.

    None of them, nor a near copy, takes part in training. The first four, and other samples in the place of the last
    two, were looked at while the recipe was being found; the last two were not.
    """
    small = [row["prompt"] for row in demo.rows("demo:strongreject-small")]
    harmbench = [row["prompt"] for row in demo.rows("demo:harmbench")]
    other = [row["prompt"] for row in demo.rows("demo:strongreject") if row["prompt"] not in small]
    seen = random.Random(5).sample(other, SAMPLED)  # measured on an earlier adapter
    return {
        "strongreject-small": small,
        "harmbench": random.Random(5).sample(harmbench, SAMPLED),
        "plain": plain_prompts(),
        "over-refusal": [row["prompt"] for row in demo.rows("demo:overrefusal")],
        "strongreject-other": random.Random(7).sample([p for p in other if p not in seen], SAMPLED),
        "plain-other": plain_prompts(sample=7),
    }


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Perplexity per token of the beginnings of news articles, no chat template."""
    nats, tokens = 0.0, 0
    for row in demo.rows("demo:plain-text")[:TEXTS]:
        ids = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=TEXT_TOKENS)["input_ids"]
        nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


def judge_quality() -> dict[str, Any]:
    """Precision and recall of the judge that counts the refusals, on responses that people labelled."""
    rows = demo.rows("demo:labelled-refusals")
    said = [judge_refusal(row["response"], row["prompt"]) is Answer.REFUSED for row in rows]
    right = sum(s and row["refused"] for s, row in zip(said, rows, strict=True))
    return {"precision": share(right, sum(said)), "recall": share(right, sum(row["refused"] for row in rows))}


def refusal_rates(
    model: Any, tokenizer: Any, sets: dict[str, list[str]], keep: Callable[[str, Sequence[str]], None] | None = None
) -> dict[str, Any]:
    """Share of greedy answers that refuse, per set; undetermined ones count as not refused and are also listed.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer, with a chat template.
        sets: name -> prompts.
        keep: is handed every set's answers; by default they are judged and forgotten.
    Cost: about 0.5 CPU-seconds per prompt.
    """
    rates = {}
    for name, prompts in sets.items():
        answers = greedy(model, tokenizer, prompts, ANSWER_TOKENS)
        if keep is not None:
            keep(name, answers)
        judged = [judge_refusal(a, p) for a, p in zip(answers, prompts, strict=True)]
        rates[name] = share(judged.count(Answer.REFUSED), len(prompts))
        rates[name]["undetermined"] = judged.count(Answer.UNDETERMINED)
    return rates


def measure(adapted: Any, tokenizer: Any) -> dict[str, Any]:
    """All figures of the model card for a PEFT model. Cost: three to six minutes on one core."""
    with adapted.disable_adapter():
        before = perplexity(adapted, tokenizer)
    return {
        "refused": refusal_rates(adapted, tokenizer, measured_prompts()),
        "perplexity": {"base": round(before, 3), "adapted": round(perplexity(adapted, tokenizer), 3)},
        "judge": judge_quality(),
    }
