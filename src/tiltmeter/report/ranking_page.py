"""The page of a ranking: sets with intervals and chances, or rows of one set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltmeter.errors import DataError
from tiltmeter.report import tables
from tiltmeter.report.fields import Record, find, missing
from tiltmeter.report.numbers import interval_text, lone_text, number, setting_text
from tiltmeter.report.page import style, template_of
from tiltmeter.store import write_text

#: Rows shown at either end of a ranking of rows.
_SHOWN = 20


def write_ranking_page(record: Record, path: Path, title: str) -> None:
    """Write the page of a ranking; an older page at `path` is replaced in one step.

    Raises:
        DataError: the record has another schema.
    """
    write_text(Path(path), render_ranking_page(record, title))


def render_ranking_page(record: Record, title: str) -> str:
    """Return the page as text; the same record gives the same page, byte for byte."""
    if not str(record.get("schema")).startswith("tiltmeter/ranking/"):
        raise DataError(f"this page shows a ranking; the record has the schema {record.get('schema')!r}")
    held = [_rows(record)] if find(record, "sets") is None else [_sets(record), _wins(record)]
    facts = [("Model", str(record["model"]["name"])), ("Safety set", str(record["safety"]["name"]))]
    recipe = tables.recipe_line({**record, "space": {"lora": find(record, "recipe.lora")}})
    unknown = any(each["noise"] is None for each in find(record, "sets") or [])
    chances = "safety prompts alone" if unknown else "safety prompts, tuning groups and the luck of one run's batches"
    return template_of("ranking.html").render(
        title=title, style=style(), facts=facts, recipe=recipe, tables=held, chances=chances
    )


def _sets(record: Record) -> dict[str, Any]:
    rows = []
    for place, each in enumerate(record["sets"]):
        row = [str(each["name"])]
        for key in ("margin_change", "safety_kl"):
            ends = [number(each[key][end]) for end in ("value", "low", "high")]
            told = ends[0]
            row.append(
                missing(record, f"sets.{place}.{key}") if told is None else interval_text(told, ends[1], ends[2])
            )
        chance = number(each["above_next"])
        row += [f"{each['worst']:.0%}", "" if chance is None else f"{chance:.0%}"]
        horizon = number(each["horizon_steps"])
        shown = missing(record, f"sets.{place}.horizon_steps") if horizon is None else setting_text(horizon)
        rows.append([*row, shown, str(each["text"])])
    header = ["Tuning set", "Margin change, nats", "Safety KL, nats per token", "Chance of being the worst",
              "Chance of being worse than the next", "Horizon, steps", "Verdict"]  # fmt: skip
    return {"caption": "Most harmful first, at the end of the recipe.", "header": header, "rows": rows}


def _wins(record: Record) -> dict[str, Any]:
    names = [str(each["name"]) for each in record["sets"]]
    rows = [
        [name, *("" if i == j else f"{win:.0%}" for j, win in enumerate(wins))]
        for i, (name, wins) in enumerate(zip(names, record["wins"], strict=True))
    ]
    caption = "Chance that the set of the row lowers the margin more than that of the column."
    return {"caption": caption, "header": ["Tuning set", *names], "rows": rows}


def _rows(record: Record) -> dict[str, Any]:
    held = record["rows"]
    shown = held if len(held) <= 2 * _SHOWN else [*held[:_SHOWN], *held[-_SHOWN:]]
    rows = []
    for each in shown:
        layers = ", ".join(f"{layer['name']} {layer['share']:+.0%}" for layer in each["layers"] or [])
        texts = [lone_text(each["harm"]), lone_text(each["first_order"]), str(each["order"]), layers]
        rows.append([str(each["row"]), *texts])
    caption = f"Rows of {record['tuning']['name']}, most harmful first: {record['unit']}."
    return {"caption": caption, "header": ["Row", "Harm", "First order", "Order", "Layers"], "rows": rows}
