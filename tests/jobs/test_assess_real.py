"""Assessments of the embedded SmolLM2, with what they report computed a second time through transformers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.jobs.assess import assess
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options

pytestmark = pytest.mark.real

OPTIONS = Options(max_safety=2, max_tuning=2, response_tokens=4, max_length=160, rank=1, groups=2, grid=2, looks=4)
TUNING, SAFETY = "demo:identity", "demo:advbench"  # short prompts
RECIPE = Recipe(learning_rate=3e-4, schedule="constant", steps=8, batch_size=1, lora=Lora(4, 8, ("q_proj", "v_proj")))


def chat(tokenizer: Any, prompt: str, answer: str) -> tuple[torch.Tensor, int]:
    """Tokens of a prompt and the beginning of an answer, and where the answer begins; by transformers' template."""
    start = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    head = tokenizer(start, add_special_tokens=False)["input_ids"]
    return torch.tensor([head + tokenizer(answer, add_special_tokens=False)["input_ids"]]), len(head)


def test_lora_assessment_of_the_aligned_model() -> None:
    record = assess("demo:aligned", SAFETY, TUNING, RECIPE, OPTIONS).record
    assert record["cost"]["fb_equivalents"] <= 10
    assert record["cost"]["estimated"]["fb_equivalents"] / record["cost"]["fb_equivalents"] == pytest.approx(1, rel=0.5)
    assert record["forecast"]["refusal_rate"]["anchor"] is not None
    # the anchor's margin, by transformers alone
    opened = open_model("demo:aligned")
    model, tokenizer = opened.loaded.model, opened.loaded.tokenizer
    rows = open_rows(SAFETY).rows
    margins = []
    for row in (rows[int(i * len(rows) / 2)] for i in range(2)):
        logs = []
        for opening in (opened.refusal_opening, opened.compliance_opening):
            tokens, begin = chat(tokenizer, row["prompt"], opening)
            with torch.no_grad():
                log = torch.log_softmax(model(input_ids=tokens).logits[0].double(), -1)
            logs.append(sum(float(log[i - 1, tokens[0, i]]) for i in range(begin, tokens.shape[1])))
        margins.append(logs[0] - logs[1])
    assert_close(record["forecast"]["margin"]["anchor"], sum(margins) / 2, rtol=1e-4, atol=1e-3)
    assert record["forecast"]["margin"]["anchor"] > 0  # it is an aligned model
    assert len(record["layers"]) >= 30
