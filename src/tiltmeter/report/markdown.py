"""The model-card snippet: the forecast and its limits as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tiltmeter.errors import DataError
from tiltmeter.report.fields import Record, level_text, show
from tiltmeter.report.summary import comparison, tiles_of, verdict_of
from tiltmeter.report.tables import recipe_line
from tiltmeter.report.values import top_rows

_LIMITS = (
    "A forecast from the aligned model, not a measurement of a tuned one; it holds for this recipe and up to the "
    "horizon. Safety KL and margin are distances, not harm."
)


def render_markdown(records: Sequence[Record]) -> str:
    """Return one or several assessments as Markdown for a model card; names are escaped, nulls say why."""
    if not records:
        raise DataError("a model-card snippet needs at least one result folder; none was given")
    lines = ["## Safety under fine-tuning: forecast by tiltmeter", ""]
    if len(records) > 1:
        header, cells, shared = comparison(records)
        compared = [["; ".join((cell.text, *cell.details)) for cell in row] for row in cells]
        lines += [*(f"{label}: {_escape(text)}\n" for label, text in shared), *_table(header, compared), ""]
    for record in records:
        _, verdict, sentence = verdict_of(record)
        names = [_escape(show(record, f"{part}.name")) for part in ("model", "tuning")]
        lines += [f"### {names[0]} tuned on {names[1]}", "", f"**{_escape(verdict)}.** {_escape(sentence)}", ""]
        rows = [[tile.label, f"{tile.text} {tile.unit}", tile.interval, tile.note] for tile in tiles_of(record)]
        rows += [[row.label, row.text, "", row.meaning] for row in top_rows(record, "aic")]
        lines += [*_table(["Quantity", "Value", "Interval", "Note"], rows), ""]
        safety = f"{_escape(show(record, 'safety.name'))}, {show(record, 'safety.used')} examples used"
        lines += [f"Safety set: {safety}. Recipe: {_escape(recipe_line(record))}.", ""]
        made = f"tiltmeter {show(record, 'tiltmeter')}, {show(record, 'created')}, seed {show(record, 'seed')}"
        made += f"; model digest {show(record, 'model.digest')}"
        lines += [f"{_LIMITS} Intervals are {level_text(record)}. Made by {_escape(made)}.", ""]
    return "\n".join(lines)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    held = [list(map(_escape, row)) for row in (header, *rows)]
    return [f"| {' | '.join(row)} |" for row in (held[0], ["---"] * len(held[0]), *held[1:])]


def _escape(text: str) -> str:
    """Make text stand for itself: Markdown hosts pass HTML through, and a bar or a line break ends a cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
