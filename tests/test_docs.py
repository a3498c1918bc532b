"""What the documents say is true: code blocks run, commands exist, skips are accounted for."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tiltmeter.cli import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(kind, text) for kind, text in BLOCK.findall(README) if kind in {"bash", "python"}]


@pytest.mark.parametrize(("kind", "text"), BLOCKS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(BLOCKS)])
def test_every_code_block_of_the_readme_runs(kind, text, tmp_path, monkeypatch, capfd):
    """`make` lines are checked to be targets of the Makefile; the gate itself runs them.

    All in this process: a new one spends longer on its imports than on most of these commands.
    """
    monkeypatch.chdir(tmp_path)
    if kind == "python":
        exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
        return
    joined = text.replace("\\\n", " ")
    for line in filter(None, (line.split(" #")[0].strip() for line in joined.splitlines())):
        words = shlex.split(line)
        if words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:]), line
        elif words[0] in {"git", "cd", "pip"}:
            continue
        else:
            assert words[0] == "tiltmeter", f"the README runs {words[0]}, which this test cannot"
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code in {None, 0, 3}, capfd.readouterr().err


def test_relative_links_of_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_demo_lines_of_the_readme_are_those_of_the_committed_records():
    from tiltmeter.jobs.demo import line

    shown = re.search(r"<!-- demo lines -->\n```text\n(.*?)\n```", README, re.S)
    order = ["lora-gsm8k", "lora-stdlib-code", "lora-identity", "full-gsm8k", "full-stdlib-code", "full-identity"]
    paths = [ROOT / "benchmarks" / "results" / "demo" / f"{name}.json" for name in order]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    assert records
    assert shown
    assert shown[1].splitlines() == [line(record) for record in records]


def test_the_check_table_of_the_readme_is_that_of_the_committed_runs():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert figures.checks()
    assert figures.between(README, "demo check", figures.check_table(figures.checks())) == README
    run = {
        "name": "lora-x",
        "steps": [1, 2],
        "anchor_margin": 3.0,
        "measured": {"margin": [2.9, 1.0], "safety_kl": [0.001, 0.5]},
        "predicted": {
            "margin_change": {"value": [-0.1, -1.5], "low": [-0.2, -1.9], "high": [0.0, -1.1]},
            "safety_kl": {"value": [0.001, 0.4], "low": [0.0, 0.3], "high": [0.002, 0.6]},
        },
    }
    table = figures.check_table([run])
    assert "| lora, x | 2 | -1.50 (-1.90 to -1.10) | -2.00 | 0.4 (0.3 to 0.6) | 0.5 |" in table
    assert "3 of the 4 values" in table


def test_skips_are_accounted_for():
    pattern = re.compile(r"pytest\.(?:mark\.)?(?:skip|skipif|xfail)\b|importorskip")
    found = sum(
        len(pattern.findall(path.read_text(encoding="utf-8")))
        for path in (ROOT / "tests").rglob("*.py")
        if path.name != Path(__file__).name
    )
    rows = [line for line in (ROOT / "tests" / "SKIPS.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert found == len(rows) - 2


def test_no_machine_path_in_the_repository():
    pattern = re.compile(r"(^|[\s\"'(=])/(?:work|farm|root|home/\w+)/")
    for path in [
        *ROOT.glob("src/**/*.py"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*.md"),
        *ROOT.glob("tests/**/*.py"),
    ]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line) or path.name == Path(__file__).name, f"{path}:{number}"
