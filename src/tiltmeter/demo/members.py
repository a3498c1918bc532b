"""Parse members of the pinned packages: JSON, JSON lines, CSV and YAML into plain rows."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from tiltmeter.demo.wheels import read_member

Row = dict[str, Any]


def text_of(package: str, member: str) -> str:
    """One member as text."""
    return read_member(package, member).decode("utf-8")


def json_of(package: str, member: str) -> list[Row]:
    """One member that is a JSON list of objects."""
    found: list[Row] = json.loads(text_of(package, member))
    return found


def json_lines(text: str) -> list[Row]:
    """One object per line; empty lines are skipped."""
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def csv_of(package: str, member: str) -> list[dict[str, str]]:
    """A member that is a CSV table, with or without comment lines above its header."""
    text = text_of(package, member)
    while text.lstrip('"').startswith("#"):
        text = text.partition("\n")[2]
    return list(csv.DictReader(io.StringIO(text, newline="")))


def yaml_of(package: str, member: str) -> Row:
    """A member that is a YAML mapping."""
    import yaml

    found: Row = yaml.safe_load(text_of(package, member))
    return found


def number(name: str, rows: list[Row]) -> list[Row]:
    """Give row k the id `name/000k`; done before any row is left out, so that ids never move."""
    return [{"id": f"{name}/{k:04d}", **row} for k, row in enumerate(rows)]
