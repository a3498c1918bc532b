"""The tables of the page: every value of a record with label, unit, interval and, where it is null, the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltmeter.report.fields import QUANTITIES, Curve, Record, find, missing, point_text, show, words, write
from tiltmeter.report.numbers import number, setting_text, share_of, text_of

# Text somebody wrote or a model generated is never shown, whichever record it strays into.
WITHHELD = frozenset(
    "prompt prompts completion completions generation generations message messages text_rows response_text "
    "response_texts texts examples conversation conversations".split()
)
_OWN_TABLE = {"layers", "reasons", "schema"}
_CHOSEN = ("recipe.", "space.lora", "seed", "versions.")
_LONGEST = 300
UNITS = {
    "model.parameters": "parameters",
    "space.size": "parameters",
    "machine.memory_gb": "GB",
    "safety.tokens": "tokens",
    "safety.supervised": "tokens",
    "tuning.tokens": "tokens",
    "tuning.supervised": "tokens",
    "tuning.loss": "nats per token",
    "recipe.warmup_steps": "optimiser steps",
    "recipe.steps": "optimiser steps",
    "recipe.batch_size": "rows",
    "spectrum.eigenvalues": "nats per parameter unit squared",
    "spectrum.trace": "nats per parameter unit squared",
    "spectrum.rank_90": "directions",
    "spectrum.rank": "directions",
    "forecast.steps": "optimiser steps",
    "forecast.flow_time": "flow time",
    "forecast.horizon_steps": "optimiser steps",
    "forecast.steps_to_budget": "optimiser steps",
    "cost.fb_equivalents": "forward and backward passes",
    "cost.estimated.fb_equivalents": "forward and backward passes",
    "cost.seconds": "s",
    "cost.estimated.seconds": "s",
    "cost.peak_memory_gb": "GB",
    "cost.estimated.memory_gb": "GB",
}
MEANING = {
    "initial_overlap": "how fast the first steps move the model along what safety is sensitive to",
    "initial_overlap_random": "the same for a random direction of equal length",
    "curvature_coupling": "how strongly curvature turns the fine-tune towards safety, by the Fisher matrix alone",
    "gamma_full": "the same with the second derivative of the responses: the constant of the quartic law",
    "crossover": "flow time at which the coupling overtakes the initial overlap",
    "crossover_steps": "the crossover in steps of this recipe",
    "cross_term": "interference of overlap and coupling; negative speeds the drift up",
    "projected_gradient": "part of the fine-tuning gradient inside the sensitive directions",
    "gradient_norm": "length of the fine-tuning gradient",
    "random_direction_kl": "safety KL after as long a move in a random direction",
    "steps_times_learning_rate": "length of the recipe, whatever the data",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: label, value as text, its key in the record, and whether it is missing."""

    label: str
    text: str
    key: str
    known: bool = True


def rows_of(record: Record, path: str) -> list[Row]:
    """Return one row for every value below a dotted path."""
    held = find(record, path)
    return list(_walk(record, held, tuple(path.split(".")), ""))


def everything(record: Record, curves: Sequence[Curve]) -> list[tuple[str, list[Row]]]:
    """Return all values of a record by its sections, but for those the tables of layers and of `curves` show."""
    shown = {"forecast.steps", "forecast.flow_time"} if curves else set()
    shown |= {f"forecast.{curve.quantity}.{part}" for curve in curves for part in ("value", "low", "high")}
    shown |= {f"forecast.paths.{path}.{curve.quantity}" for curve in curves for path in curve.paths}
    single = [Row(words(key), show(record, key, setting=True), key) for key in record if _is_single(record, key)]
    groups = [("General", single)]
    for key in record:
        if key not in _OWN_TABLE and not _is_single(record, key):
            groups.append((words(key), [row for row in rows_of(record, key) if row.key not in shown]))
    return [(title, rows) for title, rows in groups if rows]


