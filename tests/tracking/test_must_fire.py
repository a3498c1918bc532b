"""The run that two published monitors call healthy: LoRA on compliant openings of harmless-looking pairs.

LoRA r8 with AdamW at 1e-3 teaches the model to open with compliance. The alarm, without any budget set, must fire
within the first measurements, and stay silent on the same run over safety data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tiltmeter.demo import rows
from tiltmeter.demo.tiny_language import COMPLIANCE_OPENING
from tiltmeter.jobs.training import Collator
from tiltmeter.lm.conversation import Example, encode, encode_pairs
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.model import add_lora, trainable, undisturbed, wrap
from tiltmeter.lm.objective import likelihood_objective
from tiltmeter.tracking.callback import TrackerCallback
from tiltmeter.tracking.tracker import Tracker

STEPS = 32


def openings(answers: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": COMPLIANCE_OPENING} for row in answers]


def fine_tune(model: Any, tokenizer: Any, data: list[Any], tracker: Tracker, folder: Path) -> None:
    examples: tuple[Example, ...] = encode(data, tokenizer, 64).examples
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, save_strategy="no", seed=1,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    rows_ = [{"input_ids": list(e.tokens), "labels": list(e.labels)} for e in examples]
    trainer = Trainer(model, arguments, Collator(tokenizer.pad_token_id), rows_)
    trainer.add_callback(TrackerCallback(tracker, trainer.log))
    trainer.train()


def opening_nll(model: Any, tokenizer: Any) -> float:
    """Mean NLL of the compliant opening on the harmful prompts, nats."""
    prompts = [row["prompt"] for row in rows("tiny-safety")[:32]]
    examples = encode_pairs(prompts, [COMPLIANCE_OPENING] * 32, tokenizer, 64, end=False).examples
    with undisturbed(model):
        losses = likelihood_objective(
            Forward(model, trainable(model)), examples, tokenizer.pad_token_id, 2048, per="response"
        ).losses()
    return float(losses.mean())


@pytest.fixture
def lora(aligned: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    model, tokenizer = aligned()
    return add_lora(wrap(model, tokenizer), r=8, alpha=16, targets=None, seed=0).model, tokenizer


def test_it_fires_within_the_first_measurements(
    lora: tuple[Any, Any], options: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = lora
    tracker = Tracker(model, tokenizer, rows("tiny-safety"), tmp_path / "track", options=options())
    before = opening_nll(model, tokenizer)
    fine_tune(model, tokenizer, openings(rows("tiny-known")), tracker, tmp_path)
    assert before > 2.5
    assert opening_nll(model, tokenizer) < 1  # the damage is real, and as large as in the published cases
    assert tracker.breach is not None
    measured = [row["step"] for row in tracker.rows]
    assert measured.index(tracker.breach.step) <= 5
    assert any("over budget at step" in message for message in caplog.messages)


def test_it_stays_silent_on_safety_data(lora: tuple[Any, Any], options: Callable[..., Any], tmp_path: Path) -> None:
    model, tokenizer = lora
    tracker = Tracker(model, tokenizer, rows("tiny-safety"), tmp_path / "track", options=options())
    data = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows("tiny-safety")]
    before = opening_nll(model, tokenizer)
    fine_tune(model, tokenizer, data, tracker, tmp_path)
    assert opening_nll(model, tokenizer) > before
    assert tracker.breach is None
    assert tracker.rows[-1]["margin"] > tracker.rows[0]["margin"]
    assert tracker.rows[-1]["weight_change"] > 0.01  # it was a run like the other
    torch.testing.assert_close(tracker.rows[0]["safety_kl"], 0.0)
