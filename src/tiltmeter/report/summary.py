"""What a reader must see first: the verdict, the forecast at the last step it claims, and the comparison of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiltmeter.report.fields import (
    QUANTITIES,
    Curve,
    Record,
    change_text,
    find,
    missing,
    point_text,
    read_curve,
    show,
    words,
)
from tiltmeter.report.numbers import number, setting_text

# verdict kind -> (tone, words). The words carry the meaning; the tone only colours them.
VERDICTS = {
    "wears": ("bad", "Wears the model down"),
    "exceeds_budget": ("bad", "Exceeds the budget"),
    "holds": ("good", "Holds"),
    "strengthens": ("good", "Strengthens"),
    "cannot_tell": ("unsure", "Cannot tell"),
}


@dataclass(frozen=True)
class Tile:
    """One headline number with what it is and how far it goes."""

    label: str
    text: str
    note: str


def verdict_of(record: Record) -> tuple[str, str, str]:
    """Return tone (bad, good, unsure or plain), the verdict in two words, and its sentence."""
    kind = find(record, "verdict.kind")
    if not isinstance(kind, str):
        return "unsure", "No verdict", missing(record, "verdict.kind" if find(record, "verdict") else "verdict")
    tone, label = VERDICTS.get(kind, ("plain", words(kind)))
    return tone, label, show(record, "verdict.text")


def curves_of(record: Record) -> list[Curve]:
    """Return the forecast curves that were measured."""
    return [curve for quantity in QUANTITIES if (curve := read_curve(record, quantity)) is not None]


def last_claimed(curve: Curve) -> int | None:
    """Return the place of the last measured point within the horizon; without a horizon, of the last measured one."""
    horizon = float("inf") if curve.horizon is None else curve.horizon
    held = [place for place, step in enumerate(curve.steps) if step <= horizon and curve.value[place] is not None]
    return held[-1] if held else None


def tiles_of(record: Record) -> list[Tile]:
    """Return the headline numbers of one assessment."""
    tiles = []
    for quantity, label in QUANTITIES.items():
        curve = read_curve(record, quantity)
        place = None if curve is None else last_claimed(curve)
        if curve is None or place is None:
            why = missing(record, f"forecast.{quantity}") if curve is None else "no point within the horizon"
            tiles.append(Tile(label, "—", why))
            continue
        end = "end of the run" if place == len(curve.steps) - 1 else "last step claimed"
        note = f"at step {setting_text(curve.steps[place])}, {end}"
        if curve.anchor is not None:
            note += f"; aligned model {setting_text(curve.anchor)}, change {change_text(curve, place)}"
        tiles.append(Tile(label, f"{point_text(curve, place)} {curve.unit}".strip(), note))
    horizon, reason = show(record, "forecast.horizon_steps"), find(record, "forecast.horizon_reason")
    known = number(find(record, "forecast.horizon_steps")) is not None
    tiles.append(Tile("Horizon", f"step {horizon}" if known else "—", str(reason or "") if known else horizon))
    tiles.append(_budget_tile(record))
    return tiles


def comparison(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return header and one row per assessment: what was assessed, the forecast at the end, horizon and verdict."""
    header = ["Model", "Safety set", "Tuning set", "Steps", "Margin change at the end", "Safety KL at the end"]
    header += ["Refusal rate at the end", "Horizon", "Verdict"]
    rows = []
    for record in records:
        row = [show(record, f"{part}.name") for part in ("model", "safety", "tuning")]
        row += [show(record, "recipe.steps")]
        row += [_end_text(record, quantity) for quantity in QUANTITIES]
        horizon = number(find(record, "forecast.horizon_steps"))
        row += [missing(record, "forecast.horizon_steps") if horizon is None else f"step {setting_text(horizon)}"]
        rows.append([*row, verdict_of(record)[1]])
    return header, rows


def _end_text(record: Record, quantity: str) -> str:
    curve = read_curve(record, quantity)
    text = None if curve is None or not curve.value else point_text(curve, -1)
    if curve is None or text is None:
        return missing(record, f"forecast.{quantity}")
    text = f"{text} {curve.unit}".strip()
    if quantity == "margin":
        change = change_text(curve, -1)
        text = f"{change} {curve.unit}, to {text}" if change is not None else f"to {text}; aligned model not measured"
    beyond = curve.horizon is not None and not curve.claimed_to_the_end
    return f"{text}; beyond the horizon, not claimed" if beyond else text


def _budget_tile(record: Record) -> Tile:
    held = find(record, "forecast.steps_to_budget")
    if not isinstance(held, Mapping) or number(held.get("value")) is None:
        path = "forecast.steps_to_budget.value" if isinstance(held, Mapping) else "forecast.steps_to_budget"
        return Tile("Steps to the budget", "—", missing(record, path))
    quantity = str(held.get("quantity") or "")
    note = f"budget {show(record, 'forecast.steps_to_budget.budget', setting=True)}"
    note += f" on {QUANTITIES.get(quantity, words(quantity)).lower()}" if quantity else ""
    horizon, step = number(find(record, "forecast.horizon_steps")), number(held.get("value"))
    if horizon is not None and step is not None and step > horizon:
        note += "; beyond the horizon, not claimed"
    return Tile("Steps to the budget", show(record, "forecast.steps_to_budget"), note)
