"""The page of one or several runs: what was measured, what was foretold, and what the alarm said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tiltmeter.errors import DataError
from tiltmeter.report import tables, values
from tiltmeter.report.fields import Record, find, level_text, missing, show, words
from tiltmeter.report.numbers import interval_text, lone_text, number, numbers, setting_text
from tiltmeter.report.page import style, template_of
from tiltmeter.report.track_plots import Line, draw_measured, draw_path
from tiltmeter.store import write_text

_DRAWN = ("margin_change", "safety_kl", "refusal_rate", "task_loss", "weight_change", "drift_energy")
_TABLE = ("margin", "safety_kl", "refusal_rate", "task_loss", "drift_energy", "drift_outside", "weight_change")
#: Columns that are only there where the run measured them: they cost extra and have to be asked for.
_ASKED_FOR = ("subspace_overlap", "commutator_defect", "commutator_inside")
_FORETOLD = ("margin_change", "safety_kl", "refusal_rate")


def write_track_page(records: Sequence[Record], path: Path, title: str) -> None:
    """Write the page of one or several tracks; an older page at `path` is replaced in one step.

    Args:
        records: contents of `record.json`, schema `tiltmeter/track/1`.
        path: the HTML file.
        title: the page's heading.

    Raises:
        DataError: no record, or one of another schema.
    """
    write_text(Path(path), render_track_page(records, title))


def render_track_page(records: Sequence[Record], title: str) -> str:
    """Return the page as text; the same records give the same page, byte for byte."""
    if not records:
        raise DataError("a report needs at least one result folder; none was given")
    for record in records:
        if not str(record.get("schema")).startswith("tiltmeter/track/"):
            raise DataError(f"this page shows tracks; a record has the schema {record.get('schema')!r}")
    views = [_view(record, f"t{place}") for place, record in enumerate(records, 1)]
    return template_of("track.html").render(title=title, style=style(), tracks=views)


def _view(record: Record, name: str) -> dict[str, Any]:
    header, rows = _measured_table(record)
    fired, given = bool(find(record, "alarm.fired")), bool(find(record, "alarm.given"))
    facts = (("Model", "model.name"), ("Safety set", "safety.name"), ("Tuning set", "tuning.name"))
    skipped = ("curves", "comparison", "reasons", "arrays")
    return {
        "name": name,
        "level": level_text(record),
        "facts": [(label, show(record, path)) for label, path in facts],
        "recipe": tables.recipe_line({**record, "space": {"lora": find(record, "recipe.lora")}}),
        "tone": "bad" if fired else "good",
        "alarm": ("Over the budget" if given else "The alarm fired") if fired else "Inside the budget",
        "text": show(record, "alarm.text"),
        "plots": _plots(record, name),
        "foretold": find(record, "comparison") is not None,
        "no_forecast": missing(record, "comparison"),
        "header": header,
        "rows": rows,
        "compared": _compared(record),
        "shape": values.rows_of(record, "exponent")
        + [row for row in values.rows_of(record, "path") if not _drawn(row)],
        "overhead": values.rows_of(record, "overhead"),
        "everything": [
            (words(key), [row for row in values.rows_of(record, key) if not _drawn(row)])
            for key in record
            if key not in skipped and not isinstance(record[key], str)
        ],
    }


def _plots(record: Record, name: str) -> list[Markup]:
    steps = [float(step) for step in find(record, "curves.steps")]
    told = [float(step) for step in find(record, "comparison.steps") or []]
    horizon = number(find(record, "comparison.horizon_steps"))
    out = []
    for place, key in enumerate(_DRAWN):
        curve = find(record, f"curves.{key}")
        value = numbers(curve["value"])
        known = [point for point in value if point is not None]
        if len(known) < 2:
            continue
        low, high = numbers(curve.get("low") or ()), numbers(curve.get("high") or ())
        kept = [i for i, point in enumerate(value) if point is not None]
        measured = Line(
            [steps[i] for i in kept], [value[i] for i in kept], [low[i] for i in kept] if low else (),
            [high[i] for i in kept] if high else (),
        )  # fmt: skip
        predicted = None
        if key in _FORETOLD and told:
            held = find(record, f"comparison.{key}")
            predicted = Line(told, numbers(held["predicted"]), numbers(held["low"]), numbers(held["high"]))
        positive = [point for point in known if point > 0]
        log = key != "margin_change" and len(positive) > 2 and max(positive) / min(positive) > 30
        limit = horizon or 0.0 if predicted is not None else None  # where none is known nothing is claimed
        title = f"{words(key)}, {curve['unit']}"
        out.append(draw_measured(title, measured, predicted, f"{name}p{place}", horizon=limit, log=log))
    positions = find(record, "path.positions")
    if positions:
        out.append(draw_path(positions, find(record, "path.steps"), f"{name}w"))
    return out


def _drawn(row: values.Row) -> bool:
    """Whether a row's value stands in the drawing of the path already."""
    return row.key.startswith(("path.positions", "path.steps"))


def _measured_table(record: Record) -> tuple[list[str], list[list[str]]]:
    extra = [key for key in _ASKED_FOR if any(v is not None for v in find(record, f"curves.{key}.value") or [])]
    keys = (*_TABLE, *extra)
    header = ["Optimiser step", *(f"{words(key)}, {find(record, f'curves.{key}.unit')}" for key in keys)]
    rows = []
    for place, step in enumerate(find(record, "curves.steps")):
        row = [setting_text(float(step))]
        for key in keys:
            point, low, high = (number(find(record, f"curves.{key}.{end}.{place}")) for end in ("value", "low", "high"))
            path = f"curves.{key}.value.{place}"
            row.append(missing(record, path) if point is None else interval_text(point, low, high))
        rows.append(row)
    return header, rows


def _compared(record: Record) -> list[list[str]]:
    """Rows of quantity, step, forecast with interval, measured, and whether it lies inside."""
    out = []
    horizon = number(find(record, "comparison.horizon_steps"))
    for key in _FORETOLD:
        for place, step in enumerate(find(record, "comparison.steps") or []):
            cells = {
                end: number(find(record, f"comparison.{key}.{end}.{place}"))
                for end in ("predicted", "low", "high", "measured")
            }
            if cells["predicted"] is None or cells["measured"] is None:
                continue
            inside = find(record, f"comparison.{key}.inside.{place}")
            claim = "" if horizon is not None and step <= horizon else " (beyond the horizon: not claimed)"
            claim = " (no horizon: not claimed)" if horizon is None else claim
            out.append(
                [
                    words(key),
                    setting_text(float(step)),
                    interval_text(cells["predicted"], cells["low"], cells["high"]),
                    lone_text(cells["measured"]),
                    ("not known" if inside is None else "yes" if inside else "no") + claim,
                ]
            )
    return out
