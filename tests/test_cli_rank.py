"""The command line of rank and validate, in this process, on demo:tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tiltmeter import cli, store

RECIPE = ["--lr", "1e-4", "--steps", "4", "--batch-size", "4", "--lora-r", "2", "--lora-target", "q_proj"]
SMALL = ["--rank", "2", "--response-tokens", "6", "--grid", "2", "--max-safety", "4", "--max-tuning", "8"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command; returns exit code, stdout and stderr."""

    def go(*argv: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tiltmeter", *argv])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return go


def test_rank_prints_a_line_a_set_and_stores_record_and_page(run: Any, tmp_path: Path) -> None:
    sets = ["--tuning", "demo:tiny-known", "--tuning", "demo:tiny-copy"]
    out = tmp_path / "ranking"
    code, said, _ = run("rank", "demo:tiny", "--safety", "demo:tiny-safety", *sets, *RECIPE, *SMALL, "-o", str(out))
    assert code == 0
    record, arrays = store.read_record(out)
    assert record["schema"] == "tiltmeter/ranking/1"
    assert [line.split()[1] for line in said.splitlines()] == [each["name"] for each in record["sets"]]
    assert arrays["wins"].shape == (2, 2)
    page = tmp_path / "again.html"
    assert run("report", str(out), "-o", str(page))[0] == 0
    assert "Chance of being the worst" in page.read_text(encoding="utf-8")


def test_rank_per_example_writes_the_filtered_set(run: Any, tmp_path: Path) -> None:
    data, filtered = tmp_path / "set.jsonl", tmp_path / "filtered.jsonl"
    rows = [{"prompt": f"b0{i} b11 b12 b13 b14 b15", "completion": f"b15 b14 b13 b12 b11 b0{i}"} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["rank", "demo:tiny", "--safety", "demo:tiny-safety", "--tuning", str(data), *RECIPE, *SMALL]
    code, said, _ = run(*arguments, "--per-example", "--write", str(filtered), "--drop", "0.34", "--json")
    assert code == 0
    assert len(json.loads(said)["rows"]) == 9  # all of them, whatever --max-tuning says
    assert len(filtered.read_text(encoding="utf-8").splitlines()) == 6
    code, _, told = run(*arguments, "--per-example", "--write", str(filtered))
    assert (code, "exists already" in told) == (2, True)
    code, _, told = run(*arguments, "--write", str(tmp_path / "x.jsonl"))
    assert (code, "needs --per-example" in told) == (2, True)


def test_validate_prints_ten_lines_and_goes_on(run: Any, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "trial"
    plan.write_text(
        "model: demo:tiny\n"
        "safety: {name: demo:tiny-safety, assessed: 3, held_out: 3}\n"
        "sets: [demo:tiny-copy]\n"
        "seeds: [0, 1]\n"
        "regimes: {lora: {recipe: {max_steps: 3, lora: {r: 2}}}}\n"
        "options: {max_tuning: 8, response_tokens: 6, rank: 2, grid: 2, max_tokens: 400}\n"
        "predictors: [measured]\n",
        encoding="utf-8",
    )
    code, said, _ = run("validate", str(plan), "-o", str(out), "--limit", "1")
    assert code == 0
    assert said.splitlines()[0] == "cells       1 of 2"
    assert len(said.splitlines()) <= 10
    code, said, _ = run("validate", str(plan), "-o", str(out), "--json")
    assert code == 0
    assert json.loads(said)["finished"] == 2
    assert "lora-tiny-copy-s1" in (out / "index.html").read_text(encoding="utf-8")
    assert run("validate", str(tmp_path / "none.yaml"), "-o", str(out))[0] == 2
