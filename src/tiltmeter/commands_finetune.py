"""What `tiltmeter finetune` does between parsing and printing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from transformers.utils import logging as transformers_logging

from tiltmeter.commands import Ticker, changed, duration
from tiltmeter.errors import InputError
from tiltmeter.jobs.finetune import finetune as run_finetune
from tiltmeter.jobs.guarding import GuardOptions
from tiltmeter.jobs.inputs import open_rows
from tiltmeter.jobs.recipe import Recipe, read_arguments, recipe_of
from tiltmeter.jobs.track import Track
from tiltmeter.jobs.training import TrainerName
from tiltmeter.lm.processes import speaks
from tiltmeter.report.track_page import write_track_page
from tiltmeter.tracking.alarm import Budgets
from tiltmeter.tracking.anchor import TrackerOptions


def recipe_and_arguments(file: Path | None, given: Mapping[str, Any], rows: int) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a file, or transformers' own defaults, changed by the command line; and the file's fields.

    Raises:
        RecipeError: the file or an option cannot be used.
    """
    arguments = {} if file is None else read_arguments(file)
    told = dict(arguments)
    if given["steps"] is not None:
        told["max_steps"] = given["steps"]
    if given["batch_size"] is not None:  # epochs are turned into steps with it
        told |= {"per_device_train_batch_size": given["batch_size"], "gradient_accumulation_steps": 1}
    return changed(recipe_of(told, rows), given), arguments


def finetune(
    model: str,
    safety: str,
    tuning: str,
    file: Path | None,
    given: Mapping[str, Any],
    tracking: Mapping[str, Any],
    limits: Mapping[str, float | None],
    running: Mapping[str, Any],
    out: Path,
    ticker: Ticker,
) -> Track:
    """Run one fine-tune; everything goes to `out`."""
    if running["trainer"] not in get_args(TrainerName):
        raise InputError(f"unknown --trainer {running['trainer']!r}: expected {' or '.join(get_args(TrainerName))}")
    recipe, arguments = recipe_and_arguments(file, given, len(open_rows(tuning).rows))
    options = replace(TrackerOptions(), **{key: value for key, value in tracking.items() if value is not None})
    if limits["refusal"] is not None and not options.refusal_every:
        options = replace(options, refusal_every=1)  # a budget that is never looked at would never be exceeded
    transformers_logging.set_verbosity_error()
    asked = running["guard"]
    kl = 0.05 if limits["kl"] is None else limits["kl"]
    guard = None if asked is None else GuardOptions(asked[0], asked[1], kl, *asked[2:])
    result = run_finetune(
        model,
        safety,
        tuning,
        recipe,
        out,
        arguments=arguments,
        options=options,
        budgets=Budgets(**limits),
        **{**running, "trainer": cast("TrainerName", running["trainer"]), "guard": guard},
        report=ticker.report,
    )
    if speaks():
        write_track_page([result.record], out / "index.html", f"{model} fine-tuned on {tuning}")
    return result


def lines(record: Mapping[str, Any]) -> list[str]:
    """The ten lines of a run."""
    curves, run, over = record["curves"], record["run"], record["overhead"]
    last = len(curves["steps"]) - 1
    out = [f"run         {run['steps']} steps" + (", stopped by the alarm" if run["stopped_early"] else "")]
    for key, label, form in (
        ("margin_change", "margin", "{:+.3g}"),
        ("safety_kl", "safety KL", "{:.3g}"),
    ):
        curve = curves[key]
        ends = [_text(curve[end][last], form) for end in ("value", "low", "high")]
        out.append(f"{label:<12}{ends[0]} ({ends[1]} to {ends[2]}) {curve['unit']} at step {curves['steps'][last]}")
    rates = [rate for rate in curves["refusal_rate"]["value"] if rate is not None]
    if rates:
        out.append(f"refusals    from {rates[0]:.2f} to {rates[-1]:.2f}")
    fit = record["exponent"]
    if fit["value"] is None:
        out.append(f"exponent    not told: {record['reasons']['exponent.value']}")
    else:
        span = f"flow time {fit['from']:.2g} to {fit['to']:.2g}"
        low, high = _text(fit["low"], "{:.2f}"), _text(fit["high"], "{:.2f}")
        out.append(f"exponent    {fit['value']:.2f} ({low} to {high}) over {span}")
    energy, outside = curves["drift_energy"]["value"][last], curves["drift_outside"]["value"][last]
    out.append(f"drift       {_text(energy)} nats inside the safety subspace, {_text(outside)} outside")
    out.append(f"path        first principal component {_text(record['path']['pc1_share'], '{:.0%}')} of the variance")
    if record["comparison"] is not None:
        told = record["comparison"]
        claimed = (
            f"{told['claimed_inside']} of {told['claimed_points']} measured points within the horizon "
            "lie in their interval"
        )
        out.append(
            f"forecast    {claimed if told['horizon_steps'] is not None else 'claims no horizon, and no interval'}"
        )
    measuring = duration(over["measuring_seconds"])
    out.append(
        f"overhead    {_text(over['share_at_interval'], '{:.1%}')} of a step at the interval of {over['every']} steps; "
        f"{measuring} in all, {_text(over['share'], '{:.0%}')} of the training time with the dense start"
    )
    out.append(f"alarm       {record['alarm']['text']}")
    return out


def _text(value: float | None, form: str = "{:.3g}") -> str:
    return "?" if value is None else form.format(value)
