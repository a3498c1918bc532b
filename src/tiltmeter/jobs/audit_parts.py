"""The sections of an audit's record: overlap, drift, scaling, layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tiltmeter.geometry.overlap import Overlap
from tiltmeter.jobs.audit_forward import ForwardFindings, Point
from tiltmeter.jobs.audit_weights import TensorChange
from tiltmeter.jobs.record import Reasons
from tiltmeter.lm.hidden import Drift
from tiltmeter.lm.measurement import mean

if TYPE_CHECKING:
    from tiltmeter.jobs.audit import AuditOptions

NO_HARMLESS = "no harmless prompts were given"
EMPTY = "the base gave only empty answers"
ENDS = ("value", "low", "high")


def score(held: Overlap | None, path: str, why: Reasons, reason: str) -> dict[str, Any] | None:
    """One overlap score beside its null, or None with a reason."""
    if held is None:
        why[path] = reason
        return None
    return {
        "value": held.score,
        "null_mean": held.null_mean,
        "z": held.z,
        "quantile": held.quantile,
        "directions": held.d,
        "parameters": held.n,
        "unit": "share of the change's length",
    }


def overlap_of(found: ForwardFindings, why: Reasons) -> dict[str, Any] | None:
    """Overlap of the whole change."""
    if found.overlap is None:
        why["overlap"] = str(found.no_overlap)
        return None
    held = found.overlap
    return {
        "whole": score(held.whole, "overlap.whole", why, ""),
        "layered_null": {
            "mean_square": held.layered_mean,
            "z": held.layered_z,
            "meaning": "a change as long in every layer, in random directions inside each",
        },
        "energy": {"value": held.energy, "unit": "nats per token, to second order inside the subspace"},
        "normalisation": "|V' delta| / |delta|; a reconstruction, see docs/audit.md",
    }


def drift_of(found: ForwardFindings, why: Reasons) -> dict[str, Any]:
    """Drift of hidden states on both sets."""

    def one(held: Drift | None, path: str) -> dict[str, Any] | None:
        if held is None:
            why[path] = NO_HARMLESS
            return None
        ranks = [
            why.number(f"{path}.effective_rank.{i}", x, "nothing moved at this depth") for i, x in enumerate(held.rank)
        ]
        return {
            "relative": list(held.relative),
            "effective_rank": ranks,
            "last_relative": held.relative[-1],
            "last_effective_rank": why.number(f"{path}.last_effective_rank", held.rank[-1], "nothing moved"),
        }

    return {
        "n": found.drift_prompts,
        "safety": one(found.safety_drift, "drift.safety"),
        "harmless": one(found.harmless_drift, "drift.harmless"),
    }


def scaling_of(found: ForwardFindings, options: AuditOptions, why: Reasons) -> dict[str, Any]:
    """Margin and KL over the scaling curve."""
    alphas = [alpha for alpha, _ in found.curve]
    out: dict[str, Any] = {"alpha": alphas}
    for name, unit in (("safety_kl", "nats per token"), ("margin", "nats")):
        held: dict[str, list[float | None]] = {key: [] for key in ENDS}
        for i, (_, point) in enumerate(found.curve):
            values = point.kl if name == "safety_kl" else point.margin
            measured = mean(
                [] if values is None else values.tolist(),
                unit,
                options.level,
                floor=0.0 if unit != "nats" else -math.inf,
            )
            for key in ENDS:
                reason = measured.reason or "all prompts alike"
                held[key].append(why.number(f"scaling.{name}.{key}.{i}", getattr(measured, key), reason))
        out[name] = {**held, "unit": unit}
    return out


def layers_of(changes: tuple[TensorChange, ...], found: ForwardFindings, why: Reasons) -> list[dict[str, Any]]:
    """One entry for each changed layer."""
    out = []
    for i, layer in enumerate(dict.fromkeys(each.layer for each in changes)):
        held = [each for each in changes if each.layer == layer]
        searched = [each.intruders for each in held if each.intruders is not None]
        overlap = None if found.overlap is None else found.overlap.by_layer[layer]
        path = f"layers.{i}"
        none = found.no_overlap or "the scores of this layer determine no direction"
        top_energy = sum(each.top_energy for each in searched)
        energy = sum(each.energy for each in searched) / top_energy if top_energy else None
        out.append(
            {
                "name": layer,
                "parameters": sum(each.size for each in held),
                "length": math.sqrt(sum(each.length**2 for each in held)),
                "overlap": score(None if overlap is None else overlap.own, f"{path}.overlap", why, none),
                "overlap_share": why.number(
                    f"{path}.overlap_share", None if overlap is None else overlap.share, str(found.no_overlap)
                ),
                "intruders": sum(each.count for each in searched),
                "intruder_energy": why.number(f"{path}.intruder_energy", energy, "no matrix of this layer changed"),
                **_regained(found, layer, path, why),
            }
        )
    return out


def _regained(found: ForwardFindings, layer: str, path: str, why: Reasons) -> dict[str, Any]:
    """One entry for each changed layer."""
    """Margin and KL over the scaling curve."""
    """Drift of hidden states on both sets."""
    """Overlap of the whole change."""
    """One overlap score beside its null, or None with a reason."""
    """What putting back this layer alone gives back."""
    patched: Point | None = found.layers.get(layer)
    out: dict[str, Any] = {}
    for key, values, sign in (("kl_regained", "kl", -1.0), ("margin_regained", "margin", 1.0)):
        after = None if patched is None else getattr(patched, values)
        tuned = getattr(found.tuned, values)
        change = None if after is None or tuned is None else sign * float((after - tuned).mean())
        reason = "layers were not put back (--no-localise)" if patched is None else EMPTY
        out[key] = why.number(f"{path}.{key}", change, reason)
    return out
