"""`tiltmeter finetune`: what it prints, what it leaves behind, and how it ends."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiltmeter import cli, store
from tiltmeter.commands_finetune import recipe_and_arguments

TINY = ["finetune", "demo:tiny", "--safety", "demo:tiny-safety", "--tuning", "demo:tiny-copy", "--device", "cpu"]
SHORT = ["--lr", "1e-3", "--steps", "8", "--batch-size", "4", "--max-safety", "6", "--rank", "2"]
NOTHING = dict.fromkeys(
    ("lr", "steps", "batch_size", "optimizer", "schedule", "momentum", "lora_r", "lora_alpha", "lora_target")
)

Tiltmeter = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiltmeter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tiltmeter:
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tiltmeter", *argv])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_tiny_demo_runs_with_its_defaults_in_under_a_minute(tiltmeter: Tiltmeter, tmp_path: Path) -> None:
    begin = time.process_time()
    code, out, _ = tiltmeter(*TINY, "-o", str(tmp_path / "run"))
    assert code == 0
    assert time.process_time() - begin < 60
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "run", "margin", "safety", "exponent", "drift", "path", "overhead", "alarm",
    ]  # fmt: skip
    record, arrays = store.read_record(tmp_path / "run")
    assert record["run"]["steps"] == 96  # three epochs of 256 rows, eight to a step: transformers' own defaults
    assert record["recipe"]["learning_rate"] == 5e-5
    share = re.search(r"overhead\s+([\d.]+)% of a step at the interval of (\d+) steps", out)
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * record["overhead"]["share_at_interval"], abs=0.05)
    assert record["overhead"]["share_at_interval"] < 0.1
    assert arrays["per_prompt.margin"].shape == (len(record["curves"]["steps"]), record["safety"]["used"])
    page = (tmp_path / "run" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    code, _, _ = tiltmeter("report", str(tmp_path / "run"), "-o", str(tmp_path / "again.html"))
    assert code == 0
    assert "Measured" in (tmp_path / "again.html").read_text(encoding="utf-8")


def test_a_budget_that_is_exceeded_makes_exit_code_3_and_can_stop(tiltmeter: Tiltmeter, tmp_path: Path) -> None:
    code, out, _ = tiltmeter(
        *TINY, *SHORT, "-o", str(tmp_path / "run"), "--budget-kl", "1e-4", "--stop-on-budget", "--json"
    )
    record = json.loads(out)
    assert code == 3
    assert record["run"]["stopped_early"]
    assert record["curves"]["safety_kl"]["value"][-1] > 1e-4
    assert record["alarm"]["budgets"] == {"kl": 1e-4}
    code, out, _ = tiltmeter(*TINY, *SHORT, "-o", str(tmp_path / "whole"), "--budget-refusal", "0.1")
    assert code == 0
    assert "refusals" in out  # a budget on the refusal rate has it measured


def test_the_default_alarm_warns_without_an_exit_code(tiltmeter: Tiltmeter, tmp_path: Path) -> None:
    long = ["--lr", "2e-3", "--steps", "12", "--max-safety", "6", "--rank", "2", "--schedule", "constant"]
    code, out, _ = tiltmeter(*TINY, *long, "-o", str(tmp_path / "run"))
    assert code == 0
    assert "over budget at step" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer", "keras"], "unknown --trainer 'keras'"),
        (["--resume"], "no run to resume"),
        (["--max-safety", "1"], "max_safety must be at least 2"),
        (["--budget-margin", "99"], "outside the budget before the first step"),
        (["--assessment", "nowhere"], "not a complete result"),
        (["--optimizer", "lion"], "unknown optimizer"),
    ],
)
def test_what_cannot_be_used_ends_in_one_clear_line(
    tiltmeter: Tiltmeter, tmp_path: Path, argv: list[str], message: str
) -> None:
    code, out, err = tiltmeter(*TINY, *SHORT, "-o", str(tmp_path / "run"), *argv)
    assert code == 2
    assert out == ""
    assert message in err


def test_the_command_line_and_the_file_make_one_recipe(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("learning_rate: 3.0e-4\nnum_train_epochs: 2\nbf16: false\nlora: {r: 4}\n")
    recipe, arguments = recipe_and_arguments(file, {**NOTHING, "batch_size": 4}, 10)
    assert (recipe.learning_rate, recipe.steps, recipe.batch_size) == (3e-4, 6, 4)  # two epochs of three steps
    assert recipe.lora is not None
    assert arguments["bf16"] is False
    assert recipe_and_arguments(file, {**NOTHING, "steps": 5, "lr": 1e-3}, 10)[0].steps == 5
    assert recipe_and_arguments(None, NOTHING, 20)[0].steps == 9
