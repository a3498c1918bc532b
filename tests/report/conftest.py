"""A record as `assess` writes it; its numbers are SYNTHETIC."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def sample():
    return json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8"))
