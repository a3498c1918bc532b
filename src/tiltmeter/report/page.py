"""One self-contained page from one or several assessments: no script, no asset from elsewhere, nothing unescaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from tiltmeter.errors import DataError
from tiltmeter.report import plots, svg, tables, values
from tiltmeter.report.fields import Curve, Record, find, level_text, missing, path_names, read_curve, show
from tiltmeter.report.labels import QUANTITIES
from tiltmeter.report.markdown import render_markdown
from tiltmeter.report.numbers import number, numbers, text_of
from tiltmeter.report.scale import scale_of
from tiltmeter.report.summary import comparison, curves_of, tiles_of, verdict_of
from tiltmeter.store import write_text

__all__ = ["render_markdown", "render_page", "write_page"]
_SMALL = ("margin", "safety_kl")
_DRAWN = {"spectrum.eigenvalues", "spectrum.gaps"}
_WIDE_GAP = 2.0  # neighbours that differ by less than this ratio are no gap worth marking


def write_page(records: Sequence[Record], path: Path, title: str) -> None:
    """Write one page for one or several assessment records; an older page at `path` is replaced in one step.

    Args:
        records: contents of `record.json`, schema `tiltmeter/assessment/1`.
        path: the HTML file.
        title: the page's heading.

    Raises:
        DataError: no record, or one of another schema.
    """
    write_text(Path(path), render_page(records, title))


def render_page(records: Sequence[Record], title: str) -> str:
    """Return the page as text; the same records give the same page, byte for byte."""
    if not records:
        raise DataError("a report needs at least one result folder; none was given")
    for record in records:
        if not str(record.get("schema")).startswith("tiltmeter/assessment/"):
            raise DataError(f"the page shows assessments; a record has the schema {record.get('schema')!r}")
    template = template_of("page.html")
    colours = path_names(records)
    return template.render(
        title=title,
        style=style(),
        legend=[
            (name, place % len(svg.PATHS), svg.DASHES[place % len(svg.DASHES)]) for place, name in enumerate(colours)
        ],
        comparison=_compare(records, colours) if len(records) > 1 else None,
        assessments=[_view(record, f"a{place}", colours) for place, record in enumerate(records, 1)],
    )


def template_of(name: str) -> Template:
    """A page's template; what is put into it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("tiltmeter.report").joinpath(name).read_text("utf-8"))


def style() -> Markup:
    """The style sheet of all pages."""
    return Markup(resources.files("tiltmeter.report").joinpath("style.css").read_text("utf-8"))


