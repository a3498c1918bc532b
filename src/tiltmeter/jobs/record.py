"""An assessment as plain values: the one place that knows the layout of `record.json`."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tiltmeter.geometry.forecast import Curve, jackknife, mean_interval
from tiltmeter.geometry.motion import between_groups
from tiltmeter.geometry.objective import Passes
from tiltmeter.geometry.sensitivity import rank_by_energy
from tiltmeter.jobs.estimate import Estimate
from tiltmeter.jobs.measure import Findings
from tiltmeter.jobs.outlook import Outlook
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import FORECAST_ONLY, SCREEN, Options, Subject, layer_sensitivity
from tiltmeter.jobs.tuning import Tuning
from tiltmeter.lm.four_bit import count, dtype_name

SCHEMA = "tiltmeter/assessment/1"


@dataclass(frozen=True)
class Cost:
    """What was expected and what it took.

    Attributes:
        expected: the estimate made before.
        passes: what this assessment took, the safety side included.
        seconds: wall time, the safety side included.
        peak_gb: largest memory of the process.
        tokens: of all data, each sequence once.
    """

    expected: Estimate
    passes: Passes
    seconds: float
    peak_gb: float
    tokens: int


class Reasons(dict[str, str]):
    """Reasons for nulls, by dotted path."""

    def number(self, path: str, value: float | None, why: str) -> float | None:
        """The value if it is a finite number, else None with a reason."""
        if value is not None and math.isfinite(value):
            return float(value)
        self[path] = why
        return None


def record_of(
    subject: Subject,
    tuning: Tuning,
    recipe: Recipe,
    options: Options,
    found: Findings,
    outlook: Outlook,
    cost: Cost,
) -> dict[str, Any]:
    """The record of an assessment, without NaN; every null has a reason."""
    why = Reasons()
    loaded, space = subject.loaded, subject.forward.whole
    lora = recipe.as_dict()["lora"]
    for name, value in asdict(options).items():
        if value is None:
            why[f"options.{name}"] = "not given"
    if lora is None:
        why["space.lora"] = why["recipe.lora"] = "full fine-tuning"
    elif lora["targets"] is None:
        why["space.lora.targets"] = why["recipe.lora.targets"] = "peft's own choice for this architecture"
    passes = cost.passes
    return {
        "schema": SCHEMA,
        **provenance(str(subject.forward.device)),
        "seed": options.seed,
        "options": asdict(options),
        "level": options.level,
        "model": {
            "name": loaded.name,
            "digest": loaded.digest,
            "parameters": sum(count(p) for p in loaded.model.parameters()) - (space.size if lora else 0),
            "dtype": dtype_name(loaded.model),
            "device": str(subject.forward.device),
        },
        "space": {
            "kind": "full" if lora is None else "lora",
            "size": space.size,
            "digest": space.digest,
            "lora": lora,
        },
        "safety": {
            "name": subject.rows.name,
            "digest": subject.rows.digest,
            "rows_read": subject.safety.rows_read,
            "used": subject.safety.m,
            "truncated": subject.safety.truncated,
            "skipped": subject.safety.skipped,
            "tokens": subject.divergence.work + subject.negative_margin.work,
            "supervised": sum(example.supervised for example in subject.safety.responses),
            "responses": subject.safety.source,
            "refusal_opening": subject.opened.refusal_opening,
            "compliance_opening": subject.opened.compliance_opening,
        },
        "tuning": {
            "name": tuning.rows.name,
            "digest": tuning.rows.digest,
            "rows_read": len(tuning.rows.rows),
            "used": len(tuning.encoded.examples),
            "truncated": tuning.encoded.truncated,
            "skipped": tuning.encoded.skipped,
            "tokens": tuning.objective.work,
            "supervised": sum(example.supervised for example in tuning.encoded.examples),
            "loss": why.number("tuning.loss", found.tuning_loss, SCREEN),
            "batches": tuning.batches.shape[0],
            "batch_size": tuning.batch_size,
            "look_rows": tuning.rows_in_look,
        },
        "recipe": recipe.as_dict(),
        "verdict": {"kind": outlook.verdict, "text": outlook.text},
        "aic": _aic(subject, found, options, why),
        "spectrum": _spectrum(subject, options, why),
        "forecast": _forecast(subject, found, outlook, options, why),
        "baselines": _baselines(subject, found, recipe, options, why),
        "layers": _layers(subject, found, options, why),
        "cost": {
            "estimated": {
                "fb_equivalents": cost.expected.fb_equivalents,
                "seconds": why.number("cost.estimated.seconds", cost.expected.seconds, "nothing was timed"),
                "memory_gb": cost.expected.memory_gb,
            },
            "fb_equivalents": passes.equivalents(cost.tokens),
            "passes": {kind: count / cost.tokens for kind, count in sorted(passes.tokens.items())},
            "micro_batch_passes": dict(sorted(passes.calls.items())),
            "data_tokens": cost.tokens,
            "seconds": cost.seconds,
            "peak_memory_gb": cost.peak_gb,
        },
        "reasons": dict(why),
    }


def _aic(subject: Subject, found: Findings, options: Options, why: Reasons) -> dict[str, Any]:
    """The Alignment Instability Condition under gradient flow, whatever the recipe's optimiser."""
    per_time, per_square = "nats^1/2 per flow time", "nats^1/2 per flow time squared"
    out: dict[str, Any] = {
        "initial_overlap_random": {
            "value": why.number("aic.initial_overlap_random.value", found.random_overlap, str(subject.no_sensitivity)),
            "unit": per_time,
        },
        "clock": "gradient flow: flow time is the sum of learning rates of plain gradient descent",
    }
    noise = "the square came out below zero: indistinguishable from zero at this sample size"
    e0: dict[str, Any] = {"value": None}
    if found.overlap_groups is None:
        out["initial_overlap"] = None
        why["aic.initial_overlap"] = str(found.no_overlap)
    else:
        e0 = _root(between_groups(found.overlap_groups), options.level, per_time, "aic.initial_overlap", noise, why)
        out["initial_overlap"] = e0
        low, high = jackknife(found.overlap_groups.mean(0), options.level)
        few = "fewer than three groups of batches"
        out["initial_overlap_over_batches"] = {
            "low": why.number("aic.initial_overlap_over_batches.low", low, few),
            "high": why.number("aic.initial_overlap_over_batches.high", high, few),
            "unit": per_time,
        }
    if found.coupling is None:
        for name in ("curvature_coupling", "gamma_full", "cross_term", "crossover", "crossover_steps"):
            out[name] = None
            why[f"aic.{name}"] = str(found.no_coupling)
    else:
        c = found.coupling
        gamma = _root(c.coupling, options.level, per_square, "aic.curvature_coupling", noise, why)
        full = _root(c.full, options.level, per_square, "aic.gamma_full", noise, why)
        out |= {"curvature_coupling": gamma, "gamma_full": full}
        out["cross_term"] = _mean(c.cross, options.level, "nats per flow time cubed", "aic.cross_term", why)
        crossover = 2 * e0["value"] / gamma["value"] if e0["value"] and gamma["value"] else math.nan
        needs = "needs both the overlap and the coupling to be told from zero"
        out["crossover"] = {"value": why.number("aic.crossover.value", crossover, needs), "unit": "flow time"}
        steps = crossover / float(found.clock.rates.mean()) if found.clock.rates.mean() > 0 else math.nan
        label = "steps of plain gradient descent at the recipe's mean rate"
        out["crossover_steps"] = {"value": why.number("aic.crossover_steps.value", steps, needs), "unit": label}
    projected = found.projected
    reason = subject.no_sensitivity or "no subspace"
    out["projected_gradient"] = {
        "value": why.number("aic.projected_gradient.value", projected, reason),
        "random": found.gradient_norm * math.sqrt(min(1.0, options.rank / subject.forward.whole.size)),
        "share": why.number(
            "aic.projected_gradient.share", None if projected is None else projected / found.gradient_norm, reason
        ),
        "unit": "nats per parameter unit",
    }
    return out


