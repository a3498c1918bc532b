"""The callback in a Trainer: losses, rates, reporters, and the trainer's own log lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiltmeter.demo import rows
from tiltmeter.jobs.training import Collator
from tiltmeter.lm.conversation import encode
from tiltmeter.tracking.callback import LOGGED, TrackerCallback
from tiltmeter.tracking.probe import batch_examples
from tiltmeter.tracking.tracker import Tracker


class Reporter(TrainerCallback):
    """Stands where TensorBoard's and W&B's callbacks stand: before those that users add."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append((state.global_step, dict(logs)))


@pytest.fixture
def trained(aligned: Any, options: Any, tmp_path: Path) -> tuple[Tracker, Reporter, Any]:
    model, tokenizer = aligned()
    chosen = options(every=4, commutator_every=1)
    tracker = Tracker(model, tokenizer, rows("tiny-safety"), tmp_path / "track", options=chosen)
    data = [
        {"input_ids": list(e.tokens), "labels": list(e.labels)}
        for e in encode(rows("tiny-copy")[:24], tokenizer, 64).examples
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        learning_rate=1e-3, warmup_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_steps=3,
        logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    reporter = Reporter()
    trainer = Trainer(model, arguments, Collator(tokenizer.pad_token_id), data, callbacks=[reporter])
    trainer.add_callback(TrackerCallback(tracker, trainer.log))
    trainer.train()
    return tracker, reporter, trainer


def test_losses_and_rates_are_the_trainers_own(trained: tuple[Tracker, Reporter, Any]) -> None:
    tracker, reporter, _ = trained
    logged = {step: line for step, line in reporter.lines if "loss" in line}
    assert [row["step"] for row in tracker.rows] == [0, 1, 2, 3, 4, 6]  # 3 and 6 because checkpoints were saved
    for row in tracker.rows[1:]:
        assert row["task_loss"] == pytest.approx(logged[row["step"]]["loss"], rel=1e-5)
    rates = [0.0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4]  # what linear warm-up over two of six steps gives
    assert tracker.rows[-1]["flow_time"] == pytest.approx(sum(rates), rel=1e-9)
    assert sorted(tracker._checkpoints) == [3, 6]


def test_reporters_get_every_row_and_keep_the_trainers_lines(trained: tuple[Tracker, Reporter, Any]) -> None:
    tracker, reporter, trainer = trained
    ours = {step: line for step, line in reporter.lines if any(key.startswith("tiltmeter/") for key in line)}
    assert list(ours) == [row["step"] for row in tracker.rows[1:]]
    for row in tracker.rows[1:]:
        for name in LOGGED:
            assert ours[row["step"]].get(f"tiltmeter/{name}") == row[name]
    assert [step for step, line in reporter.lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert any("tiltmeter/margin" in line for line in trainer.state.log_history)


def test_the_commutator_is_of_the_steps_own_rows(trained: tuple[Tracker, Reporter, Any]) -> None:
    """Three micro-batches of two rows, as the trainer gave them, without their padding."""
    tracker, _, trainer = trained
    assert all(row["commutator_defect"] > 0 for row in tracker.rows[1:])
    heard = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TrackerCallback))
    examples, _ = batch_examples(heard._batches)
    told = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in trainer.train_dataset}
    assert len(examples) == 6
    assert all((example.tokens, example.labels) in told for example in examples)


def test_nothing_is_left_on_the_model(trained: tuple[Tracker, Reporter, Any]) -> None:
    tracker, _, _ = trained
    assert not tracker.forward.model._forward_hooks


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_checkpoint_that_is_decided_on_after_the_step_has_its_row(
    aligned: Any, options: Any, tmp_path: Path, strategy: str
) -> None:
    model, tokenizer = aligned()
    tracker = Tracker(model, tokenizer, rows("tiny-safety"), tmp_path / "track", options=options(every=16))
    data = [
        {"input_ids": list(e.tokens), "labels": list(e.labels)}
        for e in encode(rows("tiny-copy")[:10], tokenizer, 64).examples
    ]
    better = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"} if strategy == "best" else {}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy=strategy, logging_steps=1, remove_unused_columns=False,
        **better,
    )  # fmt: skip
    reporter = Reporter()
    trainer = Trainer(model, arguments, Collator(tokenizer.pad_token_id), data, eval_dataset=data, callbacks=[reporter])
    trainer.add_callback(TrackerCallback(tracker, trainer.log))
    trainer.train()
    saved = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    seen = {row["step"]: row for row in tracker.rows}
    assert len(saved) == {"epoch": 3, "best": len(saved)}[strategy] >= 2
    assert set(saved) <= set(seen)
    assert sorted(seen) == [row["step"] for row in tracker.rows]  # each step once
    assert sorted(tracker._checkpoints) == saved
    logged = {step: line for step, line in reporter.lines if "loss" in line}
    for step in saved:
        assert seen[step]["task_loss"] == pytest.approx(logged[step]["loss"], rel=1e-5)


def test_a_run_that_was_broken_off_is_not_heard_twice(aligned: Any, options: Any, tmp_path: Path) -> None:
    model, tokenizer = aligned()
    tracker = Tracker(model, tokenizer, rows("tiny-safety"), tmp_path / "track", options=options(every=1))
    data = [
        {"input_ids": list(e.tokens), "labels": list(e.labels)}
        for e in encode(rows("tiny-copy")[:8], tokenizer, 64).examples
    ]

    class Interrupt(TrainerCallback):
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed and state.global_step == 1:
                self.armed = False
                raise KeyboardInterrupt

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.0, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    reporter = Reporter()
    trainer = Trainer(model, arguments, Collator(tokenizer.pad_token_id), data, callbacks=[reporter])
    trainer.add_callback(TrackerCallback(tracker, trainer.log))
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    logged = {step: line for step, line in reporter.lines if "loss" in line}
    for row in tracker.rows[1:]:
        assert row["task_loss"] == pytest.approx(logged[row["step"]]["loss"], rel=1e-5)
    assert not [hook for hook in model._forward_hooks.values() if "_listen" in repr(hook)]
