"""The page of a validation: predicted against measured, rank tables, coverage, collapses, costs, and every failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tiltmeter.errors import DataError
from tiltmeter.report.fields import Record, find, missing, words
from tiltmeter.report.guards_page import draw_pareto, groups_of, guard_table
from tiltmeter.report.numbers import interval_text, lone_text, number
from tiltmeter.report.page import style, template_of
from tiltmeter.report.validation_plots import Point, draw_ranks, draw_scatter
from tiltmeter.store import write_text

_QUANTITIES = (("margin_change", "margin"), ("safety_kl", "kl"))
_PROMPTS = (("held_out", "held-out prompts"), ("assessed", "assessed prompts"))
#: A size error above this is shown among the failures.
_FAILED = 0.3


def write_validation_page(record: Record, path: Path, title: str) -> None:
    """Write the page of a validation; an older page at `path` is replaced in one step.

    Args:
        record: schema `tiltmeter/validation/1`.
        path: the HTML file.
        title: the page's heading.

    Raises:
        DataError: the record has another schema.
    """
    write_text(Path(path), render_validation_page(record, title))


def render_validation_page(record: Record, title: str) -> str:
    """Return the page as text; the same record gives the same page, byte for byte."""
    if not str(record.get("schema")).startswith("tiltmeter/validation/"):
        raise DataError(f"this page shows a validation; the record has the schema {record.get('schema')!r}")
    held = {
        "title": title,
        "style": style(),
        "facts": _facts(record),
        "plots": _scatter(record),
        "ranks": _rank_plots(record),
        "tables": [_predictors(record), _sizes(record), _coverage(record), _collapses(record), _cells(record)],
        "failures": _failures(record),
        **_guards(record),
        "regimes": ", ".join(_regimes(record)),
    }
    return template_of("validation.html").render(**held)


def _guards(record: Record) -> dict[str, Any]:
    """Task loss against held-out KL under every guard, a plot and a table for a set and regime."""
    runs = record.get("guard_runs", [])
    plots, tables = [], []
    for place, (name, regime) in enumerate(sorted({(str(run["set"]), str(run["regime"])) for run in runs})):
        groups = groups_of([run for run in runs if (run["set"], run["regime"]) == (name, regime)])
        plots.append(draw_pareto(f"{name}, {regime}", groups, f"guard{place}"))
        tables.append(guard_table(f"Guards: {name}, {regime}", groups))
    refused = [
        (each.get("label", each["guard"]), each["set"], each["regime"], str(each["seed"]), each["why"])
        for each in record.get("guards_refused", [])
    ]
    if refused:
        header = ("guard", "set", "regime", "seed", "why")
        tables.append(_table("Guards that stopped a run", header, refused))
    return {"guards": plots, "guard_tables": tables}


def _regimes(record: Record) -> list[str]:
    return sorted({str(cell["regime"]) for cell in record["cells"]})


def _facts(record: Record) -> list[tuple[str, str]]:
    safety = record["safety"]
    prompts = f"{safety['name']}, {safety['assessed']} assessed and {safety['held_out']} held out"
    cells = f"{record['finished']} of {record['planned']}"
    return [("Model", str(record["model"])), ("Safety set", prompts), ("Cells finished", cells)]


def _scatter(record: Record) -> list[Markup]:
    out: list[Markup] = []
    for key, label in (("margin_change", "Margin change, nats"), ("safety_kl", "Safety KL, nats per token")):
        for prompts, name in _PROMPTS:
            points = []
            for cell in record["cells"]:
                told = cell["predicted"][key]
                if told["value"][-1] is None:
                    continue
                seen = cell["measured"][prompts][key]["value"][-1]
                narrow = cell["predicted"].get("same_prompts", {}) if prompts == "assessed" else {}
                ends = narrow.get(key, told)
                points.append(Point(told["value"][-1], seen, ends["low"][-1], ends["high"][-1], cell["regime"]))
            if points:
                out.append(draw_scatter(f"{label} ({name})", points, _regimes(record), f"s{len(out)}"))
    return out


def _rank_plots(record: Record) -> list[Markup]:
    out: list[Markup] = []
    for key, label in (("margin", "margin drop"), ("kl", "safety KL")):
        rows = [
            (name, each[key]["value"], each[key]["low"], each[key]["high"], bool(each["ours"]))
            for name, each in record["predictors"].items()
            if each[key]["value"] is not None
        ]
        if rows:
            rows.sort(key=lambda row: -row[1])
            out.append(draw_ranks(rows, f"Spearman with the measured {label}", f"r{len(out)}"))
    return out


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"caption": caption, "header": list(header), "rows": [list(row) for row in rows]}


def _predictors(record: Record) -> dict[str, Any]:
    rows = []
    order = sorted(
        record["predictors"].items(),
        key=lambda item: (item[1]["margin"]["value"] is None, -(item[1]["margin"]["value"] or 0.0)),
    )
    for name, each in order:
        row = [words(name) + (" (ours)" if each["ours"] else "")]
        for key in ("margin", "kl"):
            row.append(_ranged(record, f"predictors.{name}.{key}"))
            lead = number(each[key]["ours_ahead"])
            row.append("" if lead is None else f"{lead:.0%}")
        rows.append([*row, lone_text(each["steps"]), str(each["unit"]), str(each["unknown"])])
    header = ["Predictor", "Spearman with margin drop", "Ours ahead", "Spearman with KL", "Ours ahead",
              "Cost, training steps", "Unit", "Cells unknown"]  # fmt: skip
    caption = (
        "Rank agreement over sets, averaged over regimes, with a bootstrap interval over sets; held-out prompts. "
        "Ours ahead: share of bootstrap draws in which our rehearsal ranks better."
    )
    return _table(caption, header, rows)


def _sizes(record: Record) -> dict[str, Any]:
    rows = []
    for prompts, name in _PROMPTS:
        for when in ("horizon", "end", "end_with_canary"):
            row = [f"{words(when)}, {name}"]
            for key, _ in _QUANTITIES:
                path = f"size_error.{prompts}.{when}.{key}"
                median = number(find(record, f"{path}.median"))
                count = find(record, f"{path}.cells")
                row.append(missing(record, f"{path}.median") if median is None else f"{median:.0%} ({count} cells)")
            rows.append(row)
    caption = "Median of |foretold − measured| over the larger of the measured change and its error."
    return _table(caption, ["Where", "Margin", "Safety KL"], rows)


def _coverage(record: Record) -> dict[str, Any]:
    rows = []
    for prompts, name in _PROMPTS:
        for key in ("cells", "points"):
            row = [f"{'Last claimed step of each cell' if key == 'cells' else 'All claimed points'}, {name}"]
            for quantity, _ in _QUANTITIES:
                path = f"coverage.{prompts}.{quantity}.{key}"
                row.append(f"{_ranged(record, path)}, {find(record, f'{path}.hits')} of {find(record, f'{path}.n')}")
            rows.append(row)
    caption = (
        f"Share of measurements inside the nominal {record['level']:.0%} interval, inside the horizon; on the assessed "
        "prompts that without the draw of prompts."
    )
    return _table(caption, ["What", "Margin", "Safety KL"], rows)


def _collapses(record: Record) -> dict[str, Any]:
    fell = record["collapse"]
    rows = [["Happened", f"{fell['happened']} of {fell['cells']} cells"]]
    for key, label in (
        ("foretold", "Foretold"),
        ("dated", "Dated within a factor of two"),
        ("false_alarms", "False alarms"),
    ):
        text = _ranged(record, f"collapse.{key}")
        rows.append([label, f"{text}, {fell[key]['hits']} of {fell[key]['n']}"])
    return _table("Collapses: half of the assessed prompts have a margin below zero.", ["Collapses", "Share"], rows)


def _cells(record: Record) -> dict[str, Any]:
    rows = []
    for place, cell in enumerate(record["cells"]):
        row = [str(cell["name"]), str(cell["predicted"]["horizon_steps"])]
        for key, _ in _QUANTITIES:
            path = f"cells.{place}.predicted.{key}"
            told = cell["predicted"][key]
            value = told["value"][-1]
            shown = missing(record, f"{path}.value") if value is None else interval_text(
                value, told["low"][-1], told["high"][-1]
            )  # fmt: skip
            row += [shown, *(lone_text(cell["measured"][p][key]["value"][-1]) for p, _ in _PROMPTS)]
        rates = [number(cell["measured"][p]["refusal_rate"]["value"]) for p, _ in _PROMPTS]
        rows.append([*row, " / ".join("?" if rate is None else f"{rate:.0%}" for rate in rates)])
    header = ["Cell", "Horizon", "Margin foretold", "held out", "assessed", "KL foretold", "held out", "assessed",
              "Refusals after, held out / assessed"]  # fmt: skip
    return _table("Every cell at the end of its recipe.", header, rows)


def _failures(record: Record) -> list[str]:
    """Every cell whose forecast missed: by size, by its interval inside the horizon, or a collapse not foretold."""
    out = []
    for cell in record["cells"]:
        said = []
        steps, horizon = cell["predicted"]["steps"], cell["predicted"]["horizon_steps"]
        known = cell["measured"]["held_out"]["steps"]
        for key, _ in _QUANTITIES:
            told, seen = cell["predicted"][key], cell["measured"]["held_out"][key]
            error = max(abs(seen["value"][-1]), seen["error"][-1])
            if told["value"][-1] is not None and error and abs(told["value"][-1] - seen["value"][-1]) > _FAILED * error:
                said.append(
                    f"{words(key)} at the end {lone_text(told['value'][-1])} foretold, {lone_text(seen['value'][-1])} "
                    "measured"
                )
            for place, step in enumerate(steps):
                if horizon is None or step > horizon or told["low"][place] is None or step not in known:
                    continue
                value = seen["value"][known.index(step)]
                if not told["low"][place] <= value <= told["high"][place]:
                    said.append(f"{words(key)} outside its interval at the claimed step {step}")
        foretold, happened = cell["predicted"]["collapse_step"], cell["measured"]["assessed"]["collapse_step"]
        if (foretold is None) != (happened is None):
            said.append("a collapse not foretold" if foretold is None else "a false alarm of collapse")
        if said:
            out.append(f"{cell['name']}: {'; '.join(said)}.")
    return out


def _ranged(record: Record, path: str) -> str:
    value, low, high = (number(find(record, f"{path}.{end}")) for end in ("value", "low", "high"))
    return missing(record, f"{path}.value") if value is None else interval_text(value, low, high)
