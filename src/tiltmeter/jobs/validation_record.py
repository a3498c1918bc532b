"""The summary of a validation as plain values: schema tiltmeter/validation/1."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tiltmeter.jobs.outlook import KL_FLOOR, MARGIN_FLOOR
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.validation_cell import OLDER
from tiltmeter.jobs.validation_plan import Plan
from tiltmeter.jobs.validation_scores import Agreement, agreement, ahead, collapses, size_error
from tiltmeter.lm.measurement import Measurement, share
from tiltmeter.predictors.names import OURS, PREDICTORS

SCHEMA = "tiltmeter/validation/1"

#: Measured quantity -> changes below this are not told from nothing.
FLOORS = {"margin_change": MARGIN_FLOOR, "safety_kl": KL_FLOOR}
PROMPTS = ("held_out", "assessed")
CANARIES = {"margin_change": "canary_margin", "safety_kl": "canary_kl"}

Cell = Mapping[str, Any]


def summary_of(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """The summary of the cells so far; valid from the first one on."""
    why = Reasons()
    level = plan.options.level
    every, cells = cells, [cell for cell in cells if "predicted" in cell]
    planned = len(plan.cells())
    return {
        "schema": SCHEMA,
        **provenance("cpu" if not cells else str(cells[0]["machine"].get("device", "cpu"))),
        "level": level,
        "model": plan.model,
        "safety": {"name": plan.safety, "assessed": plan.assessed, "held_out": plan.held_out},
        "planned": planned,
        "finished": len(every),
        "cells": [_cell(cell, f"cells.{i}", why) for i, cell in enumerate(cells)],
        "predictors": _predictors(cells, level, why),
        "size_error": {prompts: _sizes(cells, prompts, f"size_error.{prompts}", why) for prompts in PROMPTS},
        "coverage": {prompts: _coverage(cells, prompts, f"coverage.{prompts}", why) for prompts in PROMPTS},
        "collapse": _collapse(cells, "collapse", why),
        "cost": _cost(cells, "cost", why),
        "guard_runs": _guard_runs(plan, every, why),
        "guards_refused": [
            {
                "guard": c["guard"]["name"],
                "label": c["guard"].get("label", c["guard"]["name"]),  # older cells name no setting
                "set": c["set"],
                "regime": c["regime"],
                "seed": c["seed"],
                "why": c["refused"],
            }
            for c in every
            if "refused" in c
        ],
        "reasons": dict(why),
    }


def _cell(cell: Cell, path: str, why: Reasons) -> dict[str, Any]:
    kept = ("name", "set", "regime", "seed", "recipe", "predicted", "predictors", "measured", "cost")
    for key, reason in cell["reasons"].items():
        why[f"{path}.{key}"] = reason
    return {key: cell[key] for key in kept}


def _guard_runs(plan: Plan, cells: Sequence[Cell], why: Reasons) -> list[dict[str, Any]]:
    """One row a run, with and without guards, as the guards' own page takes them; empty where the plan has none."""
    free = {(c["regime"], c["set"], c["seed"]): c for c in cells if "predicted" in c and "compared" in c}
    out: list[dict[str, Any]] = []
    for cell in (c for c in cells if "compared" in c):
        path = f"guard_runs.{len(out)}"
        seen, held = cell["measured"]["held_out"], cell["compared"]
        alone = free.get((cell["regime"], cell["set"], cell["seed"]))
        if held["over_refusal_rate"] is None:
            why[f"{path}.over_refusal_rate"] = cell["reasons"]["compared.over_refusal_rate"]
        refused = cell["reasons"].get("measured.held_out.refusal_rate.value", "")
        changes = {
            name: _change(held_change, f"{path}.{name}", cell["reasons"], f"{place}.{name}", why)
            for name, held_change, place in (
                ("refusal_change", seen.get("refusal_change"), "measured.held_out"),
                ("over_refusal_change", held.get("over_refusal_change"), "compared"),
            )
        }
        ratio = None if alone is None else held["step_seconds"] / alone["compared"]["step_seconds"]
        out.append(
            {
                "plan": "validation",
                "guard": cell["guard"]["name"],
                "strength": cell["guard"]["strength"],
                **{key: cell["guard"][key] for key in ("answer_tokens", "opening_tokens") if key in cell["guard"]},
                "set": cell["set"],
                "seed": cell["seed"],
                "regime": cell["regime"],
                "task_loss": held["task_loss"]["after"],
                "heldout_kl": seen["safety_kl"]["value"][-1],
                "margin": seen["margin_anchor"] + seen["margin_change"]["value"][-1],
                "refusal_rate": why.number(f"{path}.refusal_rate", seen["refusal_rate"]["value"], refused),
                "over_refusal_rate": held["over_refusal_rate"],
                **changes,
                "step_time_ratio": why.number(f"{path}.step_time_ratio", ratio, "the run without a guard is not there"),
                "extra_memory_gb": held["extra_memory_gb"],
                "task_loss_before": held["task_loss"]["before"],
            }
        )
    return out


