"""The page of the guard comparison: task loss against held-out KL, and what each guard costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tiltmeter.errors import DataError
from tiltmeter.report import svg
from tiltmeter.report.numbers import interval_text, lone_text, setting_text
from tiltmeter.report.page import style, template_of
from tiltmeter.report.plots import canvas, log_ticks
from tiltmeter.store import write_text

Run = Mapping[str, Any]

#: Tokens of an answer that guards look at if nothing else was asked for.
ANSWER_TOKENS = 24

#: Key of a run, and heading of its column; a change has its value inside, and no column where no run has one.
_COLUMNS = (
    ("task_loss", "Task loss, nats per token"),
    ("heldout_kl", "Held-out safety KL, nats per token"),
    ("margin", "Margin, nats"),
    ("refusal_rate", "Refusal rate"),
    ("refusal_change", "Refusals, change from the aligned model"),
    ("over_refusal_rate", "Over-refusal rate"),
    ("over_refusal_change", "Over-refusals, change from the aligned model"),
    ("step_time_ratio", "Step time, times that without"),
    ("extra_memory_gb", "Extra memory, GB"),
)


def write_guards_page(held: Mapping[str, Any], path: Path, title: str) -> None:
    """Write the page of a guard comparison; an older page at `path` is replaced in one step.

    Args:
        held: `runs`, one per guard, strength, set, seed and regime, with the columns above or `refused`; `plans`;
            `note`, if there is something to know.
        path: the HTML file.
        title: the page's heading.

    Raises:
        DataError: no run is in it.
    """
    write_text(Path(path), render_guards_page(held, title))


def render_guards_page(held: Mapping[str, Any], title: str) -> str:
    """Return the page as text; the same runs give the same page, byte for byte."""
    runs = [run for run in held.get("runs", []) if "refused" not in run]
    if not runs:
        raise DataError("a guard comparison needs at least one finished run; run benchmarks/guards.py first")
    plots, tables = [], []
    for place, cell in enumerate(sorted({_cell(run) for run in runs})):
        own = groups_of([run for run in runs if _cell(run) == cell])
        name = f"{cell[1].removeprefix('demo:')}, {cell[2]} ({cell[0]})"
        plots.append(draw_pareto(name, own, f"g{place}"))
        tables.append(guard_table(name, own))
    alone = sum(len(group) == 1 for cell in sorted({_cell(r) for r in runs}) for group in groups_of(
        [r for r in runs if _cell(r) == cell]).values())  # fmt: skip
    models = ", ".join(f"{plan['model']} ({name})" for name, plan in sorted(held.get("plans", {}).items()))
    return template_of("guards.html").render(
        title=title,
        style=style(),
        facts=[("Model", models or "not said"), ("Finished runs", str(len(runs)))],
        notes=[
            *([f"{alone} of the points rest on one seed: one value, no interval."] if alone else []),
            *([str(held["note"])] if "note" in held else []),
        ],
        plots=plots,
        tables=tables,
        refused=[f"{run['guard']}, {run['set']}, {run['regime']}: {run['refused']}" for run in held["runs"]
                 if "refused" in run],
    )  # fmt: skip


def groups_of(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """Runs by guard and strength, the seeds together, in the order of their names."""
    keys = sorted({(guard_name(run), float(run["strength"])) for run in runs})
    return {key: [run for run in runs if (guard_name(run), run["strength"]) == key] for key in keys}


def guard_name(run: Run) -> str:
    """The guard of a run; for `budget`, and where the length is not the usual one, with how much of answers it saw."""
    name, tokens, first = str(run["guard"]), run.get("answer_tokens", ANSWER_TOKENS), run.get("opening_tokens", 0)
    if name == "none":
        return name
    length = [] if tokens == ANSWER_TOKENS else [f"{tokens} tokens"]
    opening = [f"first {first} too"] if first else ["whole answers"] if name == "budget" and not length else []
    return ", ".join([name, *length, *opening])


def with_strength(guard: str, strength: str) -> str:
    """A name that `guard_name` made, with the strength behind the guard itself."""
    name, *length = guard.split(", ")
    return ", ".join([f"{name} {strength}", *length])


def mean_over_seeds(runs: Sequence[Run], key: str) -> tuple[float | None, float | None, float | None]:
    """Mean, smallest and largest value; no ends for a single seed, nothing where no run has it."""
    values = [float(value) for value in (_value(run, key) for run in runs) if value is not None]
    if not values:
        return None, None, None
    ends = (min(values), max(values)) if len(values) > 1 else (None, None)
    return sum(values) / len(values), *ends


def draw_pareto(title: str, groups: Mapping[tuple[str, float], Sequence[Run]], name: str) -> Markup:
    """Draw task loss over held-out KL, one point for a guard and strength, the KL on a logarithmic axis."""
    with canvas(530, 420) as (figure, finish):
        axes = figure.subplots()
        axes.set_xscale("log")
        seen = []
        for (guard, strength), runs in groups.items():
            kl, loss = mean_over_seeds(runs, "heldout_kl"), mean_over_seeds(runs, "task_loss")[0]
            if kl[0] is None or kl[0] <= 0 or loss is None:
                continue
            seen += [x for x in kl if x is not None and x > 0]
            colour = svg.VALUE if guard.startswith("budget") else svg.BUDGET if guard == "none" else svg.MUTED
            if kl[1] is not None and kl[2] is not None and kl[1] > 0:
                axes.plot([kl[1], kl[2]], [loss, loss], color=colour, linewidth=2, alpha=0.4)
            axes.plot([kl[0]], [loss], "D" if guard == "none" else "o", color=colour, markersize=6)
            named = with_strength(guard.replace("_", " "), setting_text(strength))
            text = "unguarded" if guard == "none" else named
            axes.annotate(text, (kl[0], loss), xytext=(5, 3), textcoords="offset points", size=9, color=colour)
        if seen:
            axes.set_xlim(min(seen) / 2, max(seen) * 6)
            log_ticks(axes.xaxis, min(seen) / 2, max(seen) * 6)
        axes.grid()
        axes.set_title(title)
        axes.set_xlabel("held-out safety KL, nats per token (logarithmic)")
        axes.set_ylabel("task loss, nats per token")
        return finish(
            name, f"{title}: task loss over held-out safety KL; the numbers are in the table of the same name."
        )


def _cell(run: Run) -> tuple[str, str, str]:
    return str(run.get("plan", "")), str(run["set"]), str(run["regime"])


def _value(run: Run, key: str) -> float | None:
    held = run.get(key)
    value = held.get("value") if isinstance(held, Mapping) else held
    return None if value is None else float(value)


def guard_table(name: str, groups: Mapping[tuple[str, float], Sequence[Run]]) -> dict[str, Any]:
    """Caption, header and rows: every guard and strength, mean and range over seeds."""
    every = [run for runs in groups.values() for run in runs]
    columns = [
        (key, head)
        for key, head in _COLUMNS
        if not key.endswith("_change") or any(_value(run, key) is not None for run in every)
    ]
    rows = []
    for (guard, strength), runs in groups.items():
        row = [with_strength(guard, setting_text(strength)), str(len(runs))]
        for key, _ in columns:
            value, low, high = mean_over_seeds(runs, key)
            if value is None:
                row.append("not measured")
            else:
                row.append(lone_text(value) if low is None else interval_text(value, low, high))
        rows.append(row)
    return {"caption": name, "header": ["Guard and strength", "Seeds", *(head for _, head in columns)], "rows": rows}