def _view(record: Record, name: str, colours: Sequence[str]) -> dict[str, Any]:
    """Collect what the template shows of one record."""
    curves = curves_of(record)
    tone, verdict, sentence = verdict_of(record)
    header, rows = tables.forecast_table(record, curves)
    drawn = [curve for curve in curves if curve.quantity in QUANTITIES]
    path_header, path_rows = tables.path_table(record, curves)
    return {
        "name": name,
        "level": level_text(record),
        "note": find(record, "note"),
        "facts": _facts(record),
        "recipe": tables.recipe_line(record),
        "tone": tone,
        "verdict": verdict,
        "sentence": sentence,
        "tiles": tiles_of(record),
        "plots": [plots.draw_forecast(curve, colours, f"{name}f{place}") for place, curve in enumerate(drawn)],
        "forecast_reason": None if curves else missing(record, "forecast"),
        "has_budget": any(curve.budget is not None for curve in curves),
        "forecast_header": header,
        "forecast_rows": [(row, _beyond(curves[0], place)) for place, row in enumerate(rows)],
        "path_header": path_header,
        "path_rows": [(row, _beyond(curves[0], place)) for place, row in enumerate(path_rows)],
        "aic": values.top_rows(record, "aic"),
        "baselines": values.top_rows(record, "baselines"),
        "spectrum": _spectrum(record, name),
        "spectrum_rows": [row for row in values.rows_of(record, "spectrum") if row.key not in _DRAWN],
        "spectrum_reason": missing(record, "spectrum.eigenvalues"),
        "layers": _layers(record, name),
        "layers_top": _top_share(record),
        "layers_reason": missing(record, "layers"),
        "layer_rows": tables.layer_table(record),
        "data": tables.data_table(record),
        "provenance": tables.provenance_table(record),
        "cost": tables.cost_table(record),
        "everything": values.everything(record, curves),
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    parts = (("Model", "model.name"), ("Safety set", "safety.name"), ("Tuning set", "tuning.name"))
    facts = [(label, show(record, path)) for label, path in parts]
    size = number(find(record, "space.size"))
    if size is not None:
        facts.append(("Parameters trained", f"{text_of(size)} ({show(record, 'space.kind')})"))
    return facts


def _beyond(curve: Curve, place: int) -> bool:
    return curve.horizon is None or curve.steps[place] > curve.horizon


def _spectrum(record: Record, name: str) -> list[Markup]:
    """Draw the spectrum, as far as it was measured."""
    drawn = []
    held = sorted((v for v in numbers(find(record, "spectrum.eigenvalues")) if v is not None and v > 0), reverse=True)
    if held:
        ratios = {place: held[place - 1] / held[place] for place in range(1, len(held))}
        widest = sorted(ratios, key=lambda place: -ratios[place])[:3]
        drawn.append(plots.draw_spectrum(held, sorted(p for p in widest if ratios[p] >= _WIDE_GAP), f"{name}s"))
    overlap = [number(find(record, f"spectrum.split_half_overlap.{part}")) for part in ("value", "low", "high")]
    random = number(find(record, "spectrum.random_overlap"))
    if overlap[0] is not None:
        drawn.append(plots.draw_overlap(overlap, random, f"{name}o"))
    return drawn


def _layers(record: Record, name: str) -> Markup | None:
    layers, rows = tables.layer_shares(record)
    if not any(share is not None for _, shares in rows for share in shares):
        return None
    stem = layers[0].rpartition(".")[0] + "."
    short = (
        [layer.removeprefix(stem) for layer in layers] if all(layer.startswith(stem) for layer in layers) else layers
    )
    return plots.draw_layers(rows, short, f"{name}l")


def _captions(records: Sequence[Record]) -> list[list[str]]:
    """Name each assessment by its tuning set and by what else is not the same in all."""
    names = [[show(record, "model.name") for record in records], [tables.recipe_line(record) for record in records]]
    short = [names[0], [line.partition(";")[0] for line in names[1]]]
    told = [shown for whole, shown in zip(names, short, strict=True) if len(set(whole)) > 1]
    return [[show(record, "tuning.name"), *(shown[place] for shown in told)] for place, record in enumerate(records)]


def _top_share(record: Record) -> str:
    shares = [share for _, row in tables.layer_shares(record)[1] for share in row if share is not None]
    return f"{100 * max(shares, default=0.0):.1f} %"


def _compare(records: Sequence[Record], colours: Sequence[str]) -> dict[str, Any]:
    """Collect the comparison table and the small forecasts on common scales."""
    header, rows, shared = comparison(records)
    curves = [[read_curve(record, quantity) for quantity in _SMALL] for record in records]
    columns = [[curve for curve in column if curve is not None] for column in zip(*curves, strict=True)]
    kept = [place for place, column in enumerate(columns) if column]
    scales = [scale_of(columns[place]) for place in kept]
    small = [
        plots.draw_small([row[place] for place in kept], scales, colours, f"c{index}") if kept else None
        for index, row in enumerate(curves, 1)
    ]
    tones = [verdict_of(record)[0] for record in records]
    budget = any(curve.budget is not None for column in columns for curve in column)
    return {
        "header": header,
        "rows": list(zip(rows, tones, strict=True)),
        "shared": shared,
        "level": " or ".join(dict.fromkeys(level_text(record) for record in records)),
        "small": small,
        "has_budget": budget,
        "captions": _captions(records),
    }
