"""What `tiltmeter rank` does between parsing and printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiltmeter import store
from tiltmeter.commands import Ticker, recipe_from
from tiltmeter.errors import InputError, OutputExists
from tiltmeter.jobs.inputs import open_rows
from tiltmeter.jobs.rank import Ranking
from tiltmeter.jobs.rank import rank as run_rank
from tiltmeter.jobs.rank_rows import rank_rows, write_filtered
from tiltmeter.jobs.subject import Options
from tiltmeter.report.ranking_page import write_ranking_page


def rank(
    model: str,
    safety: str,
    tuning: Sequence[str],
    file: Path | None,
    given: Mapping[str, Any],
    chosen: tuple[Options, dict[str, str | None]],
    loading: Mapping[str, Any],
    rows: tuple[bool, Path | None, float],
    out: Path | None,
    ticker: Ticker,
) -> tuple[Ranking, int | None]:
    """Rank sets, or the rows of one; returns the ranking and how many rows were left out of the filtered set."""
    per_example, filtered, drop = rows
    if per_example and len(tuning) != 1:
        raise InputError(f"--per-example ranks the rows of one set; give --tuning once, not {len(tuning)} times")
    if filtered is not None and not per_example:
        raise InputError("--write leaves rows out of a set; it needs --per-example")
    if filtered is not None and filtered.exists():  # better told before the work than after it
        raise OutputExists(f"{filtered} exists already; results are never overwritten. Give another name.")
    sizes = [len(open_rows(name).rows) for name in tuning]
    recipe = recipe_from(file, given, min(sizes))
    options, openings = chosen

    def run() -> tuple[Ranking, int | None]:
        common = {**openings, **loading}
        if not per_example:
            result = run_rank(model, safety, tuning, recipe, options, **common, report=ticker.report)
            return result, None
        every = replace(options, max_tuning=max(2, sizes[0]))
        result, held = rank_rows(model, safety, tuning[0], recipe, every, **common, report=ticker.report)
        left = None if filtered is None else write_filtered(result.record, held, drop, filtered)
        return result, left

    if out is None:
        return run()
    with store.new_folder(out) as folder:
        result, left = run()
        write_ranking_page(result.record, folder / "index.html", f"Ranking on {model}")
        store.write_record(folder, result.record, result.arrays)
    return result, left


def lines(record: Mapping[str, Any]) -> list[str]:
    """One line a set, most harmful first; or the worst and best rows."""
    if record["sets"] is None:
        return _row_lines(record)
    out = []
    for place, each in enumerate(record["sets"], 1):
        change = each["margin_change"]
        ends = [_text(change[end]) for end in ("value", "low", "high")]
        chance = "" if each["above_next"] is None else f", worse than the next: {each['above_next']:.0%}"
        horizon = each["horizon_steps"]
        claim = ", no horizon" if horizon is None else ""
        if horizon is not None and horizon < record["recipe"]["steps"]:
            claim = f", horizon {horizon}"
        out.append(
            f"{place:>2}  {each['name']:<28} margin {ends[0]} ({ends[1]} to {ends[2]}) nats, "
            f"KL {each['safety_kl']['value']:.2g}{claim}{chance}"
        )
    if any(each["noise"] is None for each in record["sets"]):
        out.append("chances are over safety prompts alone: what the luck of rows does was not measured")
    return out


def _row_lines(record: Mapping[str, Any]) -> list[str]:
    rows, out = record["rows"], []
    out.append(f"{len(rows)} rows scored; {record['unit']}")
    for each in rows[:5]:
        layers = ", ".join(f"{layer['name']} {layer['share']:+.0%}" for layer in each["layers"] or [])
        out.append(f"worst  row {each['row']:>5}  {each['harm']:+.3g} ({each['order']} order; {layers})")
    out += [f"best   row {each['row']:>5}  {each['harm']:+.3g} ({each['order']} order)" for each in rows[-3:]]
    return out


def _text(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3g}"