def _change(
    told: Mapping[str, Any] | None, path: str, reasons: Mapping[str, str], place: str, why: Reasons
) -> dict[str, float | None]:
    """Refusals against the aligned model's, with the interval; nothing but a reason in cells of an older version."""
    held = told or {}
    return {
        end: why.number(f"{path}.{end}", held.get(end), reasons.get(f"{place}.{end}", OLDER))
        for end in ("before", "value", "low", "high")
    }


def harm(cell: Cell, quantity: str, prompts: str) -> float:
    """Measured harm at the end of a run: drop of the margin, or KL."""
    value = float(cell["measured"][prompts][quantity]["value"][-1])
    return -value if quantity == "margin_change" else value


def _means(cells: Sequence[Cell], quantity: str, prompts: str) -> dict[tuple[str, str], float]:
    held: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        held.setdefault((cell["regime"], cell["set"]), []).append(harm(cell, quantity, prompts))
    return {key: statistics.fmean(values) for key, values in held.items()}


def _predictors(cells: Sequence[Cell], level: float, why: Reasons) -> dict[str, Any]:
    names = sorted({cell["set"] for cell in cells})
    used = [name for name in PREDICTORS if any(name in cell["predictors"] for cell in cells)]
    measured = {quantity: _means(cells, quantity, "held_out") for quantity in FLOORS}
    found: dict[str, dict[str, Agreement]] = {}
    for name in used:
        values = {(c["regime"], c["set"]): c["predictors"].get(name, {}).get("value") for c in cells}
        told = {key: float(value) for key, value in values.items() if value is not None}
        found[name] = {quantity: agreement(told, measured[quantity], names, level) for quantity in FLOORS}
    out: dict[str, Any] = {}
    for name in used:
        path = f"predictors.{name}"
        held = [(cell, cell["predictors"][name]) for cell in cells if name in cell["predictors"]]
        out[name] = {
            "margin": _agreement(name, found, "margin_change", f"{path}.margin", why),
            "kl": _agreement(name, found, "safety_kl", f"{path}.kl", why),
            "passes": statistics.fmean(risk["passes"] for _, risk in held),
            "steps": statistics.fmean(risk["passes"] * _steps_per_pass(cell) for cell, risk in held),
            "unit": held[0][1]["unit"],
            "ours": name in OURS,
            "unknown": len(cells) - sum(risk["value"] is not None for _, risk in held),
        }
    return out


def _agreement(
    name: str, found: Mapping[str, Mapping[str, Agreement]], quantity: str, path: str, why: Reasons
) -> dict[str, Any]:
    held = found[name][quantity]
    few = "fewer than four sets with different values in every regime so far"
    best = "rehearsal_margin" if quantity == "margin_change" else "rehearsal_kl"
    lead = ahead(found[best][quantity], held) if best in found and name not in OURS else None
    return {
        **{end: why.number(f"{path}.{end}", getattr(held, end), few) for end in ("value", "low", "high")},
        "by_regime": held.by_regime,
        "sets": held.sets,
        "ours_ahead": why.number(f"{path}.ours_ahead", lead, "one of ours" if name in OURS else few),
    }


def _steps_per_pass(cell: Cell) -> float:
    """Training steps that cost as much as one pass over the tuning sample."""
    return float(cell["cost"]["sample_rows"]) / float(cell["recipe"]["batch_size"])


def _points(cell: Cell, prompts: str) -> Iterator[tuple[int, int]]:
    """Places of every forecast step in the predicted and in the measured curves."""
    places = {step: i for i, step in enumerate(cell["measured"][prompts]["steps"])}
    for i, step in enumerate(cell["predicted"]["steps"]):
        if step in places:
            yield i, places[step]


def error_of(cell: Cell, quantity: str, prompts: str, place: int) -> float:
    """Measurement error: what could not be told, and on held-out prompts also the draw of prompts."""
    drawn = cell["measured"][prompts][quantity]["error"][place] if prompts == "held_out" else 0.0
    return max(FLOORS[quantity], float(drawn))


