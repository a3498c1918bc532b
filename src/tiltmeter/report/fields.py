"""Reading a record in which any value may be null: dotted paths, reasons, and the curves of a forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltmeter.report.labels import LABELS
from tiltmeter.report.numbers import interval_text, lone_text, number, numbers, setting_text
from tiltmeter.store import reason_of

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One forecast quantity over optimiser steps; None where a point was not measured.

    `places` are the points' places in the record's lists, `paths` the single forecasts the value is made of; `crossing`
    is the step at which `budget` is reached (value, low, high), `anchor` the aligned model's value before any step.
    """

    quantity: str
    unit: str
    places: list[int]
    steps: list[float]
    value: list[float | None]
    low: list[float | None]
    high: list[float | None]
    paths: dict[str, list[float | None]]
    anchor: float | None
    horizon: float | None
    budget: float | None
    crossing: tuple[float | None, float | None, float | None]

    @property
    def name(self) -> str:
        """What the quantity is called on the page."""
        return words(self.quantity)

    @property
    def claimed_to_the_end(self) -> bool:
        """Whether the last step lies within the horizon; unknown horizons claim nothing."""
        return self.horizon is not None and bool(self.steps) and self.steps[-1] <= self.horizon


def find(record: Any, path: str) -> Any:
    """Return the value at a dotted path, or None where it, or anything above it, is null or absent."""
    for key in path.split("."):
        if isinstance(record, (list, tuple)) and key.isdigit():
            record = record[int(key)] if int(key) < len(record) else None
        else:
            record = record.get(key) if isinstance(record, Mapping) else None
    return record


def missing(record: Record, path: str) -> str:
    """Say that a value was not measured, and why: the reason for it, for a parent, or for the first part of it."""
    below = (key for key in find(record, "reasons") or {} if key.startswith(f"{path}."))
    reason = reason_of(record, path) or reason_of(record, next(below, ""))
    return f"not measured: {reason or 'no reason recorded'}"


def words(key: str) -> str:
    """Turn a key into a label: `rows_read` -> `Rows read`."""
    text = LABELS.get(key, key.replace("_", " ").strip())
    return text[:1].upper() + text[1:]


def show(record: Record, path: str, unit: str = "", setting: bool = False) -> str:
    """Write the value at a path as text with its interval and unit; nulls become their reason."""
    return write(record, find(record, path), path, unit, setting)


def write(record: Record, held: Any, path: str, unit: str = "", setting: bool = False) -> str:
    """Write a value found at a path; `setting` keeps every digit of a number somebody chose."""
    interval = held if isinstance(held, Mapping) else {}
    if isinstance(held, Mapping):
        held, unit = held.get("value"), str(held.get("unit") or unit)
    if isinstance(held, bool):
        return "yes" if held else "no"
    if isinstance(held, str):
        return held
    if isinstance(held, (list, tuple)):
        parts = ", ".join(write(record, part, f"{path}.{place}", "", setting) for place, part in enumerate(held))
        return f"{parts} {unit}".strip() if held else "none"
    value = number(held)
    if value is None:
        return missing(record, path)
    low, high = number(interval.get("low")), number(interval.get("high"))
    text = f"{setting_text(value) if setting else interval_text(value, low, high)} {unit}".strip()
    return text + "".join(_open_end(record, interval, path, end) for end in ("low", "high") if end in interval)


def _open_end(record: Record, interval: Mapping[str, Any], path: str, end: str) -> str:
    """Say what is known of an interval that has one end or none; nothing where it has both."""
    other = {"low": "high", "high": "low"}[end]
    if number(interval.get(end)) is not None:
        known = number(interval.get(other)) is None
        return f"; {end} end {lone_text(float(interval[end]))}" if known else ""
    return f"; {end} end {missing(record, f'{path}.{end}')}"


def level_text(record: Record) -> str:
    """Write the level of the record's intervals: 90 %."""
    return f"{setting_text(100 * (number(find(record, 'level')) or 0.9))} %"


def budgets_of(record: Record) -> dict[str, Mapping[str, Any]]:
    """Return, by quantity, when each budget is forecast to be used up (budget, value, low, high)."""
    held = find(record, "forecast.steps_to_budget")
    held = held if isinstance(held, Mapping) else {}
    return {str(quantity): crossing for quantity, crossing in held.items() if isinstance(crossing, Mapping)}


def read_curve(record: Record, quantity: str) -> Curve | None:
    """Read one forecast curve; None where not a single point of it was measured."""
    held = find(record, f"forecast.{quantity}")
    steps = numbers(find(record, "forecast.steps"))
    places = [place for place, step in enumerate(steps) if step is not None]
    held = held if isinstance(held, Mapping) else {}

    def points(values: Any) -> list[float | None]:
        known = numbers(values)
        return [known[place] if place < len(known) else None for place in places]

    paths = find(record, "forecast.paths")
    lines = {
        str(name): points(path.get(quantity))
        for name, path in (paths.items() if isinstance(paths, Mapping) else ())
        if isinstance(path, Mapping)
    }
    lines = {name: line for name, line in lines.items() if any(point is not None for point in line)}
    value = points(held.get("value"))
    if all(point is None for point in value) and not lines:
        return None
    crossing = budgets_of(record).get(quantity, {})
    return Curve(
        quantity=quantity,
        unit=str(held.get("unit") or ""),
        places=places,
        steps=[step for step in steps if step is not None],
        value=value,
        low=points(held.get("low")),
        high=points(held.get("high")),
        paths=lines,
        anchor=number(held.get("anchor")),
        horizon=number(find(record, "forecast.horizon_steps")),
        budget=number(crossing.get("budget")),
        crossing=(number(crossing.get("value")), number(crossing.get("low")), number(crossing.get("high"))),
    )


def no_curve(record: Record, quantity: str) -> str:
    """Say why there is no forecast of a quantity."""
    steps = any(step is not None for step in numbers(find(record, "forecast.steps")))
    return missing(record, f"forecast.{quantity}.value" if steps else "forecast.steps")


def path_names(records: Sequence[Record]) -> list[str]:
    """Return the names of all single forecasts, in the order they first appear."""
    names: dict[str, None] = {}
    for record in records:
        paths = find(record, "forecast.paths")
        names.update(dict.fromkeys(map(str, paths)) if isinstance(paths, Mapping) else {})
    return list(names)


def point_text(record: Record, curve: Curve, index: int) -> str:
    """Write one point of a curve with its interval, without the unit; or why it is missing."""
    value = curve.value[index]
    if value is None:
        return missing(record, f"forecast.{curve.quantity}.value.{curve.places[index]}")
    return interval_text(value, curve.low[index], curve.high[index])


def change_text(curve: Curve, index: int) -> str | None:
    """Write how far a point lies from the aligned model; None where either is unknown."""
    value = curve.value[index]
    if value is None or curve.anchor is None:
        return None
    change = value - curve.anchor
    return f"+{lone_text(change)}" if change > 0 else lone_text(change)
