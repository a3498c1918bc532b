"""What `tiltmeter validate` does between parsing and printing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from tiltmeter.commands import Ticker
from tiltmeter.jobs.validate import Validation
from tiltmeter.jobs.validate import validate as run_validate
from tiltmeter.jobs.validation_plan import read_plan
from tiltmeter.report.validation_page import write_validation_page


def validate(
    plan: Path, out: Path, limit: int | None, runs: Path | None, workers: int | None, ticker: Ticker
) -> Validation:
    """Run what is missing of a plan; summary and page are written after every cell."""
    transformers_logging.set_verbosity_error()

    def page(summary: Mapping[str, Any]) -> None:
        write_validation_page(summary, out / "index.html", f"Validation on {summary['model']}")

    result = run_validate(
        read_plan(plan), out, limit=limit, runs=runs, workers=workers, report=ticker.report, finished=page
    )
    page(result.record)
    return result


def lines(record: Mapping[str, Any]) -> list[str]:
    """The ten lines of a validation."""
    out = [f"cells       {record['finished']} of {record['planned']}"]
    ranked = sorted(
        record["predictors"].items(),
        key=lambda item: (item[1]["margin"]["value"] is None, -(item[1]["margin"]["value"] or 0.0)),
    )
    told = [f"{name} {each['margin']['value']:.2f}" for name, each in ranked if each["margin"]["value"] is not None]
    out.append("rank        margin: " + (", ".join(told[:6]) or "too few sets so far"))
    for when in ("horizon", "end", "end_with_canary"):
        sizes = record["size_error"]["held_out"][when]
        parts = [
            f"{label} {_percent(sizes[key]['median'])}"
            for key, label in (("margin_change", "margin"), ("safety_kl", "KL"))
        ]
        out.append(f"size error  {when.replace('_', ' ')}: {', '.join(parts)} (median, held-out prompts)")
    for prompts in ("held_out", "assessed"):
        cover = record["coverage"][prompts]
        parts = [
            f"{label} {_percent(cover[key]['cells']['value'])} of {cover[key]['cells']['n']}"
            for key, label in (("margin_change", "margin"), ("safety_kl", "KL"))
        ]
        name = prompts.replace("_", "-")
        out.append(f"coverage    {', '.join(parts)} cells at the last claimed step ({name} prompts)")
    fell = record["collapse"]
    out.append(
        f"collapses   {fell['happened']} happened, {fell['foretold']['hits']} foretold, {fell['dated']['hits']} dated; "
        f"{fell['false_alarms']['hits']} false alarms in {fell['false_alarms']['n']}"
    )
    out.append(f"cost        an assessment is {_percent(record['cost']['share_of_100_steps_at_8'])} of 100 steps of 8")
    return out


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"
