"""What a tracked run has to say: measured curves, their exponent, the path, the alarm, and the forecast beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tiltmeter.errors import DataError, InputError
from tiltmeter.geometry.exponent import fit_exponent
from tiltmeter.geometry.forecast import mean_interval
from tiltmeter.jobs.record import Reasons
from tiltmeter.store import read_record
from tiltmeter.tracking.path import path_shape
from tiltmeter.tracking.tracker import SKETCHES, Tracker

SCHEMA = "tiltmeter/track/1"

#: Safety KL below this is rounding in float32, nats per token.
FLOOR = 1e-8

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Track:
    """A run that was measured.

    Attributes:
        record: everything, as plain values (schema tiltmeter/track/1).
        arrays: per-prompt curves and the path of the weights.
        over_budget: whether a budget that the user gave was exceeded.
    """

    record: dict[str, Any]
    arrays: dict[str, Tensor]
    over_budget: bool


def curves_of(rows: Sequence[Row], level: float, why: Reasons) -> dict[str, Any]:
    """Measured curves with intervals over prompts; every null with its row's own reason."""
    kl, margin = (torch.tensor([row["per_prompt"][key] for row in rows]) for key in ("safety_kl", "margin"))
    few = "one prompt gives no interval"
    out: dict[str, Any] = {"steps": [row["step"] for row in rows]}
    for key, values, unit in (
        ("safety_kl", kl, "nats per token"),
        ("margin", margin, "nats"),
        ("margin_change", margin - margin[0], "nats"),
    ):
        low, high = mean_interval(values.double(), level)
        ends = {"low": low.tolist(), "high": high.tolist()}
        out[key] = {"value": values.double().mean(-1).tolist(), "unit": unit}
        for end, points in ends.items():
            named = [why.number(f"curves.{key}.{end}.{i}", x, few) for i, x in enumerate(points)]
            out[key][end] = named
    out["margin"]["anchor"] = out["margin"]["value"][0]
    for key, unit in (
        ("flow_time", "sum of learning rates"),
        ("refusal_rate", "share"),
        ("drift_energy", "nats, second order"),
        ("drift_outside", "parameter units"),
        ("subspace_overlap", "mean squared cosine"),
        ("commutator_defect", "per parameter unit"),
        ("commutator_inside", "share of its square inside the safety subspace"),
        ("weight_change", "parameter units"),
        ("task_loss", "nats per token"),
    ):
        out[key] = {
            "value": [_known(row, key, f"curves.{key}.value.{i}", why) for i, row in enumerate(rows)],
            "unit": unit,
        }
    return out


def _known(row: Row, key: str, path: str, why: Reasons) -> float | None:
    if row[key] is None:
        why[path] = str(row["reasons"][key])
        return None
    return float(row[key])


def exponent_of(rows: Sequence[Row], level: float, why: Reasons) -> dict[str, Any]:
    """Exponent of safety KL over flow time, fitted over a window that the data choose."""
    points: list[tuple[float, float]] = []
    for row in rows:  # flow time stands still where the learning rate is zero
        if row["flow_time"] and row["safety_kl"] > FLOOR and (not points or row["flow_time"] > points[-1][0]):
            points.append((row["flow_time"], row["safety_kl"]))
    table = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    fit = fit_exponent(table[:, 0], table[:, 1], 0.0, level)
    none = fit.reason or "not fitted"
    window = fit.window or (math.nan, math.nan)
    out = {name: why.number(f"exponent.{name}", getattr(fit, name), none) for name in ("low", "high")}
    return {
        "value": why.number("exponent.value", fit.exponent, none),
        **out,
        "from": why.number("exponent.from", window[0], none),
        "to": why.number("exponent.to", window[1], none),
        "points": fit.points,
        "unit": "exponent of flow time",
        "note": fit.reason or "",
    }


