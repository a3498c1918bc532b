"""The tables of the page: every value of a record with label, unit, interval and, where it is null, the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltmeter.report.fields import QUANTITIES, Curve, Record, find, missing, point_text, show, words, write
from tiltmeter.report.numbers import number, setting_text, share_of, text_of

# Text somebody wrote or a model generated is never shown, whichever record it strays into.
WITHHELD = {"prompt", "prompts", "completion", "completions", "generation", "generations", "message", "messages"}
WITHHELD |= {"conversation", "conversations", "example", "examples", "texts", "response_text", "response_texts"}
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
LABELS = {
    **QUANTITIES,
    "initial_overlap_random": "initial overlap, random direction",
    "gamma_full": "curvature coupling, full",
    "random_direction_kl": "safety KL, random direction",
    "steps_times_learning_rate": "steps times learning rate",
    "split_half_overlap": "overlap of two half samples",
    "random_overlap": "overlap of random directions",
    "rank_90": "directions for 90 % of the trace",
    "fb_equivalents": "forward and backward passes",
    "memory_gb": "memory",
    "peak_memory_gb": "peak memory",
}
MEANING = {
    "aic.initial_overlap": "how fast the first steps move the model along what safety is sensitive to",
    "aic.initial_overlap_random": "the same for a random direction of equal length",
    "aic.curvature_coupling": "how strongly curvature turns the fine-tune towards safety, by the Fisher matrix alone",
    "aic.gamma_full": "the same with the responses' second derivative: the constant of the quartic law",
    "aic.crossover": "flow time at which the coupling overtakes the initial overlap",
    "aic.crossover_steps": "the crossover in steps of this recipe",
    "aic.cross_term": "interference of overlap and coupling; negative speeds the drift up",
    "aic.projected_gradient": "part of the fine-tuning gradient inside the sensitive directions",
    "baselines.gradient_norm": "length of the fine-tuning gradient",
    "baselines.random_direction_kl": "safety KL after as long a move in a random direction",
    "baselines.steps_times_learning_rate": "length of the recipe, whatever the data",
}


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


def forecast_table(record: Record, curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the forecast: step, flow time, every quantity with its interval."""
    header = ["Optimiser step", "Flow time", *(f"{c.name}, {c.unit}" if c.unit else c.name for c in curves)]
    rows = []
    for index, place in enumerate(curves[0].places if curves else ()):
        flow, points = f"forecast.flow_time.{place}", [point_text(record, curve, index) for curve in curves]
        rows.append([setting_text(curves[0].steps[index]), _column_text(record, find(record, flow), flow), *points])
    return header, rows


def path_table(record: Record, curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the single forecasts: step, every quantity on every path; no header without a path."""
    lines = [(curve, path, line) for curve in curves for path, line in curve.paths.items()]
    if not lines:
        return [], []
    rows = []
    for index, place in enumerate(curves[0].places):
        keys = [(line[index], f"forecast.paths.{path}.{curve.quantity}.{place}") for curve, path, line in lines]
        rows.append([setting_text(curves[0].steps[index]), *(_column_text(record, *key) for key in keys)])
    return ["Optimiser step", *(f"{curve.name}, {path}" for curve, path, _ in lines)], rows


def layer_shares(record: Record) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Return the layers' names and, for every quantity measured on at least one, each layer's share of it."""
    held = find(record, "layers")
    layers = [layer if isinstance(layer, Mapping) else {} for layer in held] if isinstance(held, (list, tuple)) else []
    rows = []
    for key, label in (("sensitivity", "Sensitivity"), ("margin_slope", "Margin slope"), ("parameters", "Parameter")):
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
            row.append(_column_text(record, find(record, f"layers.{index}.{key}"), f"layers.{index}.{key}"))
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


def provenance_table(record: Record) -> list[list[str]]:
    """Return where the record comes from: date, versions, machine, seed and the digests of everything read."""
    table = [
        ["Created", show(record, "created")],
        ["tiltmeter", show(record, "tiltmeter")],
        ["Seed", show(record, "seed")],
    ]
    for key in ("versions", "machine"):
        held = rows_of(record, key)
        joined = ", ".join(f"{row.key.partition('.')[2]} {row.text}" for row in held) if len(held) > 1 else held[0].text
        table.append([words(key), joined])
    for key, label in (("model", "Model"), ("space", "Parameters"), ("safety", "Safety set"), ("tuning", "Tuning set")):
        table.append([f"{label}, SHA-256", show(record, f"{key}.digest")])
    return table


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


def _column_text(record: Record, held: Any, path: str) -> str:
    """Write a number of a column, all to three digits, zeros at the end included."""
    value = number(held)
    return missing(record, path) if value is None else text_of(value)


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