def forecast_table(curves: Sequence[Curve], flow_time: Sequence[float | None]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows (step, flow time, every curve and every single path) of the forecast."""
    if not curves:
        return [], []
    header = ["Optimiser step", "Flow time"]
    for curve in curves:
        unit = f", {curve.unit}" if curve.unit else ""
        header += [f"{curve.name}{unit}", *(f"{curve.name}, {path} path" for path in curve.paths)]
    rows = []
    for index, step in enumerate(curves[0].steps):
        flow = flow_time[index] if index < len(flow_time) else None
        row = [setting_text(step), "not measured" if flow is None else text_of(flow)]
        for curve in curves:
            row.append(point_text(curve, index) or "not measured")
            points = [line[index] for line in curve.paths.values()]
            row += ["not measured" if point is None else text_of(point) for point in points]
        rows.append(row)
    return header, rows


def layer_shares(record: Record) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Return the layers' names and, for every quantity measured on at least one, each layer's share of it."""
    held = find(record, "layers")
    layers = [layer if isinstance(layer, Mapping) else {} for layer in held] if isinstance(held, (list, tuple)) else []
    rows = []
    for key, label in (("sensitivity", "Sensitivity"), ("margin_slope", "Margin slope"), ("parameters", "Parameters")):
        shares = share_of(number(layer.get(key)) for layer in layers)
        if key != "parameters" or any(share is not None for share in shares):
            rows.append((f"{label} share", shares))
    return [str(layer.get("name") or index) for index, layer in enumerate(layers)], rows


def layer_table(record: Record) -> list[list[str]]:
    """Return one row per layer: name, then value and share of sensitivity and margin slope, then parameters."""
    names, rows = layer_shares(record)
    shares = dict(rows)
    table = []
    for index, name in enumerate(names):
        row = [name]
        for key, label in (("sensitivity", "Sensitivity share"), ("margin_slope", "Margin slope share")):
            share = shares[label][index]
            row.append(show(record, f"layers.{index}.{key}"))
            row.append("not measured" if share is None else f"{100 * share:.1f} %")
        table.append([*row, show(record, f"layers.{index}.parameters")])
    return table


def data_table(record: Record) -> list[list[str]]:
    """Return one row per data set: name, rows read, used, truncated, skipped and why, tokens, supervised tokens."""
    table = []
    for key, label in (("safety", "Safety"), ("tuning", "Tuning")):
        skipped = find(record, f"{key}.skipped")
        reasons = skipped.items() if isinstance(skipped, Mapping) else ()
        why = (
            ", ".join(f"{write(record, count, f'{key}.skipped.{reason}')} ({reason})" for reason, count in reasons)
            or "none"
        )
        counts = [show(record, f"{key}.{column}") for column in ("name", "rows_read", "used", "truncated")]
        sizes = [show(record, f"{key}.{column}") for column in ("tokens", "supervised")]
        table.append([label, *counts, why if skipped is not None else missing(record, f"{key}.skipped"), *sizes])
    return table


def cost_table(record: Record) -> list[list[str]]:
    """Return estimated and used cost: name, estimate, use."""
    keys = (("Forward and backward passes", "fb_equivalents", "fb_equivalents"), ("Wall time", "seconds", "seconds"),
            ("Peak memory", "memory_gb", "peak_memory_gb"))  # fmt: skip
    units = ("", "s", "GB")
    return [
        [label, show(record, f"cost.estimated.{before}", unit), show(record, f"cost.{after}", unit)]
        for (label, before, after), unit in zip(keys, units, strict=True)
    ]


def recipe_line(record: Record) -> str:
    """Return the recipe in one line."""
    recipe = find(record, "recipe")
    if not isinstance(recipe, Mapping):
        return missing(record, "recipe")

    def of(key: str) -> str:
        return show(record, f"recipe.{key}", setting=True)

    parts = [f"{of('regime')}, {of('optimizer')}", f"learning rate {of('learning_rate')} ({of('schedule')})"]
    parts += [f"{of('steps')} steps of {of('batch_size')} rows"]
    if isinstance(lora := find(record, "space.lora"), Mapping):
        parts.append("LoRA " + ", ".join(f"{key} {show(record, f'space.lora.{key}', setting=True)}" for key in lora))
    chosen = (("warmup_steps", "warm-up"), ("weight_decay", "weight decay"), ("max_grad_norm", "gradient norm at most"))
    parts += [f"{label} {of(key)}" for key, label in chosen if number(recipe.get(key))]
    return "; ".join(parts)


def _is_single(record: Record, key: str) -> bool:
    return key not in WITHHELD | _OWN_TABLE and isinstance(record[key], (str, int, float))


def _walk(record: Record, held: Any, trail: tuple[str, ...], unit: str) -> Iterator[Row]:
    path = ".".join(trail)
    label = words(" › ".join(QUANTITIES.get(key, key.replace("_", " ")) for key in trail[1:] or trail))
    unit = UNITS.get(path, unit)
    if trail[-1] in WITHHELD:
        yield Row(label, "withheld: prompts and generated text are never shown", path, known=False)
    elif isinstance(held, Mapping) and "value" in held:
        unit = str(held.get("unit") or unit)
        curve = isinstance(held["value"], (list, tuple))
        if not curve:
            yield Row(label, write(record, held, path, unit), path, known=number(held["value"]) is not None)
        for key in held:
            if key not in ({"unit"} if curve else {"value", "low", "high", "unit"}):
                yield from _walk(record, held[key], (*trail, str(key)), unit)
    elif isinstance(held, Mapping) and held:
        for key, part in held.items():
            yield from _walk(record, part, (*trail, str(key)), "")
    elif isinstance(held, (list, tuple)) and any(isinstance(part, Mapping) for part in held):
        for index, part in enumerate(held):
            yield from _walk(record, part, (*trail, str(index)), "")
    else:
        text = "none" if isinstance(held, Mapping) else write(record, held, path, unit, path.startswith(_CHOSEN))
        clip = isinstance(held, str) and len(text) > _LONGEST
        yield Row(label, f"{text[:_LONGEST]}…" if clip else text, path, known=held is not None)
