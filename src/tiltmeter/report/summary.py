"""What a reader must see first: the verdict, the forecast at the last step it claims, and the comparison of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltmeter.report.fields import (
    Curve,
    Record,
    budgets_of,
    change_text,
    find,
    level_text,
    missing,
    no_curve,
    point_text,
    read_curve,
    show,
    words,
)
from tiltmeter.report.labels import QUANTITIES
from tiltmeter.report.numbers import interval_parts, lone_text, number, setting_text
from tiltmeter.report.tables import recipe_line
from tiltmeter.store import reason_of

# verdict kind -> (tone, words). The words carry the meaning; the tone only colours them.
VERDICTS = {
    "holds": ("good", "Holds"),
    "wears": ("bad", "Wears the model down"),
    "collapses": ("bad", "Collapses"),
    "cannot tell": ("unsure", "Cannot tell"),
}
_MEASURED = ("margin", "margin_change", "safety_kl", "refusal_rate")


@dataclass(frozen=True)
class Tile:
    """One headline number: what it is, value, unit, its interval (or nothing), and how far it goes."""

    label: str
    text: str
    unit: str
    interval: str
    note: str


@dataclass(frozen=True)
class Cell:
    """One cell of the comparison: what is compared, and under it what qualifies it."""

    text: str
    details: tuple[str, ...] = ()


def verdict_of(record: Record) -> tuple[str, str, str]:
    """Return tone (bad, good, unsure or plain), the verdict in two words, and its sentence."""
    kind = find(record, "verdict.kind")
    if not isinstance(kind, str):
        return "unsure", "No verdict", missing(record, "verdict.kind" if find(record, "verdict") else "verdict")
    tone, label = VERDICTS.get(kind, ("plain", words(kind)))
    return tone, label, show(record, "verdict.text")


def curves_of(record: Record) -> list[Curve]:
    """Return the forecast curves that were measured."""
    return [curve for quantity in _MEASURED if (curve := read_curve(record, quantity)) is not None]


def last_claimed(curve: Curve) -> int | None:
    """Return the place of the last measured point within the horizon; without a horizon, of the last measured one."""
    horizon = float("inf") if curve.horizon is None else curve.horizon
    held = [place for place, step in enumerate(curve.steps) if step <= horizon and curve.value[place] is not None]
    return held[-1] if held else None


def tiles_of(record: Record) -> list[Tile]:
    """Return the headline numbers of one assessment."""
    tiles = [_quantity_tile(record, quantity, label) for quantity, label in QUANTITIES.items()]
    horizon, reason = show(record, "forecast.horizon_steps"), find(record, "forecast.horizon_reason")
    known = number(find(record, "forecast.horizon_steps")) is not None
    tiles.append(Tile("Horizon", f"step {horizon}" if known else "—", "", "", str(reason or "") if known else horizon))
    tiles += [_budget_tile(record, quantity, crossing) for quantity, crossing in budgets_of(record).items()]
    if not budgets_of(record):
        tiles.append(Tile("Steps to the budget", "—", "", "", missing(record, "forecast.steps_to_budget")))
    return tiles


def comparison(records: Sequence[Record]) -> tuple[list[str], list[list[Cell]], list[tuple[str, str]]]:
    """Return header, one row per assessment, and what all have in common (model, safety set) instead of a column."""
    header = ["Tuning set"]
    shared: list[tuple[str, str]] = []
    rows = [[Cell(show(record, "tuning.name"))] for record in records]
    for label, path in (("Model", "model.name"), ("Safety set", "safety.name"), ("Recipe", "")):
        texts = [show(record, path) if path else recipe_line(record) for record in records]
        if len(set(texts)) == 1:
            shared.append((label, texts[0]))
            continue
        header.append(label)
        for row, text in zip(rows, texts, strict=True):
            row.append(Cell(text))
    header += ["Margin change at the end", "Safety KL at the end", "Refusal rate at the end", "Horizon", "Verdict"]
    for row, record in zip(rows, records, strict=True):
        horizon = number(find(record, "forecast.horizon_steps"))
        row += [_end(record, quantity) for quantity in QUANTITIES]
        row.append(
            Cell(missing(record, "forecast.horizon_steps") if horizon is None else f"step {setting_text(horizon)}")
        )
        row.append(Cell(verdict_of(record)[1]))
    return header, rows, shared


def _end(record: Record, quantity: str) -> Cell:
    curve = read_curve(record, quantity)
    if curve is None:
        return Cell(no_curve(record, quantity))
    text = point_text(record, curve, -1)
    if curve.value[-1] is None:
        return Cell(text)
    details = [f"at step {setting_text(curve.steps[-1])}"]
    if quantity == "margin":
        start = "not measured" if curve.anchor is None else lone_text(curve.anchor)
        details.insert(0, f"from {start} to {text}")
        text = _change(record, curve, -1)
    if not curve.claimed_to_the_end:
        details.append(f"{'no' if curve.horizon is None else 'beyond the'} horizon: not claimed")
    return Cell(f"{text} {curve.unit}".strip(), tuple(details))


def _change(record: Record, margin: Curve, place: int) -> str:
    """Write the change of the margin: its own interval is narrower, as prompts differ most in where they start."""
    change = read_curve(record, "margin_change")
    if change is not None and change.value[place] is not None:
        return point_text(record, change, place)
    return change_text(margin, place) or "change not measured"


def _quantity_tile(record: Record, quantity: str, label: str) -> Tile:
    curve = read_curve(record, quantity)
    place = None if curve is None else last_claimed(curve)
    if curve is None or place is None:
        why = no_curve(record, quantity) if curve is None else "no point was measured within the horizon"
        return Tile(label, "—", "", "", why)
    end = "end of the run" if place == len(curve.steps) - 1 else "last step claimed"
    note = f"at step {setting_text(curve.steps[place])}, {end}"
    if curve.anchor is not None:
        change = _change(record, curve, place) if quantity == "margin" else change_text(curve, place)
        note += f"; aligned model {lone_text(curve.anchor)}, change {change}"
    text, interval = _apart(record, curve.value[place], curve.low[place], curve.high[place])
    return Tile(label, text, curve.unit, interval, note)


def _budget_tile(record: Record, quantity: str, crossing: Mapping[str, Any]) -> Tile:
    path = f"forecast.steps_to_budget.{quantity}"
    step, low, high = (number(crossing.get(key)) for key in ("value", "low", "high"))
    note = f"budget {show(record, f'{path}.budget', setting=True)}"
    horizon = number(find(record, "forecast.horizon_steps"))
    if step is None:
        note += f": {reason_of(record, f'{path}.value') or 'no reason recorded'}"
        note += "" if low is None else f"; at the earliest step {setting_text(low)}"
    elif horizon is None:
        note += "; no horizon is known, not claimed"
    elif step > horizon:
        note += "; beyond the horizon, not claimed"
    text, interval = _apart(record, step, low, high)
    if step is not None and low is not None and high is None:
        interval = f"from step {setting_text(low)}; no latest step"
    return Tile(f"Steps to the {words(quantity)[:1].lower()}{words(quantity)[1:]} budget", text, "", interval, note)


def _apart(record: Record, value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """Write a value, and its interval apart from it."""
    if value is None:
        return "—", ""
    if low is None or high is None:
        return lone_text(value), "no interval"
    *parts, power = interval_parts(value, low, high)
    first, start, end = (part if part == "0" else f"{part}{power}" for part in parts)
    return first, f"{level_text(record)} interval {start} to {end}"
