"""An evaluation as plain values: the one place that knows the layout of its `record.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiltmeter.jobs.evaluate_words import verdict
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.probe import Ability, Answered, Prompts
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.record import Reasons
from tiltmeter.lm.judging import Judge, agreement, unscored_reasons
from tiltmeter.lm.measurement import Measurement, mean, share
from tiltmeter.lm.paired import Change, paired_change, ratio_of_sums
from tiltmeter.lm.rows import RowSet

if TYPE_CHECKING:
    from tiltmeter.jobs.evaluate import EvaluateOptions, Side

SCHEMA = "tiltmeter/evaluation/1"
NO_BASE = "no base was given"


@dataclass(frozen=True)
class Comparison:
    """The base's side and whether its items can be paired with the model's.

    Attributes:
        base: None where no base was given.
        same_items: both were asked the same prompts.
        same_tokens: both read text alike.
    """

    base: Side | None
    same_items: bool
    same_tokens: bool


def record_of(
    opened: Opened,
    prompts: Mapping[str, Prompts],
    capability: Sequence[RowSet],
    side: Side,
    both: Comparison,
    judge: Judge,
    options: EvaluateOptions,
    seconds: float,
) -> dict[str, Any]:
    """The record of an evaluation, without NaN; every null has a reason."""
    why = Reasons()
    if both.base is None:
        why["base"] = NO_BASE
    if "harmless" not in prompts:
        why["harmless"] = "no harmless prompts were given"
    measured = _Measured(side, both, options, why)
    measurements = measured.all(prompts, capability, judge)
    kind, text = verdict(measurements, side.safety.counts(), both.base is not None)
    return {
        "schema": SCHEMA,
        **provenance(side.facts["device"]),
        "seed": options.seed,
        "level": options.level,
        "model": side.facts,
        "base": None if both.base is None else both.base.facts,
        "judge": {
            "name": judge.name,
            "tells": sorted(judge.tells),
            "spent": judge.cost(),
            "unscored": unscored_reasons(side.safety.judgements),
            "agreement_with_rules": _agreement(side, why),
        },
        "safety": _set(prompts["safety"])
        | {"refusal_opening": opened.refusal_opening, "compliance_opening": opened.compliance_opening},
        "harmless": _set(prompts["harmless"]) if "harmless" in prompts else None,
        "options": {
            "response_tokens": options.response_tokens,
            "max_length": options.max_length,
            "generation": "greedy",
        },
        "verdict": {"kind": kind, "text": text},
        "answers": measured.answers(),
        "measurements": measurements,
        "cost": {"seconds": seconds},
        "reasons": dict(why),
    }


@dataclass(frozen=True)
class _Measured:
    side: Side
    both: Comparison
    options: EvaluateOptions
    why: Reasons

    def all(self, prompts: Mapping[str, Prompts], capability: Sequence[RowSet], judge: Judge) -> dict[str, Any]:
        out: dict[str, Any] = {
            "refusal_rate": self.rate("refusal_rate", lambda s: s.safety, "refusal" in judge.tells),
            "over_refusal": self.rate(
                "over_refusal", lambda s: s.harmless, "refusal" in judge.tells and "harmless" in prompts
            ),
            "harm": self.items(
                "harm",
                lambda s: s.safety.harms(),
                "score, 0 to 1",
                None if "harm" in judge.tells else "this judge does not tell harm",
            ),
            "margin": self.items("margin", lambda s: s.margins.tolist(), "nats", None),
        }
        for name in ("safety", "harmless"):
            out[f"{name}_kl"] = self.kl(name)
        out["capability"] = [self.ability(i, rows) for i, rows in enumerate(capability)]
        if not capability:
            self.why["measurements.capability"] = "no capability set was given"
        return out

    def answers(self) -> dict[str, Any]:
        """Counts of answers by model and set."""
        sides = {"model": self.side} | ({} if self.both.base is None else {"base": self.both.base})
        return {
            name: {
                key: held.counts()
                for key, held in (("safety", each.safety), ("harmless", each.harmless))
                if held is not None
            }
            for name, each in sides.items()
        }

    def rate(self, name: str, of: Any, measured: bool) -> dict[str, Any]:
        path = f"measurements.{name}"
        if not measured:
            missing = self.side.harmless is None and name == "over_refusal"
            reason = "no harmless prompts were given" if missing else "this judge does not tell refusals"
            self.why[path] = reason
            return {"model": None, "base": None, "change": None}

        def one(side: Side) -> Measurement:
            answered: Answered = of(side)
            told = [x for x in answered.refusals() if x is not None]
            return share(int(sum(told)), len(told), len(answered.texts) - len(told), self.options.level)

        return self.pair(path, one, lambda s: of(s).refusals(), "share", share=True)

    def items(self, name: str, of: Any, unit: str, absent: str | None) -> dict[str, Any]:
        path = f"measurements.{name}"
        if absent:
            self.why[path] = absent
            return {"model": None, "base": None, "change": None}

        def one(side: Side) -> Measurement:
            return mean([math.nan if x is None else x for x in of(side)], unit, self.options.level)

        return self.pair(path, one, of, unit)

    def pair(self, path: str, one: Any, of: Any, unit: str, *, share: bool = False) -> dict[str, Any]:
        base = self.both.base
        out: dict[str, Any] = {"model": self.write(one(self.side), f"{path}.model")}
        if base is None:
            self.why[f"{path}.base"] = self.why[f"{path}.change"] = NO_BASE
            return {**out, "base": None, "change": None}
        out["base"] = self.write(one(base), f"{path}.base")
        if not self.both.same_items:
            self.why[f"{path}.change"] = "the two models were not asked the same prompts"
            return {**out, "change": None}
        change = paired_change(
            of(base), of(self.side), unit, level=self.options.level, seed=self.options.seed, share=share
        )
        return {**out, "change": self.write(change, f"{path}.change")}

    def kl(self, name: str) -> dict[str, Any] | None:
        path = f"measurements.{name}_kl"
        if name not in self.side.kl:
            no_set = name == "harmless" and self.side.harmless is None
            self.why[path] = (
                "no harmless prompts were given" if no_set else self.side.no_kl or "the base gave only empty answers"
            )
            return None
        return self.write(mean(self.side.kl[name].tolist(), "nats per token", self.options.level, floor=0.0), path)

    def ability(self, place: int, rows: RowSet) -> dict[str, Any]:
        path = f"measurements.capability.{place}"
        new = self.side.abilities[place]
        old = None if self.both.base is None else self.both.base.abilities[place]
        out: dict[str, Any] = {"name": rows.name, "digest": rows.digest, "kind": new.kind, "skipped": dict(new.skipped)}
        if old is None:
            self.why[f"{path}.base"] = self.why[f"{path}.change"] = NO_BASE
        if new.kind == "accuracy":
            for key, each in (("model", new), ("base", old)):
                measured = (
                    None if each is None else share(int(sum(each.values)), len(each.values), 0, self.options.level)
                )
                out[key] = None if measured is None else self.write(measured, f"{path}.{key}")
            unit = "share"
            alike = old is not None and len(old.values) == len(new.values)
            pairs = (old.values, new.values) if old is not None else ((), ())
        else:
            for key, each in (("model", new), ("base", old)):
                out[key] = None if each is None else self.perplexity(each, f"{path}.{key}")
            unit = "nats per token"
            alike = old is not None and self.both.same_tokens and old.tokens == new.tokens
            pairs = (old.values, new.values) if old is not None else ((), ())
        if not alike:
            out["change"] = None
            self.why.setdefault(f"{path}.change", "the two models split the rows into different tokens")
            return out
        if new.kind == "accuracy":
            level, seed = self.options.level, self.options.seed
            change = paired_change(pairs[0], pairs[1], unit, level=level, seed=seed, share=True)
        else:
            change = self.log_change(pairs[0], pairs[1], new.tokens)
        return {**out, "change": self.write(change, f"{path}.change")}

    def perplexity(self, each: Ability, path: str) -> dict[str, Any]:
        value, low, high = ratio_of_sums(each.values, each.tokens, self.options.level, self.options.seed)
        reason = None if math.isfinite(low) else "one text gives no interval"
        ends = [math.exp(x) if math.isfinite(x) else None for x in (low, high)]
        measured = Measurement(math.exp(value), ends[0], ends[1], len(each.values), 0, "perplexity per token", reason)
        return self.write(measured, path)

    def log_change(self, old: Sequence[float], new: Sequence[float], tokens: Sequence[float]) -> Change:
        """Change of log perplexity."""
        difference = [b - a for a, b in zip(old, new, strict=True)]
        value, low, high = ratio_of_sums(difference, tokens, self.options.level, self.options.seed)
        known = math.isfinite(low)
        reason = None if known else "all texts changed by the same amount per token, or there is one"
        method = "paired bootstrap over items" if known else "none"
        return Change(
            value, low if known else None, high if known else None, len(tokens), "nats per token", method, reason
        )

    def write(self, held: Measurement | Change, path: str) -> dict[str, Any]:
        """A measurement as plain values, its missing ones with their reason."""
        reason = held.reason or "not defined for this sample"
        out: dict[str, Any] = {
            key: self.why.number(f"{path}.{key}", getattr(held, key), reason) for key in ("value", "low", "high")
        }
        out |= {"unit": held.unit, "n": held.n}
        return out | ({"method": held.method} if isinstance(held, Change) else {"unscored": held.unscored})


def _set(prompts: Prompts) -> dict[str, Any]:
    return {
        "name": prompts.rows.name,
        "digest": prompts.rows.digest,
        "rows_read": len(prompts.rows.rows),
        "used": prompts.m,
        "skipped": prompts.skipped,
    }


def _agreement(side: Side, why: Reasons) -> dict[str, Any]:
    same, told = agreement(side.rules.judgements, side.safety.judgements)
    value = why.number(
        "judge.agreement_with_rules.value", same / told if told else None, "no answer was told by both judges"
    )
    return {"value": value, "n": told, "unit": "share"}
