"""The tracker's rows in the trainer's own reporters: TensorBoard's event files, and W&B offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from tiltmeter.demo import rows
from tiltmeter.jobs.training import Collator
from tiltmeter.lm.conversation import encode
from tiltmeter.tracking.callback import LOGGED, TrackerCallback
from tiltmeter.tracking.tracker import Tracker


def train(aligned: Any, options: Any, folder: Path, reporter: str) -> Tracker:
    model, tokenizer = aligned()
    tracker = Tracker(model, tokenizer, rows("tiny-safety"), folder / "track", options=options(every=2))
    data = [
        {"input_ids": list(e.tokens), "labels": list(e.labels)}
        for e in encode(rows("tiny-copy")[:8], tokenizer, 64).examples
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        report_to=[reporter], disable_tqdm=True, save_strategy="no", logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, Collator(tokenizer.pad_token_id), data)
    trainer.add_callback(TrackerCallback(tracker, trainer.log))
    trainer.train()
    return tracker


def test_tensorboard_has_every_row(aligned: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    tracker = train(aligned, options, tmp_path, "tensorboard")
    [file] = (tmp_path / "events").rglob("events.out.*")
    events = EventAccumulator(str(file)).Reload()
    for name in LOGGED:
        expected = {row["step"]: row[name] for row in tracker.rows[1:] if row[name] is not None}
        tag = f"train/tiltmeter/{name}"
        told = {e.step: e.value for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
        assert told == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("train/loss")) == 4


def test_wandb_offline_has_the_last_row(
    aligned: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true"), ("CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = train(aligned, options, tmp_path, "wandb")
    summary = wandb.run.summary
    last = tracker.rows[-1]
    told = {name: summary.get(f"train/tiltmeter/{name}") for name in LOGGED if last[name] is not None}
    wandb.finish()
    assert told == pytest.approx({name: last[name] for name in told})
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    for _ in range(300):  # its own process writes it
        if file.stat().st_size > 1000:
            break
        time.sleep(0.2)
    assert file.stat().st_size > 1000
