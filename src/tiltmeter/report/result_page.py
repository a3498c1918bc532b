"""The page of evaluations and audits: a verdict, tables side by side with the base, plots, and every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tiltmeter.errors import DataError
from tiltmeter.report import values
from tiltmeter.report.fields import Record, find, level_text, missing, show, words
from tiltmeter.report.numbers import lone_text, number, numbers, setting_text
from tiltmeter.report.page import style, template_of
from tiltmeter.report.result_plots import draw_bars, draw_depth, draw_scaling
from tiltmeter.store import write_text

KINDS = ("tiltmeter/evaluation/", "tiltmeter/audit/")
_TONES = {
    "refuses": "good",
    "safer": "good",
    "no less safe": "good",
    "held": "good",
    "less safe": "bad",
    "complies": "bad",
    "refuses everything": "bad",
    "worn": "bad",
    "damaged": "bad",
    "collapsed": "bad",
    "cannot tell": "unsure",
}
_MEASURED = {
    "refusal_rate": "Refusal rate",
    "over_refusal": "Over-refusal (harmless prompts)",
    "harm": "Harm",
    "margin": "Refusal margin",
}
_KL = {"safety_kl": "Safety KL", "harmless_kl": "KL on harmless prompts"}
Table = tuple[tuple[str, str], list[str], list[list[str]]]


def write_result_page(records: Sequence[Record], path: Path, title: str) -> None:
    """Write the page of evaluations or audits; an older page at `path` is replaced in one step.

    Raises:
        DataError: no record, or one of another schema.
    """
    write_text(Path(path), render_result_page(records, title))


def render_result_page(records: Sequence[Record], title: str) -> str:
    """Return the page as text; the same records give the same page, byte for byte."""
    if not records:
        raise DataError("a report needs at least one result folder; none was given")
    for record in records:
        if not str(record.get("schema")).startswith(KINDS):
            raise DataError(f"this page shows evaluations and audits; a record has the schema {record.get('schema')!r}")
    views = [_view(record, f"r{place}") for place, record in enumerate(records, 1)]
    return template_of("result.html").render(title=title, style=style(), views=views)


def _view(record: Record, name: str) -> dict[str, Any]:
    audited = str(record["schema"]).startswith("tiltmeter/audit/")
    kind = str(find(record, "verdict.kind"))
    side, base = ("tuned", "base") if audited else ("model", "base")
    tables = [_measured(record, side, base), _answers(record)]
    tables += [_scaling(record), _layers(record)] if audited else [_abilities(record)]
    return {
        "name": name,
        "heading": f"{show(record, 'tuned.name')} against {show(record, 'model.name')}"
        if audited
        else show(record, "model.name"),
        "facts": _facts(record, audited),
        "tone": _TONES.get(kind, "plain"),
        "verdict": words(kind),
        "sentence": show(record, "verdict.text"),
        "plots": _plots(record, name) if audited else [],
        "reading": "Dots: mean over prompts with its interval. Regained: what the tuned model gets back when this "
        "layer alone is put back to the base; the layers need not add up to the whole.",
        "tables": [table for table in tables if table[2]],
        "level": level_text(record),
        "everything": values.everything(record, []),
    }


def _facts(record: Record, audited: bool) -> list[tuple[str, str]]:
    facts = [("Base", show(record, "model.name" if audited else "base.name")), ("Judge", show(record, "judge.name"))]
    if audited:
        facts.append(("Tuned", f"{show(record, 'tuned.name')} ({show(record, 'tuned.kind')})"))
    for key, label in (("safety", "Safety set"), ("harmless", "Harmless set")):
        if find(record, key) is None:
            facts.append((label, missing(record, key)))
        else:
            facts.append((label, f"{show(record, f'{key}.name')}, {show(record, f'{key}.used')} prompts"))
    return facts


def _measured(record: Record, side: str, base: str) -> Table:
    rows = []
    for key, label in _MEASURED.items():
        path = f"measurements.{key}"
        if key in record["measurements"]:
            rows.append([label, *(_cell(record, f"{path}.{part}") for part in (side, base, "change"))])
    rows += [[label, _cell(record, f"measurements.{key}"), "0", ""] for key, label in _KL.items()]
    caption = ("Measured", "With n items; changes are over the items scored for both, with a paired interval.")
    return caption, ["Quantity", words(side), words(base), "Change"], rows


def _cell(record: Record, path: str) -> str:
    held = find(record, path)
    if not isinstance(held, Mapping):
        return missing(record, path)
    n = number(held.get("n"))
    return show(record, path) + ("" if n is None else f"; n {setting_text(n)}")


def _answers(record: Record) -> Table:
    kinds = ("refused", "answered", "undetermined", "unscored")
    rows = [
        [f"{words(side)}, {name}", *(show(record, f"answers.{side}.{name}.{kind}") for kind in kinds)]
        for side, sets in record["answers"].items()
        for name in sets
    ]
    caption = ("Answers", "Undetermined: read, but neither a refusal nor an answer. Unscored: the judge failed.")
    return caption, ["Model and set", *map(words, kinds)], rows


def _abilities(record: Record) -> Table:
    rows = [
        [
            f"{find(record, f'measurements.capability.{place}.name')} ({held['kind']})",
            *(_cell(record, f"measurements.capability.{place}.{part}") for part in ("model", "base", "change")),
        ]
        for place, held in enumerate(find(record, "measurements.capability") or [])
    ]
    caption = ("Abilities", "Changes of perplexity are of its logarithm, in nats per token; below zero is better.")
    return caption, ["Set", "Model", "Base", "Change"], rows


def _scaling(record: Record) -> Table:
    rows = [
        [setting_text(float(alpha)), *(_point(record, f"scaling.{key}", place) for key in ("margin", "safety_kl"))]
        for place, alpha in enumerate(find(record, "scaling.alpha"))
    ]
    caption = ("Scaling", "Weights base + alpha (tuned - base): 0 is the base, 1 the tuned model.")
    return caption, ["Alpha", "Refusal margin, nats", "Safety KL, nats per token"], rows


def _point(record: Record, path: str, place: int) -> str:
    value = number(find(record, f"{path}.value.{place}"))
    return missing(record, f"{path}.value.{place}") if value is None else lone_text(value)


def _layers(record: Record) -> Table:
    rows = []
    for place, layer in enumerate(find(record, "layers")):
        path = f"layers.{place}"
        overlap = missing(record, f"{path}.overlap")
        if layer["overlap"] is not None:
            overlap = f"{lone_text(layer['overlap']['value'])} (z {lone_text(layer['overlap']['z'])})"
        columns = ("overlap_share", "intruders", "intruder_energy", "kl_regained", "margin_regained")
        cells = [show(record, f"{path}.{key}") for key in columns]
        rows.append([str(layer["name"]), show(record, f"{path}.length"), overlap, *cells])
    caption = ("Where in the model", "Overlap: with the layer's own directions. Share: of the whole model's overlap.")
    header = ["Layer", "Change, parameter units", "Overlap", "Share of the overlap", "Intruders", "Intruder energy"]
    return caption, [*header, "KL regained, nats per token", "Margin regained, nats"], rows


def _plots(record: Record, name: str) -> list[Markup]:
    alpha = [float(a) for a in find(record, "scaling.alpha")]
    out = []
    for key, title in (("margin", "Refusal margin, nats"), ("safety_kl", "Safety KL, nats per token")):
        value, low, high = (numbers(find(record, f"scaling.{key}.{end}")) for end in ("value", "low", "high"))
        if any(point is not None for point in value):
            out.append(draw_scaling(title, alpha, value, low, high, f"{name}{key}"))
    layers = find(record, "layers")
    names = [str(layer["name"]).removeprefix("layers.") for layer in layers]
    for key, title in (("margin_regained", "Margin regained, nats"), ("overlap_share", "Share of the overlap")):
        held = numbers([layer[key] for layer in layers])
        if any(point is not None for point in held):
            out.append(draw_bars(title, names, held, f"{name}{key}"))
    sides = [(side, numbers(find(record, f"drift.{side}.relative"))) for side in ("safety", "harmless")]
    ranks = [(side, numbers(find(record, f"drift.{side}.effective_rank"))) for side in ("safety", "harmless")]
    out.append(draw_depth("Drift of hidden states, share", [s for s in sides if s[1]], f"{name}drift"))
    if any(point is not None for _, line in ranks for point in line):
        out.append(draw_depth("Effective rank of the drift", [s for s in ranks if s[1]], f"{name}rank"))
    return out
