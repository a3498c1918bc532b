"""What `tiltmeter report` does between parsing and printing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiltmeter import store
from tiltmeter.report.page import render_markdown, write_page
from tiltmeter.report.ranking_page import write_ranking_page
from tiltmeter.report.result_page import KINDS, write_result_page
from tiltmeter.report.track_page import write_track_page


def report(folders: Sequence[Path], out: Path, title: str) -> None:
    """Read results and write one page or snippet."""
    records = [store.read_record(folder)[0] for folder in folders]
    if out.suffix == ".md":
        store.write_text(out, render_markdown(records))
    elif all(str(record["schema"]).startswith("tiltmeter/track/") for record in records):
        write_track_page(records, out, title)
    elif all(str(record["schema"]).startswith(KINDS) for record in records):
        write_result_page(records, out, title)
    elif len(records) == 1 and str(records[0]["schema"]).startswith("tiltmeter/ranking/"):
        write_ranking_page(records[0], out, title)
    else:
        write_page(records, out, title)
