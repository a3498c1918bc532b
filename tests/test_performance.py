"""The page on performance says what the stored results say, and leaves nothing out without a reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written() -> Any:
    spec = importlib.util.spec_from_file_location("performance_page", ROOT / "benchmarks" / "performance_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = json.loads((ROOT / "benchmarks" / "results" / "performance.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_results(written: Any) -> None:
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == written.page(RECORD)


def test_what_is_null_has_a_reason(written: Any) -> None:
    for key in written.ROWS:
        if written.value(RECORD, key) is None:
            assert RECORD["reasons"][key.split(".")[0]]


def test_a_figure_of_the_page_follows_the_results(written: Any) -> None:
    changed = {**RECORD, "jvp_fb_ratio": 12.345, "hvp_fb_ratio": None}
    page = written.page(changed)
    assert "| 12.35 |" in page or "| 12.34 |" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| `hvp_fb_ratio`")]
    assert line.endswith("| not measured |")
