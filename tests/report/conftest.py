"""A record as `assess` writes it; its numbers are SYNTHETIC."""

import json
from pathlib import Path

import pytest

from tiltmeter.report.page import render_page


def read_sample():
    return json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8"))


@pytest.fixture
def sample():
    return read_sample()


@pytest.fixture(scope="session")
def whole_page():
    """The page of two assessments, drawn once: matplotlib takes its time."""
    return render_page([read_sample(), read_sample()], "Title")
