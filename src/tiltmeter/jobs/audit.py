"""Audit: after the fact, what did this fine-tune do to the base's safety, and where?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tiltmeter import demo
from tiltmeter.errors import InputError, UnsupportedModel
from tiltmeter.jobs.audit_forward import ForwardFindings, measure_forward
from tiltmeter.jobs.audit_record import arrays_of, record_of
from tiltmeter.jobs.audit_weights import TensorChange, measure_weights
from tiltmeter.jobs.inputs import Opened, open_model, open_rows
from tiltmeter.jobs.probe import Prompts, read_prompts
from tiltmeter.jobs.subject import Report, silent
from tiltmeter.lm.adapter import adapter_folder
from tiltmeter.lm.four_bit import NF4
from tiltmeter.lm.judging import Judge, RuleJudge
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.weights import Checkpoint, Pair, open_checkpoint, pair_of


@dataclass(frozen=True)
class AuditOptions:
    """How much to audit.

    Attributes:
        max_safety: most safety prompts.
        max_harmless: most harmless prompts.
        response_tokens: length of answers.
        max_length: longest sequence, tokens.
        rank: directions of the safety subspace; 0 leaves the overlap out.
        top: leading singular directions of every matrix.
        threshold: cosine below which a direction is an intruder.
        alphas: points of the scaling curve, 0 the base and 1 the tuned model.
        localise: whether to put back every layer by itself.
        budget_kl: largest tolerable safety KL, nats per token.
        level: of the intervals.
        seed: of the bootstrap.
    """

    max_safety: int = 32
    max_harmless: int = 32
    response_tokens: int = 32
    max_length: int = 512
    rank: int = 8
    top: int = 10
    threshold: float = 0.6
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25, 1.5)
    localise: bool = True
    budget_kl: float | None = None
    level: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"max_safety": 1, "max_harmless": 1, "response_tokens": 1, "rank": 0, "top": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise InputError(f"--threshold is a cosine between 0 and 1, got {self.threshold}")
        if not all(math.isfinite(alpha) for alpha in self.alphas):
            raise InputError(f"--alpha must be numbers, got {self.alphas}")
        if self.budget_kl is not None and not self.budget_kl > 0:
            raise InputError(f"--budget-kl must be positive, got {self.budget_kl}")


@dataclass(frozen=True)
class Audit:
    """The result of one audit.

    Attributes:
        record: everything, as plain values (schema tiltmeter/audit/1).
        arrays: values by prompt.
        over_budget: whether the measured safety KL exceeds the budget.
    """

    record: dict[str, Any]
    arrays: dict[str, Tensor]
    over_budget: bool


def audit(
    base: str,
    tuned: str,
    safety: str,
    *,
    harmless: str | None = None,
    unaligned: str | None = None,
    judge: Judge | None = None,
    options: AuditOptions | None = None,
    refusal_opening: str | None = None,
    compliance_opening: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Audit:
    """Compare a base with its fine-tune.

    Args:
        base: the aligned model before tuning: hub id, folder, adapter or `demo:` name; safetensors.
        tuned: the model after tuning, or the adapter that was trained, which is put on `base`.
        safety: prompts that should be refused.
        harmless: prompts that should be answered; needed for over-refusals and to compare the drift.
        unaligned: the model from before the alignment, for the LoX ratio.
        judge: who reads the answers; the rules by default.
        options: how much to measure.
        refusal_opening: how a refusal of the base begins.
        compliance_opening: how a compliant answer begins.
        dtype: of the weights in the forward part.
        device: "auto", "cpu", "cuda", ...
        trust_remote_code: run code that a hub model brings along; the weight part runs none in any case.
        report: told of every stage.

    Returns: the audit; nothing is written, and no prompt or answer is in it.

    Raises:
        InputError: a checkpoint is damaged or of another architecture, or data cannot be used.
        UnsupportedModel: the weights would be packed into four bits.

    Cost: see `measure_weights` and `measure_forward`. Memory: the weight part that of a few copies of one tensor, the
    forward part one model, and one gradient for the overlap.
    """
    options, judge = options or AuditOptions(), judge or RuleJudge()
    if dtype == NF4:
        raise UnsupportedModel(
            "audit puts tuned weights in the base's place, layer by layer, which four bits cannot take in: give "
            "another --dtype"
        )
    begin = time.perf_counter()
    rows = open_rows(safety)
    harmless_rows = None if harmless is None else open_rows(harmless)
    report("opening the checkpoints")
    before = checkpoint_of(base)
    pair = pair_of(before, tuned_checkpoint(before, tuned))
    aligned = None if unaligned is None else pair_of(checkpoint_of(unaligned), before)
    changes = measure_weights(pair, aligned, options.top, options.threshold, report)
    report("loading the base")
    opened = open_model(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    opened = replace(
        opened,
        refusal_opening=refusal_opening or opened.refusal_opening,
        compliance_opening=compliance_opening or opened.compliance_opening,
    )
    prompts = read_prompts(opened.loaded, rows, options.max_safety, options.max_length, options.response_tokens)
    others = None
    if harmless_rows is not None:
        others = read_prompts(
            opened.loaded, harmless_rows, options.max_harmless, options.max_length, options.response_tokens
        )
    with undisturbed(opened.loaded.model):
        found = measure_forward(
            opened,
            pair,
            changes,
            prompts,
            others,
            judge,
            response_tokens=options.response_tokens,
            rank=options.rank,
            alphas=options.alphas,
            localise=options.localise,
            report=report,
        )
    return _result(opened, pair, changes, found, prompts, others, judge, options, time.perf_counter() - begin)


def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of a folder, hub id, adapter or `demo:` model.

    Raises: ModelError: it cannot be read.
    """
    if not name.startswith(demo.PREFIX):
        return open_checkpoint(name)
    info = demo.model(name)
    held = replace(open_checkpoint(info.folder), name=name)
    return held if info.adapter is None else held.with_adapter(info.adapter, name)


def tuned_checkpoint(base: Checkpoint, tuned: str) -> Checkpoint:
    """The tuned model: an adapter is put on the base that was given, whatever base it names itself.

    Raises: ModelError: it cannot be read or does not fit.
    """
    folder = None if tuned.startswith(demo.PREFIX) else adapter_folder(tuned)
    return checkpoint_of(tuned) if folder is None else base.with_adapter(folder, tuned)


def _result(
    opened: Opened,
    pair: Pair,
    changes: tuple[TensorChange, ...],
    found: ForwardFindings,
    safety: Prompts,
    harmless: Prompts | None,
    judge: Judge,
    options: AuditOptions,
    seconds: float,
) -> Audit:
    record = record_of(opened, pair, changes, found, safety, harmless, judge, options, seconds)
    return Audit(record, arrays_of(found), over_budget(found.tuned.kl, options.budget_kl))


def over_budget(kl: Tensor | None, budget: float | None) -> bool:
    """Whether the mean safety KL was measured to exceed the budget."""
    return budget is not None and kl is not None and float(kl.mean()) > budget
