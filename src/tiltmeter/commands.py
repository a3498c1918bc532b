"""What the commands do between parsing and printing; apart from `cli` so that `--help` need not load torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console
from rich.progress import Progress, TaskID
from transformers.utils import logging as transformers_logging

from tiltmeter import store
from tiltmeter.errors import InputError, RecipeError
from tiltmeter.geometry.objective import Passes
from tiltmeter.jobs.assess import Assessment
from tiltmeter.jobs.assess import assess as run_assess
from tiltmeter.jobs.estimate import Estimate
from tiltmeter.jobs.inputs import open_rows
from tiltmeter.jobs.recipe import Lora, Recipe, read_recipe
from tiltmeter.jobs.subject import Options
from tiltmeter.lm.processes import speaks
from tiltmeter.lm.scores import Score

# tiltmeter shows one bar of its own
transformers_logging.disable_progress_bar()


@dataclass
class Ticker:
    """Turns stages and counted passes into a progress bar.

    Attributes:
        progress: the bar.
        console: where the estimate is printed.
    """

    progress: Progress
    console: Console
    task: TaskID | None = None
    passes: Passes | None = None
    planned: float = 0.0
    start: float = 0.0
    prefix: str = ""
    stages: list[str] = field(default_factory=list)

    def report(self, stage: str) -> None:
        """Begin a stage."""
        self.stages.append(stage)
        text = f"{self.prefix}{stage}"
        if self.task is None:
            self.task = self.progress.add_task(text, total=None)
        else:
            self.progress.update(self.task, description=text)

    def announce(self, expected: Estimate) -> None:
        """Print the estimate and give the bar its length."""
        seconds = "" if expected.seconds is None else f", about {duration(expected.seconds)}"
        self.console.print(
            f"{self.prefix}estimate: {expected.fb_equivalents:.1f} forward+backward passes over the data{seconds}, "
            f"{expected.memory_gb:.1f} GB"
        )
        self.planned = sum(expected.passes.tokens.values())
        self.start = 0.0 if self.passes is None else float(sum(self.passes.tokens.values()))
        if self.task is not None:
            self.progress.update(self.task, total=self.planned, completed=0)

    def listen(self, passes: Passes) -> None:
        """Follow these counts."""
        self.passes = passes
        passes.listener = self.tick

    def tick(self) -> None:
        """Move the bar to the tokens counted since the estimate."""
        if self.task is not None and self.passes is not None and self.planned:
            self.progress.update(self.task, completed=sum(self.passes.tokens.values()) - self.start)


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def gigabytes(text: str | None) -> float | None:
    """A size such as "6GB", "6 GB" or "6" as a number of GB.

    Raises:
        InputError: it is none of these.
    """
    if text is None:
        return None
    try:
        return float(text.strip().upper().removesuffix("GB"))
    except ValueError:
        raise InputError(f"--memory must be a size such as 6GB, got {text!r}") from None


def options(**given: Any) -> tuple[Options, dict[str, str | None]]:
    """Options of a job, and the openings apart.

    Raises:
        InputError: an unknown score.
    """
    openings = {name: given.pop(name) for name in ("refusal_opening", "compliance_opening")}
    if given["score"] not in get_args(Score):
        raise InputError(f"unknown --score {given['score']!r}: expected one of {', '.join(get_args(Score))}")
    return Options(**{**given, "score": cast("Score", given["score"])}), openings


def recipe_from(file: Path | None, given: Mapping[str, Any], rows: int) -> Recipe:
    """The recipe of a file, changed by the command line's own options.

    Raises:
        RecipeError: as for `read_recipe`; or neither a file nor steps and a rate were given.
    """
    if file is None and (given["lr"] is None or given["steps"] is None):
        raise RecipeError(
            "expected --recipe training_args.yaml, or --lr and --steps; a forecast needs to know how far the run goes"
        )
    return changed(Recipe(steps=1) if file is None else read_recipe(file, rows), given)


def changed(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """A recipe changed by the options of a command line.

    Raises:
        RecipeError: an option cannot be used.
    """
    names = {"lr": "learning_rate"}
    plain = ("lr", "steps", "batch_size", "optimizer", "schedule", "momentum")
    changes = {names.get(key, key): given[key] for key in plain if given[key] is not None}
    if given["lora_r"] is not None:
        r = int(given["lora_r"])
        targets = tuple(given["lora_target"]) if given["lora_target"] else None
        alpha = 2 * r if given["lora_alpha"] is None else given["lora_alpha"]
        changes["lora"] = Lora(r, float(alpha), targets)
    elif given["lora_alpha"] is not None or given["lora_target"]:
        raise RecipeError("--lora-alpha and --lora-target need --lora-r")
    return replace(recipe, **changes)


def assess(
    model: str,
    safety: str,
    tuning: str,
    file: Path | None,
    given: Mapping[str, Any],
    chosen: tuple[Options, dict[str, str | None]],
    loading: Mapping[str, Any],
    out: Path | None,
    ticker: Ticker,
) -> tuple[Assessment, Path | None]:
    """Run one assessment and store it; returns the result and its folder."""
    recipe = recipe_from(file, given, len(open_rows(tuning).rows))
    opt, openings = chosen

    def run() -> Assessment:
        return run_assess(
            model,
            safety,
            tuning,
            recipe,
            opt,
            refusal_opening=openings["refusal_opening"],
            compliance_opening=openings["compliance_opening"],
            **loading,
            report=ticker.report,
            announce=ticker.announce,
            listen=ticker.listen,
        )

    if out is None or not speaks():
        return run(), None
    with store.new_folder(out) as folder:
        result = run()
        from tiltmeter.report.page import write_page  # drawing is imported when there is something to draw

        write_page([result.record], folder / "index.html", f"{model} on {tuning}")
        store.write_record(folder, result.record, result.arrays)
    return result, out


def lines(record: Mapping[str, Any]) -> list[str]:
    """The ten lines of an assessment."""
    aic, forecast, spectrum = record["aic"], record["forecast"], record["spectrum"]
    out = []
    if spectrum is None:
        out.append(f"spectrum    not measured: {record['reasons']['spectrum']}")
    else:
        half = _number(spectrum["split_half_overlap"]["value"], "{:.2f}")
        out.append(
            f"spectrum    {spectrum['rank_90'] or '?'} of {record['safety']['used']} directions hold 90 % of the score "
            f"energy; split-half overlap of the top {spectrum['rank']}: {half}"
        )
    e0, gamma = aic["initial_overlap"], aic["curvature_coupling"]
    null = aic["initial_overlap_random"]
    if e0 is None:
        out.append(f"overlap     not measured: {record['reasons']['aic.initial_overlap']}")
    else:
        out.append(
            f"overlap     e0 = {_interval(e0)} {null['unit']} (random direction: {_number(null['value'], '{:.2g}')})"
        )
    crossover = aic["crossover"]
    when = "not told" if crossover is None or crossover["value"] is None else f"{crossover['value']:.2g} of flow time"
    if gamma is None:
        out.append(f"coupling    not measured: {record['reasons']['aic.curvature_coupling']}")
    else:
        out.append(f"coupling    gamma = {_interval(gamma)} nats^1/2 per flow time squared; crossover at {when}")
    order = forecast["leading_order"]
    if order["value"] is None:
        out.append(f"order       not told: {record['reasons']['forecast.leading_order.value']}")
    else:
        end = "the recipe" if forecast["horizon_steps"] is None else "what is claimed"
        out.append(f"order       safety KL grows as flow time^{_interval(order)} at the end of {end}")
    for name, label in (("margin_change", "margin"), ("safety_kl", "safety KL"), ("refusal_rate", "refusals")):
        out.append(f"{label:<12}" + _at_end_and_horizon(forecast, name, record["recipe"]["steps"]))
    budgets = []
    for quantity, crossing in (forecast["steps_to_budget"] or {}).items():
        when = "at" if len(forecast["steps"]) > 1 else "by"  # between the first and the last nothing was read
        value = "not within the recipe" if crossing["value"] is None else f"{when} step {crossing['value']:.0f}"
        beyond = "no horizon" if forecast["horizon_steps"] is None else "beyond the horizon"
        mark = "" if crossing["value"] is None or crossing["inside_horizon"] else f" ({beyond}: not claimed)"
        budgets.append(f"{quantity} {crossing['budget']:g} used up {value}{mark}")
    if budgets:
        out.append(f"budget      {'; '.join(budgets)}")
    ranked = [layer for layer in record["layers"] if layer["sensitivity"] is not None]
    ranked.sort(key=lambda layer: -layer["sensitivity"])
    if ranked:
        top = ", ".join(f"{layer['name']} {layer['sensitivity']:.0%}" for layer in ranked[:5])
        out.append(f"layers      most sensitive: {top}")
    out.append(record["verdict"]["text"])
    return out


def _at_end_and_horizon(forecast: Mapping[str, Any], name: str, steps: int) -> str:
    curve, grid, horizon = forecast[name], forecast["steps"], forecast["horizon_steps"]
    unit = "" if curve["unit"] == "share" else f" {curve['unit']}"
    sign = "+" if name == "margin_change" else ""

    def at(index: int) -> str:
        parts = [_number(curve[key][index], "{:" + sign + ".3g}") for key in ("value", "low", "high")]
        return f"{parts[0]} ({parts[1]} to {parts[2]}){unit}"

    end = f"{at(-1)} at step {steps}"
    if horizon is None:
        return f"{end}; no horizon was looked for"
    if horizon >= grid[-1]:
        return end
    if horizon == 0:
        return f"{end}, but not claimed: the horizon is before the first evaluated step"
    inside = max(i for i, step in enumerate(grid) if step <= horizon)
    return f"{at(inside)} at step {grid[inside]}, the horizon; not claimed: {end}"


def _interval(measured: Mapping[str, Any] | None) -> str:
    if measured is None or measured["value"] is None:
        return "not told from zero"
    return f"{measured['value']:.3g} ({_number(measured['low'])} to {_number(measured['high'])})"


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "?" if value is None else form.format(value)
