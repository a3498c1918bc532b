"""An audit as plain values: the one place that knows the layout of its `record.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltmeter.jobs.audit_forward import ForwardFindings
from tiltmeter.jobs.audit_parts import EMPTY, ENDS, NO_HARMLESS, drift_of, layers_of, overlap_of, scaling_of
from tiltmeter.jobs.audit_weights import TensorChange
from tiltmeter.jobs.audit_words import verdict
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.probe import Answered, Prompts
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.lm.four_bit import count, dtype_name
from tiltmeter.lm.judging import Judge, unscored_reasons
from tiltmeter.lm.measurement import Measurement, mean, share
from tiltmeter.lm.paired import Change, paired_change
from tiltmeter.lm.weights import Pair

if TYPE_CHECKING:
    from tiltmeter.jobs.audit import AuditOptions

SCHEMA = "tiltmeter/audit/1"


def record_of(
    opened: Opened,
    pair: Pair,
    changes: tuple[TensorChange, ...],
    found: ForwardFindings,
    safety: Prompts,
    harmless: Prompts | None,
    judge: Judge,
    options: AuditOptions,
    seconds: float,
) -> dict[str, Any]:
    """The record of an audit, without NaN; every null has a reason."""
    why = Reasons()
    loaded = opened.loaded
    if harmless is None:
        why["harmless"] = NO_HARMLESS
    measurements = _measurements(found, options, why)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        **provenance(str(loaded.model.device)),
        "seed": options.seed,
        "level": options.level,
        "model": {
            "name": pair.base.name,
            "digest": loaded.digest,
            "parameters": sum(count(p) for p in loaded.model.parameters()),
            "dtype": dtype_name(loaded.model),
            "device": str(loaded.model.device),
        },
        "tuned": {"name": pair.tuned.name, "kind": "adapter" if pair.extra else "full"},
        "judge": {"name": judge.name, "unscored": unscored_reasons(found.tuned_answers.judgements)},
        "safety": _set(safety)
        | {
            "supervised": found.supervised,
            "refusal_opening": opened.refusal_opening,
            "compliance_opening": opened.compliance_opening,
        },
        "harmless": None if harmless is None else _set(harmless),
        "options": {
            "response_tokens": options.response_tokens,
            "rank": options.rank,
            "top": options.top,
            "threshold": options.threshold,
        },
        "measurements": measurements,
        "answers": _answers(found),
        "weights": _weights(changes, options, why),
        "overlap": overlap_of(found, why),
        "drift": drift_of(found, why),
        "scaling": scaling_of(found, options, why),
        "layers": layers_of(changes, found, why),
        "budget": _budget(found, options, why),
        "cost": {"seconds": seconds},
    }
    kind, text = verdict(record)
    return {**record, "verdict": {"kind": kind, "text": text}, "reasons": dict(why)}


def arrays_of(found: ForwardFindings) -> dict[str, Tensor]:
    """Values by prompt."""
    out = {"base.margin": found.base.margin, "tuned.margin": found.tuned.margin}
    if found.tuned.kl is not None:
        out["tuned.kl"] = found.tuned.kl
    if found.harmless_kl is not None:
        out["tuned.harmless_kl"] = found.harmless_kl
    return out


def _set(prompts: Prompts) -> dict[str, Any]:
    return {
        "name": prompts.rows.name,
        "digest": prompts.rows.digest,
        "rows_read": len(prompts.rows.rows),
        "used": prompts.m,
        "skipped": prompts.skipped,
    }


def _write(held: Measurement | Change, path: str, why: Reasons) -> dict[str, Any]:
    reason = held.reason or "not defined for this sample"
    out: dict[str, Any] = {key: why.number(f"{path}.{key}", getattr(held, key), reason) for key in ENDS}
    out |= {"unit": held.unit, "n": held.n}
    return out | ({"method": held.method} if isinstance(held, Change) else {"unscored": held.unscored})


def _measurements(found: ForwardFindings, options: AuditOptions, why: Reasons) -> dict[str, Any]:
    def kl(values: Tensor | None, path: str, reason: str) -> dict[str, Any] | None:
        if values is None:
            why[path] = reason
            return None
        return _write(mean(values.tolist(), "nats per token", options.level, floor=0.0), path, why)

    def pair(path: str, sides: Sequence[Measurement], values: Sequence[Any], unit: str, rate: bool) -> dict[str, Any]:
        before, after = values
        change = paired_change(before, after, unit, level=options.level, seed=options.seed, share=rate)
        named = zip(("base", "tuned"), sides, strict=True)
        return {key: _write(side, f"{path}.{key}", why) for key, side in named} | {
            "change": _write(change, f"{path}.change", why)
        }

    def rates(path: str, base: Answered | None, tuned: Answered | None) -> dict[str, Any] | None:
        if base is None or tuned is None:
            why[path] = NO_HARMLESS
            return None
        sides = []
        for answered in (base, tuned):
            told = [x for x in answered.refusals() if x is not None]
            sides.append(share(int(sum(told)), len(told), len(answered.texts) - len(told), options.level))
        return pair(path, sides, (base.refusals(), tuned.refusals()), "share", True)

    no_kl = NO_HARMLESS if found.base_harmless is None else EMPTY
    margins = (found.base.margin.tolist(), found.tuned.margin.tolist())
    return {
        "refusal_rate": rates("measurements.refusal_rate", found.base_answers, found.tuned_answers),
        "over_refusal": rates("measurements.over_refusal", found.base_harmless, found.tuned_harmless),
        "margin": pair(
            "measurements.margin", [mean(m, "nats", options.level) for m in margins], margins, "nats", False
        ),
        "safety_kl": kl(found.tuned.kl, "measurements.safety_kl", EMPTY),
        "harmless_kl": kl(found.harmless_kl, "measurements.harmless_kl", no_kl),
    }


def _answers(found: ForwardFindings) -> dict[str, Any]:
    held = {
        "base": {"safety": found.base_answers, "harmless": found.base_harmless},
        "tuned": {"safety": found.tuned_answers, "harmless": found.tuned_harmless},
    }
    return {
        side: {name: answered.counts() for name, answered in sets.items() if answered is not None}
        for side, sets in held.items()
    }


def _weights(changes: tuple[TensorChange, ...], options: AuditOptions, why: Reasons) -> dict[str, Any]:
    length = math.sqrt(sum(each.length**2 for each in changes))
    base = math.sqrt(sum(each.base_length**2 for each in changes))
    matrices = [each for each in changes if each.top_share is not None]
    energy = sum(each.length**2 for each in matrices)
    low_rank = sum((each.top_share or 0.0) * each.length**2 for each in matrices) / energy if energy else None
    searched = [each.intruders for each in changes if each.intruders is not None]
    top_energy = sum(each.top_energy for each in searched)
    lox = [(each.lox, each.length) for each in changes if each.lox is not None]
    reason = "no matrix inside a layer changed"
    intruding = sum(each.energy for each in searched) / top_energy if top_energy else None
    no_lox = "the unaligned model (--unaligned) was not given, or shares no changed matrix"
    kept = sum(a[1] / a[0] * n**2 for a, n in lox if a[0]) / sum(n**2 for _, n in lox) if lox else None
    return {
        "tensors": len(changes),
        "parameters": sum(each.size for each in changes),
        "length": {"value": length, "unit": "parameter units"},
        "relative_length": {
            "value": length / base if base else 0.0,
            "unit": "share of the changed tensors' own length",
        },
        "top_share": {
            "value": why.number("weights.top_share.value", low_rank, reason),
            "unit": f"share of the change's energy in the top {options.top} directions of each matrix",
        },
        "intruders": sum(each.count for each in searched),
        "looked_at": sum(each.top for each in searched),
        "intruder_energy": {
            "value": why.number("weights.intruder_energy.value", intruding, reason),
            "unit": f"share of sigma^2 of the top {options.top} directions of each tuned matrix",
        },
        "lox_ratio": {
            "value": why.number("weights.lox_ratio.value", kept, no_lox),
            "unit": "R_ft / R_align, mean over matrices by the change's energy",
        },
    }


def _budget(found: ForwardFindings, options: AuditOptions, why: Reasons) -> dict[str, Any] | None:
    if options.budget_kl is None:
        why["budget"] = "no budget was given"
        return None
    if found.tuned.kl is None:
        why["budget.used"] = why["budget.exceeded"] = EMPTY
        return {"kl": options.budget_kl, "used": None, "exceeded": None}
    used = float(torch.mean(found.tuned.kl)) / options.budget_kl
    return {"kl": options.budget_kl, "used": used, "exceeded": used > 1}
