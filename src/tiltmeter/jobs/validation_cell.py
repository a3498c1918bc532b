"""What the record of one cell of a validation says: what was foretold, what was measured, at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiltmeter.geometry.forecast import mean_interval
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.trial import Refusals, Seen, Trial
from tiltmeter.jobs.validation_plan import Cell, Plan
from tiltmeter.jobs.validation_scores import crossing
from tiltmeter.lm.paired import Change

CELL_SCHEMA = "tiltmeter/cell/1"

#: Why a kept run does not say how often the aligned model refuses.
OLDER = "the run was measured by a version that did not ask the aligned model"


def foretold_cell(
    plan: Plan, cell: Cell, assessment: Mapping[str, Any], arrays: Mapping[str, Tensor], trial: Trial
) -> dict[str, Any]:
    """The record of a run with its forecast.

    Args:
        plan: of the validation.
        cell: that was run.
        assessment: its forecast's record.
        arrays: of the assessment: `anchor_margin` and `rehearsed.margin`, nats.
        trial: what was measured.
    """
    why = Reasons({k: v for k, v in assessment["reasons"].items() if k.startswith(("predictors.", "recipe."))})
    predicted = predicted_of(assessment, arrays, why)
    measured = _measured_of(plan, trial, why)
    recipe = cell.recipe.as_dict()
    if recipe["lora"] is None:
        why["recipe.lora"] = "full fine-tuning"
    return {
        "schema": CELL_SCHEMA,
        **provenance(assessment["model"]["device"]),
        "question": plan.question(cell),
        "run": plan.run(cell),
        "name": cell.name,
        "model": {"name": plan.model, "digest": trial.digest},
        "safety": {"name": plan.safety, "assessed": plan.assessed, "held_out": plan.held_out},
        "set": cell.set.name,
        "tuning": {"digest": assessment["tuning"]["digest"], "rows": assessment["tuning"]["rows_read"]},
        "regime": cell.regime.name,
        "seed": cell.seed,
        "recipe": recipe,
        "predicted": predicted,
        "predictors": assessment["predictors"],
        **_guard_of(plan, cell, trial, why),
        "measured": measured,
        "cost": {**cost_of(assessment), "trial_seconds": trial.seconds},
        "reasons": dict(why),
    }


def predicted_of(assessment: Mapping[str, Any], arrays: Mapping[str, Tensor], why: Reasons) -> dict[str, Any]:
    """What a record of a run says of its forecast; arguments as for `foretold_cell`, `why` is added to."""
    forecast = assessment["forecast"]
    anchor = arrays["anchor_margin"].double()[None]
    told = crossing([0, *forecast["steps"]], torch.cat([anchor, arrays["rehearsed.margin"].double()]))
    predicted: dict[str, Any] = {"steps": forecast["steps"], "horizon_steps": forecast["horizon_steps"]}
    for key in ("margin_change", "safety_kl"):
        predicted[key] = {end: forecast[key][end] for end in ("value", "low", "high", "unit")}
        _known(predicted[key], f"predicted.{key}", why)
    for key, curve in forecast.get("same_prompts", {}).items():  # older versions had none
        ends = predicted.setdefault("same_prompts", {}).setdefault(key, {end: curve[end] for end in ("low", "high")})
        _known(ends, f"predicted.same_prompts.{key}", why)
    predicted["collapse_step"] = why.number("predicted.collapse_step", told, "no collapse is foretold")
    return predicted


def cost_of(assessment: Mapping[str, Any]) -> dict[str, Any]:
    """What an assessment took: seconds, and passes over its own tuning sample."""
    cost, tuning = assessment["cost"], assessment["tuning"]
    return {
        "assessment_seconds": cost["seconds"],
        "assessment_passes": cost["fb_equivalents"] * cost["data_tokens"] / max(1, tuning["tokens"]),
        "sample_tokens": tuning["tokens"],
        "sample_rows": tuning["used"],
    }


def guarded_cell(plan: Plan, cell: Cell, trial: Trial, device: str) -> dict[str, Any]:
    """The record of a run of a plan with guards; nothing is foretold for it."""
    why = Reasons()
    return {
        **_header(plan, cell, trial.digest, device),
        **_guard_of(plan, cell, trial, why),
        "measured": _measured_of(plan, trial, why),
        "cost": {"trial_seconds": trial.seconds},
        "reasons": dict(why),
    }


def refused_cell(plan: Plan, cell: Cell, digest: str, device: str, reason: str) -> dict[str, Any]:
    """The record of a cell whose guard stopped the run, with what it said."""
    guard = cell.guard
    return {
        **_header(plan, cell, digest, device),
        "guard": {"name": "none", "label": "none"} if guard is None else {"name": guard.name, "label": guard.label},
        "refused": reason,
        "reasons": {},
    }


def arrays_of(trial: Trial) -> dict[str, Tensor]:
    """Margins and KLs of every prompt at every step, by name."""
    return {f"{name}.{key}": getattr(seen, key) for name, seen in trial.seen.items() for key in ("margin", "kl")}


def _header(plan: Plan, cell: Cell, digest: str, device: str) -> dict[str, Any]:
    return {
        "schema": CELL_SCHEMA,
        **provenance(device),
        "question": plan.question(cell),
        "run": plan.run(cell),
        "name": cell.name,
        "model": {"name": plan.model, "digest": digest},
        "set": cell.set.name,
        "regime": cell.regime.name,
        "seed": cell.seed,
    }


def _guard_of(plan: Plan, cell: Cell, trial: Trial, why: Reasons) -> dict[str, Any]:
    """The guard of a cell, and what guards are compared by; nothing where the plan has no guards."""
    if trial.compared is None:
        return {}
    held, guard = trial.compared, cell.guard
    out: dict[str, Any] = {"guard": {"name": "none" if guard is None else guard.name, "strength": held.strength}}
    if guard is not None:
        out["guard"] |= {"answer_tokens": guard.answer_tokens, "opening_tokens": guard.opening}
    over = held.over_refusals
    none = "the plan names no harmless set" if over is None else over.after.reason or "the judge could tell no answer"
    out["compared"] = {
        "task_loss": {"before": held.task_loss[0], "after": held.task_loss[1], "unit": "nats per token"},
        "over_refusal_rate": why.number("compared.over_refusal_rate", None if over is None else over.after.value, none),
        "over_refusal_change": refusal_change(over, "compared.over_refusal_change", none, why),
        "step_seconds": held.step_seconds,
        "extra_memory_gb": held.extra_gb,
        "did": [{"step": step, "what": what, "why": reason} for step, what, reason in held.did],
    }
    return out


def _measured_of(plan: Plan, trial: Trial, why: Reasons) -> dict[str, Any]:
    level = plan.options.level
    seen = {name: _measured(each, level, f"measured.{name}", why) for name, each in trial.seen.items()}
    return {**seen, "length": trial.length}


def _known(curve: Mapping[str, Any], path: str, why: Reasons) -> None:
    for end in ("value", "low", "high"):
        for place, value in enumerate(curve.get(end, [])):
            if value is None:
                why[f"{path}.{end}.{place}"] = "too few prompts or tuning batches"


def _measured(seen: Seen, level: float, path: str, why: Reasons) -> dict[str, Any]:
    out: dict[str, Any] = {"steps": list(seen.steps)}
    anchor = seen.margin[0]
    for key, values, unit in (
        ("margin_change", seen.margin - anchor, "nats"),
        ("safety_kl", seen.kl, "nats per token"),
    ):
        low, high = mean_interval(values.double(), level)
        ends = {"value": values.double().mean(-1), "low": low, "high": high}
        out[key] = {"unit": unit}
        for end, points in ends.items():
            flat = "one prompt, or no scatter between prompts"
            out[key][end] = [why.number(f"{path}.{key}.{end}.{i}", x, flat) for i, x in enumerate(points.tolist())]
        # standard error of the mean over prompts: what another draw of prompts would change
        error = values.double().std(-1) / math.sqrt(values.shape[-1])
        out[key]["error"] = error.tolist()
    out["margin_anchor"] = float(anchor.double().mean())
    out["below_zero"] = (seen.margin < 0).double().mean(-1).tolist()
    out["collapse_step"] = why.number(f"{path}.collapse_step", crossing(seen.steps, seen.margin), "no collapse")
    refusals = seen.refusals.after
    out["refusal_rate"] = {
        "value": why.number(f"{path}.refusal_rate.value", refusals.value, "the judge could tell no answer"),
        "low": why.number(f"{path}.refusal_rate.low", refusals.low, "the judge could tell no answer"),
        "high": why.number(f"{path}.refusal_rate.high", refusals.high, "the judge could tell no answer"),
        "n": refusals.n,
        "unscored": refusals.unscored,
        "unit": "share",
    }
    out["refusal_change"] = refusal_change(seen.refusals, f"{path}.refusal_change", OLDER, why)
    return out


def refusal_change(refusals: Refusals | None, path: str, none: str, why: Reasons) -> dict[str, Any]:
    """Refusals against the aligned model's, prompt by prompt."""
    change = None if refusals is None else refusals.change
    before = None if refusals is None else refusals.before
    unheard = none if change is None else "the judge could tell no answer of the aligned model"
    reason = none if change is None else change.reason or "the judge could tell no answer"
    ends = {end: why.number(f"{path}.{end}", getattr(change, end, None), reason) for end in ("value", "low", "high")}
    return {
        "before": why.number(f"{path}.before", before, unheard),
        **ends,
        "n": 0 if change is None else change.n,
        "unit": "share",
        "method": "none" if change is None else change.method,
    }


def refusal_change_of(record: Mapping[str, Any], path: str) -> tuple[float | None, Change | None]:
    """Read back what a record says of a run's refusals against the aligned model's; None where it is an older one."""
    held: Mapping[str, Any] = record
    for part in path.split("."):
        held = held[part]
    told, reason = held.get("refusal_change"), record["reasons"].get(f"{path}.refusal_change.value")
    if told is None or reason == OLDER:
        return None, None
    ends = {key: told[key] for key in ("value", "low", "high", "n", "unit", "method")}
    return told["before"], Change(**ends, reason=reason)
