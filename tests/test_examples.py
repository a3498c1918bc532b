"""The examples run as they stand, and what they watch is measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["track_trainer", "track_sft_trainer", "track_plain_loop"])
def test_an_example_runs_and_tracks(name, tmp_path):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tracker = module.main(tmp_path)
    rows = [json.loads(line) for line in (tracker.folder / "rows.jsonl").read_text().splitlines()]
    assert rows == tracker.rows
    assert [row["step"] for row in rows][:4] == [0, 1, 2, 4]
    assert all(row["task_loss"] > 0 for row in rows[1:])
    assert rows[0]["safety_kl"] == 0.0
    assert rows[-1]["safety_kl"] > 0
    assert rows[-1]["margin"] < rows[0]["margin"]
    assert rows[-1]["flow_time"] > 0
    if name == "track_trainer":  # it has a budget, and stops at it
        assert tracker.breach.step == rows[-1]["step"] < 40
        assert tracker.breach.checkpoint.is_dir()


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("track_*.py")} == {
        "track_trainer",
        "track_sft_trainer",
        "track_plain_loop",
    }
