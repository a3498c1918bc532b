"""Every value of a record as a row of label, text with interval and unit, and key; where it is null, the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltmeter.report.fields import Curve, Record, find, show, words, write
from tiltmeter.report.labels import LABELS, MEANING, UNITS
from tiltmeter.report.numbers import number

# Text somebody wrote or a model generated is never shown, whichever record it strays into.
WITHHELD = {"prompt", "prompts", "completion", "completions", "generation", "generations", "message", "messages"}
WITHHELD |= {"conversation", "conversations", "example", "examples", "texts", "response_text", "response_texts"}
_OWN_TABLE = {"layers", "reasons", "schema"}
_CHOSEN = ("recipe.", "space.lora", "seed", "versions.")
_LONGEST = 300
_SAME_UNIT = {"value", "low", "high", "anchor", "random", "low_over_batches", "high_over_batches"}


@dataclass(frozen=True)
class Row:
    """One line of a table: label, value as text, its key in the record, and whether it is known."""

    label: str
    text: str
    key: str
    known: bool = True

    @property
    def meaning(self) -> str:
        """What the quantity says, in plain words; empty where the label says it."""
        return MEANING.get(self.key, "")


def rows_of(record: Record, path: str) -> list[Row]:
    """Return one row for every value below a dotted path."""
    held = find(record, path)
    return list(_walk(record, held, tuple(path.split(".")), ""))


def top_rows(record: Record, path: str) -> list[Row]:
    """Return the rows directly below a path, without what qualifies them."""
    return [row for row in rows_of(record, path) if row.key.count(".") <= path.count(".") + 1]


def everything(record: Record, curves: Sequence[Curve]) -> list[tuple[str, list[Row]]]:
    """Return all values of a record by its sections, but for those the tables of layers and of `curves` show whole."""
    shown = {"forecast.steps", "forecast.flow_time"} if curves else set()
    for curve in curves:
        shown.add(f"forecast.{curve.quantity}.value")
        ends = (("low", curve.low), ("high", curve.high))
        shown |= {f"forecast.{curve.quantity}.{end}" for end, points in ends if None not in points}
        shown |= {f"forecast.paths.{path}.{curve.quantity}" for path in curve.paths}
    single = [Row(words(key), show(record, key, setting=True), key) for key in record if _is_single(record, key)]
    groups = [("General", single)]
    for key in record:
        if key not in _OWN_TABLE and not _is_single(record, key):
            groups.append((words(key), [row for row in rows_of(record, key) if row.key not in shown]))
    return [(title, rows) for title, rows in groups if rows]


def _is_single(record: Record, key: str) -> bool:
    return key not in WITHHELD | _OWN_TABLE and isinstance(record[key], (str, int, float))


def _walk(record: Record, held: Any, trail: tuple[str, ...], unit: str) -> Iterator[Row]:
    path = ".".join(trail)
    label = words(" › ".join(LABELS.get(key, key.replace("_", " ")) for key in trail[1:] or trail))
    unit = UNITS.get(path, unit)
    if trail[-1] in WITHHELD:
        yield Row(label, "withheld: prompts and generated text are never shown", path, known=False)
    elif isinstance(held, Mapping) and "value" in held:
        unit = str(held.get("unit") or unit)
        listed = isinstance(held["value"], (list, tuple))
        if not listed:
            yield Row(label, write(record, held, path, unit), path, known=number(held["value"]) is not None)
        for key in held:
            if key not in ({"unit"} if listed else {"value", "low", "high", "unit"}):
                yield from _walk(record, held[key], (*trail, str(key)), unit if key in _SAME_UNIT else "")
    elif isinstance(held, Mapping) and held:
        for key, part in held.items():
            if key != "unit":  # named with the values it belongs to
                yield from _walk(record, part, (*trail, str(key)), "")
    elif isinstance(held, (list, tuple)) and any(isinstance(part, Mapping) for part in held):
        for index, part in enumerate(held):
            yield from _walk(record, part, (*trail, str(index)), "")
    else:
        text = "none" if isinstance(held, Mapping) else write(record, held, path, unit, path.startswith(_CHOSEN))
        clip = isinstance(held, str) and len(text) > _LONGEST
        yield Row(label, f"{text[:_LONGEST]}…" if clip else text, path, known=held is not None)