def _root(squares: Tensor, level: float, unit: str, path: str, noise: str, why: Reasons) -> dict[str, Any]:
    """Root of a mean of per-prompt squares, with its interval over prompts."""
    low, high = mean_interval(squares, level)
    value = float(squares.mean())
    return {
        "value": why.number(f"{path}.value", math.sqrt(value) if value > 0 else None, noise),
        "low": why.number(f"{path}.low", math.sqrt(max(0.0, float(low))) if low == low else None, "one prompt"),
        "high": why.number(f"{path}.high", math.sqrt(max(0.0, float(high))) if high == high else None, "one prompt"),
        "unit": unit,
    }


def _mean(values: Tensor, level: float, unit: str, path: str, why: Reasons) -> dict[str, Any]:
    low, high = mean_interval(values, level)
    return {
        "value": float(values.mean()),
        "low": why.number(f"{path}.low", float(low), "one prompt gives no interval"),
        "high": why.number(f"{path}.high", float(high), "one prompt gives no interval"),
        "unit": unit,
    }


def _spectrum(subject: Subject, options: Options, why: Reasons) -> dict[str, Any] | None:
    s = subject.sensitivity
    if s is None:
        why["spectrum"] = str(subject.no_sensitivity)
        return None
    values = s.spectrum.tolist()
    gaps = [a / b for a, b in itertools.pairwise(values) if b > 1e-10 * values[0]]
    overlap = subject.split_half
    none = "needs a Gram matrix over at least four prompts"
    points: dict[str, float | None] = {"value": None, "low": None, "high": None}
    if overlap is not None:
        points = {
            "value": float(overlap.mean()),
            "low": float(overlap.quantile(0.05)),
            "high": float(overlap.quantile(0.95)),
        }
    rank = why.number(
        "spectrum.rank_90", rank_by_energy(s.spectrum) if s.trace is not None else None, "the trace is not known"
    )
    return {
        "score": options.score,
        "eigenvalues": values,
        "unit": "nats per parameter unit squared",
        "trace": why.number("spectrum.trace", s.trace, "Lanczos finds the top of the spectrum only"),
        "rank": s.rank,
        "rank_90": None if rank is None else int(rank),
        "gaps": gaps,
        "split_half_overlap": {k: why.number(f"spectrum.split_half_overlap.{k}", v, none) for k, v in points.items()},
        "random_overlap": s.rank / subject.forward.whole.size,
    }