def path_of(tracker: Tracker, why: Reasons) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Principal components of the weight path, from the sketches of every measured step."""
    files = [tracker.folder / SKETCHES / f"{row['step']:09d}.safetensors" for row in tracker.rows]
    held = [
        (row["step"], load_file(file)["sketch"]) for row, file in zip(tracker.rows, files, strict=True) if file.exists()
    ]
    values: dict[str, Any] = {"points": len(held), "method": "count sketch, 8191 buckets"}
    try:
        shape = path_shape(torch.stack([sketch for _, sketch in held]) if held else torch.zeros(0, 1))
    except DataError as error:
        for name in ("pc1_share", "pc2_share", "straightness"):
            values[name] = why.number(f"path.{name}", None, str(error))
        return values, {}
    values["pc1_share"], values["pc2_share"] = (float(share) for share in shape.shares[:2])
    values["straightness"] = shape.straightness
    values["steps"], values["positions"] = [step for step, _ in held], shape.positions[:, :2].tolist()
    steps = torch.tensor([step for step, _ in held])
    return values, {"path.steps": steps, "path.positions": shape.positions.contiguous()}


def read_assessment(folder: Path) -> dict[str, Any]:
    """The record of an assessment.

    Raises:
        InputError: the folder holds another kind of result.
    """
    record, _ = read_record(folder)
    if not record["schema"].startswith("tiltmeter/assessment/"):
        raise InputError(f"{folder} holds a {record['schema']}, expected an assessment")
    return record


def check_same_run(assessment: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to lay a forecast beside a run that it does not speak of.

    Raises:
        InputError: model, data or recipe differ; names the first difference.
    """
    for part, keys in (("model", ("digest",)), ("safety", ("digest",)), ("tuning", ("digest",)), ("recipe", ())):
        there, here = assessment[part], json.loads(json.dumps(run[part]))  # as it is read back: lists, no tuples
        for key in keys or sorted(there.keys() & here.keys()):
            if there[key] != here[key]:
                raise InputError(
                    f"the assessment speaks of another run: {part}.{key} was {there[key]!r}, here it is {here[key]!r}. "
                    "Assess what is run, or leave --assessment out."
                )


def comparison_of(assessment: Mapping[str, Any], curves: Mapping[str, Any], why: Reasons) -> dict[str, Any]:
    """Predicted against measured at every step of the forecast that the run came to, on the forecast's own prompts.

    The intervals of KL and margin leave the draw of prompts out; an older assessment has only those that do not.
    """
    forecast = {**assessment["forecast"], **assessment["forecast"].get("same_prompts", {})}
    places = {step: place for place, step in enumerate(curves["steps"])}
    met = [(index, places[step]) for index, step in enumerate(forecast["steps"]) if step in places]
    out: dict[str, Any] = {
        "created": assessment["created"],
        "steps": [curves["steps"][place] for _, place in met],
        "horizon_steps": forecast["horizon_steps"],
    }
    horizon = forecast["horizon_steps"]
    if horizon is None:
        why["comparison.horizon_steps"] = assessment["reasons"]["forecast.horizon_steps"]
    for key in ("margin_change", "safety_kl", "refusal_rate"):
        path = f"comparison.{key}"
        missing = "not forecast or not measured"
        table: dict[str, list[Any]] = {"predicted": [], "low": [], "high": [], "measured": [], "inside": []}
        for number, (index, place) in enumerate(met):
            point = {end: forecast[key][end][index] for end in ("value", "low", "high")}
            seen = curves[key]["value"][place]
            known = None not in (point["low"], point["high"], seen)
            inside = point["low"] <= seen <= point["high"] if known else None
            for name, value in zip(table, (*point.values(), seen, inside), strict=True):
                table[name].append(value)
                if value is None:
                    why[f"{path}.{name}.{number}"] = missing
        out[key] = {**table, "unit": forecast[key]["unit"]}
    claimed = [i for i, step in enumerate(out["steps"]) if horizon is not None and step <= horizon]
    judged = [out[key]["inside"][i] for key in ("margin_change", "safety_kl") for i in claimed]
    out["claimed_points"] = sum(inside is not None for inside in judged)
    out["claimed_inside"] = sum(inside is True for inside in judged)
    return out