def _sizes(cells: Sequence[Cell], prompts: str, path: str, why: Reasons) -> dict[str, Any]:
    """Median relative errors without a training step, at the horizon and the end, and at the end with a canary."""
    held: dict[str, dict[str, list[float]]] = {
        when: {quantity: [] for quantity in FLOORS} for when in ("horizon", "end", "end_with_canary")
    }
    for cell in cells:
        for quantity in FLOORS:
            curve, seen = cell["predicted"][quantity]["value"], cell["measured"][prompts][quantity]["value"]
            both = [(i, j) for i, j in _points(cell, prompts) if curve[i] is not None]
            inside = [(i, j) for i, j in both if _claimed(cell, i)]
            for when, points in (("horizon", inside), ("end", both)):
                if points:
                    i, j = points[-1]
                    error = size_error(curve[i], seen[j], error_of(cell, quantity, prompts, j))
                    held[when][quantity].append(error)
            canary = cell["predictors"].get(CANARIES[quantity], {}).get("value")
            if canary is not None:
                told = -canary if quantity == "margin_change" else canary
                error = size_error(told, seen[-1], error_of(cell, quantity, prompts, len(seen) - 1))
                held["end_with_canary"][quantity].append(error)
    out: dict[str, Any] = {}
    for when, by in held.items():
        out[when] = {}
        for quantity, errors in by.items():
            middle = statistics.median(errors) if errors else None
            value = why.number(f"{path}.{when}.{quantity}.median", middle, "no cell has one")
            out[when][quantity] = {"median": value, "cells": len(errors), "errors": errors}
    return out


def _claimed(cell: Cell, place: int) -> bool:
    """Whether the step at a place of the forecast lies inside its horizon; nothing does where none was looked for."""
    horizon = cell["predicted"]["horizon_steps"]
    return horizon is not None and cell["predicted"]["steps"][place] <= horizon


def interval_of(predicted: Mapping[str, Any], quantity: str, prompts: str) -> Mapping[str, Any]:
    """The interval that some prompts are judged by: on the assessed ones that without the draw of prompts."""
    held = predicted.get("same_prompts", predicted) if prompts == "assessed" else predicted
    curve: Mapping[str, Any] = held[quantity]
    return curve


def _coverage(cells: Sequence[Cell], prompts: str, path: str, why: Reasons) -> dict[str, Any]:
    """Share of cells whose measurement at the last claimed step lies in the interval, and of all claimed points.

    On the assessed prompts the interval is the one that leaves the draw of prompts out.
    """
    out: dict[str, Any] = {}
    for quantity in FLOORS:
        ends: list[bool] = []
        every: list[bool] = []
        for cell in cells:
            told, seen = cell["predicted"], cell["measured"][prompts][quantity]["value"]
            curve = interval_of(told, quantity, prompts)
            inside = [
                curve["low"][i] <= seen[j] <= curve["high"][i]
                for i, j in _points(cell, prompts)
                if _claimed(cell, i) and curve["low"][i] is not None
            ]
            every += inside
            ends += inside[-1:]
        for key, flags in (("cells", ends), ("points", every)):
            out.setdefault(quantity, {})[key] = _share(sum(flags), len(flags), f"{path}.{quantity}.{key}", why)
    return out


def _collapse(cells: Sequence[Cell], path: str, why: Reasons) -> dict[str, Any]:
    """Collapses on the assessed prompts, which the forecast speaks of."""
    began = [c for c in cells if c["measured"]["assessed"]["below_zero"][0] < 0.5]
    steps = [(c["predicted"]["collapse_step"], c["measured"]["assessed"]["collapse_step"]) for c in began]
    found = collapses(steps)
    return {
        "cells": found.cells,
        "happened": found.happened,
        "foretold": _share(found.foretold, found.happened, f"{path}.foretold", why),
        "false_alarms": _share(found.alarms, found.cells - found.happened, f"{path}.false_alarms", why),
        "dated": _share(found.dated, found.happened, f"{path}.dated", why),
        "left_out": len(cells) - len(began),
    }


def _cost(cells: Sequence[Cell], path: str, why: Reasons) -> dict[str, Any]:
    shares = [
        c["cost"]["assessment_passes"] * _steps_per_pass(c) * c["recipe"]["batch_size"] / (100 * 8) for c in cells
    ]
    mean = statistics.fmean(shares) if shares else None
    return {
        "share_of_100_steps_at_8": why.number(f"{path}.share_of_100_steps_at_8", mean, "no cell is finished"),
        "assessment_seconds": sum(cell["cost"]["assessment_seconds"] for cell in cells),
        "trial_seconds": sum(cell["cost"]["trial_seconds"] for cell in cells),
    }


def _share(hits: int, n: int, path: str, why: Reasons) -> dict[str, Any]:
    held: Measurement = share(hits, n)
    ends = {end: why.number(f"{path}.{end}", getattr(held, end), "there is none") for end in ("value", "low", "high")}
    return {**ends, "hits": hits, "n": n}