def _curve(curve: Curve, unit: str, path: str, why: Reasons, reason: str) -> dict[str, Any]:
    return {
        "value": [why.number(f"{path}.value.{i}", x, reason) for i, x in enumerate(curve.value.tolist())],
        "low": [why.number(f"{path}.low.{i}", x, reason) for i, x in enumerate(curve.low.tolist())],
        "high": [why.number(f"{path}.high.{i}", x, reason) for i, x in enumerate(curve.high.tolist())],
        "unit": unit,
    }


def _forecast(subject: Subject, found: Findings, outlook: Outlook, options: Options, why: Reasons) -> dict[str, Any]:
    few, alone = "too few prompts or tuning batches for an interval", "too few tuning batches for an interval"
    factor: list[float] | None = found.rehearsed.energy_factor()[list(outlook.steps)].tolist()
    if options.screen:
        few = alone = SCREEN
        factor = None
        why["forecast.noise.kl_factor"] = why["forecast.horizon_steps"] = SCREEN
    rate = subject.safety.refusal_rate()
    judged = "the judge could not tell any of the anchor's answers"
    order = dict(zip(("value", "low", "high"), outlook.leading_order, strict=True))
    flat = "the KL is not positive at two steps" if len(outlook.steps) > 1 else "the KL is read at one step alone"
    crossings: dict[str, Any] = {}
    for c in outlook.crossings:
        path = f"forecast.steps_to_budget.{c.quantity}"
        never = "not within the recipe"
        ends = SCREEN if options.screen else never
        crossings[c.quantity] = {
            "budget": c.budget,
            "value": why.number(f"{path}.value", c.value, never),
            "low": why.number(f"{path}.low", c.low, ends),
            "high": why.number(f"{path}.high", c.high, ends),
            "inside_horizon": c.claimed,
            "unit": "optimiser steps",
        }
    if found.check is None:
        why["forecast.fewer_looks"] = SCREEN if options.screen else "every step was rehearsed with a look of its own"
    if not crossings:
        why["forecast.steps_to_budget"] = "no budget was given"
    margin = _curve(outlook.margin, "nats", "forecast.margin", why, few)
    refusal = _curve(outlook.refusal_rate, "share", "forecast.refusal_rate", why, judged if rate.value is None else few)
    return {
        "steps": list(outlook.steps),
        "flow_time": [float(found.covered[step]) for step in outlook.steps],
        "safety_kl": _curve(outlook.safety_kl, "nats per token", "forecast.safety_kl", why, few),
        "margin": {**margin, "anchor": float(subject.anchor_margin.mean())},
        "margin_change": _curve(outlook.margin_change, "nats", "forecast.margin_change", why, few),
        "same_prompts": {
            name: _curve(curve, unit, f"forecast.same_prompts.{name}", why, alone)
            for (name, curve), unit in zip(outlook.same_prompts.items(), ("nats per token", "nats"), strict=True)
        },
        "refusal_rate": {
            **refusal,
            "anchor": why.number("forecast.refusal_rate.anchor", rate.value, judged),
            "undetermined": rate.unscored,
            "method": "anchor's judged rate plus the change of the two openings' odds; a proxy",
        },
        "below_zero": outlook.below_zero.tolist(),
        "noise": {
            "kl_factor": factor,
            "margin_per_row": why.number("forecast.noise.margin_per_row", found.noise.margin, few),
            "unit": "factor; nats per flow time",
        },
        "paths": {
            name: {"safety_kl": v.safety_kl.mean(-1).tolist(), "margin": v.margin.mean(-1).tolist()}
            for name, v in found.values.items()
        },
        "fewer_looks": None
        if found.check is None
        else {
            "safety_kl": found.check.values.safety_kl.mean(-1).tolist(),
            "margin": found.check.values.margin.mean(-1).tolist(),
        },
        "horizon_steps": outlook.horizon_steps,
        "horizon_reason": outlook.horizon_reason,
        "leading_order": {
            k: why.number(f"forecast.leading_order.{k}", v, SCREEN if options.screen and k != "value" else flat)
            for k, v in order.items()
        },
        "steps_to_budget": crossings or None,
    }


