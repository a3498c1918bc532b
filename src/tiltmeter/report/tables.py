"""The tables of the page that have a shape of their own: forecast, paths, layers, data, cost, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltmeter.report.fields import Curve, Record, find, missing, point_text, show, words, write
from tiltmeter.report.numbers import number, setting_text, share_of, text_of
from tiltmeter.report.values import rows_of


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

    def of(key: str, above: str = "recipe") -> str:
        # what was left to its default is null; the reason reads as the setting
        return show(record, f"{above}.{key}", setting=True).removeprefix("not measured: ")

    parts = [f"{of('regime')}, {of('optimizer')}", f"learning rate {of('learning_rate')} ({of('schedule')})"]
    parts += [f"{of('steps')} steps of {of('batch_size')} rows"]
    if isinstance(lora := find(record, "space.lora"), Mapping):
        parts.append("LoRA " + ", ".join(f"{key} {of(key, 'space.lora')}" for key in lora))
    chosen = (("warmup_steps", "warm-up"), ("weight_decay", "weight decay"), ("max_grad_norm", "gradient norm at most"))
    parts += [f"{label} {of(key)}" for key, label in chosen if number(recipe.get(key))]
    return "; ".join(parts)


def _column_text(record: Record, held: Any, path: str) -> str:
    """Write a number of a column, all to three digits, zeros at the end included."""
    value = number(held)
    return missing(record, path) if value is None else text_of(value)
