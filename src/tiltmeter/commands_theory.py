"""What `tiltmeter theory` does between parsing and printing."""

from __future__ import annotations

from pathlib import Path

from tiltmeter import store
from tiltmeter.jobs.theory import TheoryCheck, run_theory


def theory(seed: int, out: Path | None) -> tuple[TheoryCheck, Path | None]:
    """Run all claims and store the record."""
    if out is None:
        return run_theory(seed), None
    with store.new_folder(out) as folder:
        check = run_theory(seed)
        store.write_record(folder, check.record(), {})
    return check, out