def _baselines(subject: Subject, found: Findings, recipe: Recipe, options: Options, why: Reasons) -> dict[str, Any]:
    kl, change, norms = None, None, found.batch_norms
    left_out = options.left_out or FORECAST_ONLY
    if found.random_walk is not None:
        kl = float(found.random_walk[0].mean())
        change = float((found.random_walk[1] - subject.anchor_margin).mean())
    return {
        "gradient_norm": {"value": found.gradient_norm, "unit": "nats per parameter unit, after clipping"},
        "batch_gradient_norm": {
            "value": float(norms.mean()),
            "low": float(norms.min()),
            "high": float(norms.max()),
            "unit": "nats per parameter unit, smallest to largest batch",
        },
        "tuning_loss": {
            "value": why.number("baselines.tuning_loss.value", found.tuning_loss, SCREEN),
            "unit": "nats per token",
        },
        "steps_times_learning_rate": {"value": recipe.steps * recipe.learning_rate, "unit": "flow time"},
        "displacement": {"value": found.length, "unit": "parameter units, at the end of the recipe"},
        "random_direction_kl": {
            "value": why.number("baselines.random_direction_kl.value", kl, left_out),
            "unit": "nats per token, equal displacement",
        },
        "random_direction_margin": {
            "value": why.number("baselines.random_direction_margin.value", change, left_out),
            "unit": "nats of change, equal displacement",
        },
    }


def _layers(subject: Subject, found: Findings, options: Options, why: Reasons) -> list[dict[str, Any]]:
    shares = {} if subject.gram is None else layer_sensitivity(subject.gram)
    none = options.left_out or "no Gram matrix was formed for this score"
    sizes: dict[str, int] = {}
    for name, part, _ in subject.forward.whole.slices():
        layer = subject.layer_of(name)
        sizes[layer] = sizes.get(layer, 0) + part.stop - part.start
    out = []
    for i, layer in enumerate(found.layer_slopes or sizes):
        share = why.number(f"layers.{i}.sensitivity", shares.get(layer), none)
        slope = why.number(f"layers.{i}.margin_slope", found.layer_slopes.get(layer), SCREEN)
        out.append({"name": layer, "sensitivity": share, "margin_slope": slope, "parameters": sizes[layer]})
    return out


def arrays_of(subject: Subject, found: Findings) -> dict[str, Tensor]:
    """Per-prompt curves and spectra, for `arrays.safetensors`."""
    out = {"anchor_margin": subject.anchor_margin, "rates": found.clock.rates}
    for name, values in found.values.items():
        out[f"{name}.safety_kl"], out[f"{name}.margin"] = values.safety_kl, values.margin
    if subject.gram is not None:
        out["gram"] = subject.gram.total
    if subject.sensitivity is not None:
        out["eigenvalues"] = subject.sensitivity.spectrum
    if found.overlap_groups is not None:
        out["coupling.overlap"] = between_groups(found.overlap_groups)
    if found.coupling is not None:
        for name in ("cross", "coupling", "full"):
            out[f"coupling.{name}"] = torch.as_tensor(getattr(found.coupling, name))
    if found.ritz is not None:
        out["ritz"] = found.ritz
    return out
