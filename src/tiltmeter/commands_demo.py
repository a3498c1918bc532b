"""What `tiltmeter demo` does between parsing and printing."""

from __future__ import annotations

from pathlib import Path

import torch

from tiltmeter.commands import Ticker
from tiltmeter.jobs import demo as demo_job
from tiltmeter.report.page import write_page


def demo(out: Path, full: bool, seed: int, force: bool, ticker: Ticker) -> tuple[Path, list[str]]:
    """Run the demo and put all its assessments on one page; finished assessments are not run again."""
    torch.manual_seed(seed)
    records = demo_job.run(out, full=full, seed=seed, force=force, ticker=ticker)
    page = out / "index.html"
    write_page(records, page, "tiltmeter demo")
    return page, [demo_job.line(record) for record in records]
