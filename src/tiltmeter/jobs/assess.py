"""Assess: how fast would this tuning set wear down this model's safety, and how sure is that?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.geometry.objective import Passes
from tiltmeter.jobs.estimate import Estimate, data_tokens, estimate, peak_gb
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.measure import Findings, measure
from tiltmeter.jobs.outlook import Outlook, look_out
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.record import Cost, arrays_of, record_of
from tiltmeter.jobs.subject import Options, Report, Subject, measure_subject, silent, snapshot, with_lora
from tiltmeter.jobs.tuning import Tuning, prepare_tuning, sample_tuning
from tiltmeter.lm.distributed import summed_passes
from tiltmeter.lm.gathered import parts_together
from tiltmeter.lm.model import trainable, undisturbed
from tiltmeter.lm.processes import join
from tiltmeter.lm.rows import RowSet


@dataclass(frozen=True)
class Assessment:
    """The answer to one question: this model, this safety set, this tuning set, this recipe.

    Attributes:
        record: everything, as plain values (schema tiltmeter/assessment/1).
        arrays: per-prompt curves, Gram matrix, spectrum.
        outlook: the forecast.
        over_budget: whether a budget is forecast to be used up inside the horizon.
    """

    record: dict[str, Any]
    arrays: dict[str, Tensor]
    outlook: Outlook
    over_budget: bool


def assess(
    model: str,
    safety: str,
    tuning: str,
    recipe: Recipe,
    options: Options | None = None,
    *,
    refusal_opening: str | None = None,
    compliance_opening: str | None = None,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report = silent,
    announce: Callable[[Estimate], None] | None = None,
    listen: Callable[[Passes], None] | None = None,
) -> Assessment:
    """Assess one tuning set before any training.

    Started in several processes (`accelerate launch`, torchrun), all of them measure shares of the micro-batches and
    come back with the same result.

    Args:
        model: hub id, folder, GGUF file, adapter folder or `demo:` name of the aligned model.
        safety: safety prompts: file, hub id or `demo:` name.
        tuning: the data the model is to be tuned on: file, hub id or `demo:` name.
        recipe: what will be run.
        options: how much to measure.
        refusal_opening: how a refusal of this model begins; by default the usual one of its kind.
        compliance_opening: how a compliant answer begins.
        adapter: an adapter folder to merge into `model` first.
        dtype: of the weights; displacements and products are float32 at least.
        device: "auto", "cpu", "cuda", ...
        trust_remote_code: run code that a hub model brings along.
        report: told of every stage.
        announce: given the estimate of passes, time and memory before the work begins.
        listen: given the pass counts before the first pass; set their `listener` to follow them.

    Returns: the assessment; nothing is written.

    Raises:
        InputError: model, data, recipe or options cannot be used; the message says why and what to do.
        NumericalError: a loss or product is not finite.

    Cost: see `estimate.plan`; below 10 forward+backward passes over all data used.
    """
    options = options or Options()
    check_options(options)
    recipe.clock()  # a schedule that nobody knows is better told before the model is loaded
    rows, tuning_rows = open_rows(safety), open_rows(tuning)
    join(device)
    report("loading the model")
    opened = open_model(model, adapter=adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    opened = replace(
        opened,
        refusal_opening=refusal_opening or opened.refusal_opening,
        compliance_opening=compliance_opening or opened.compliance_opening,
    )
    opened = with_lora(opened, recipe.lora, options.seed)
    with undisturbed(opened.loaded.model), parts_together(trainable(opened.loaded.model, parts=True)):
        sample_tuning(opened.loaded, tuning_rows, recipe, options)  # bad data should end the job before the long part
        subject = measure_subject(opened, rows, recipe.lora, options, report=report, listen=listen)
        return assess_subject(subject, tuning_rows, recipe, options, report=report, announce=announce)


def assess_subject(
    subject: Subject,
    rows: RowSet,
    recipe: Recipe,
    options: Options,
    *,
    report: Report = silent,
    announce: Callable[[Estimate], None] | None = None,
) -> Assessment:
    """`examine_subject` without what the assessment was made from."""
    return examine_subject(subject, rows, recipe, options, report=report, announce=announce)[0]


def examine_subject(
    subject: Subject,
    rows: RowSet,
    recipe: Recipe,
    options: Options,
    *,
    report: Report = silent,
    announce: Callable[[Estimate], None] | None = None,
) -> tuple[Assessment, Tuning, Findings]:
    """Assess one tuning set against a subject that was measured before; the safety side is not measured again.

    Returns: the assessment, the sample it is about, and the raw findings.

    Raises:
        InputError: the recipe trains other parameters than the subject was measured in, the rows cannot be used, or
            the memory will not do.
    """
    if subject.lora != recipe.lora:
        raise InputError(
            f"the recipe trains {recipe.lora or 'all parameters'}, but the model was measured for "
            f"{subject.lora or 'all parameters'}; measure the subject with the recipe's own LoRA setting"
        )
    before = snapshot(subject.forward.passes)
    tuning = prepare_tuning(subject, rows, recipe, options)
    expected = estimate(subject, tuning, recipe, options)
    if announce is not None:
        announce(expected)
    expected.check_fit()
    begin = time.perf_counter()
    found = measure(subject, tuning, recipe, options, report)
    outlook = look_out(subject, found, options)
    now, spent = subject.forward.passes, subject.spent
    own = Passes(spent.calls + now.calls - before.calls, spent.tokens + now.tokens - before.tokens)
    passes = summed_passes(own, subject.forward)
    seconds = time.perf_counter() - begin + subject.seconds
    cost = Cost(expected, passes, seconds, peak_gb(), data_tokens(subject, tuning))
    return _assemble(subject, tuning, recipe, options, found, outlook, cost), tuning, found


def _assemble(
    subject: Subject,
    tuning: Tuning,
    recipe: Recipe,
    options: Options,
    found: Findings,
    outlook: Outlook,
    cost: Cost,
) -> Assessment:
    record = record_of(subject, tuning, recipe, options, found, outlook, cost)
    arrays = arrays_of(subject, found)
    return Assessment(record, arrays, outlook, any(crossing.claimed for crossing in outlook.crossings))


def check_options(options: Options) -> None:
    """Refuse options that cannot give an answer.

    Raises:
        InputError: names the option, what was expected and what came.
    """
    for name, least in {
        "max_safety": 2,
        "max_tuning": 2,
        "response_tokens": 1,
        "max_length": 8,
        "rank": 1,
        "groups": 2,
        "grid": 1 if options.screen else 2,
        "looks": 2,
        "rehearsal_rows": 1,
        "max_tokens": 1,
        "krylov": 0,
    }.items():
        value = getattr(options, name)
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.memory_gb is not None and not options.memory_gb > 0:
        raise InputError(f"--memory must be a positive number of GB, got {options.memory_gb}")
    if not 0 < options.level < 1:
        raise InputError(f"--level must lie between 0 and 1, got {options.level}")
    if options.screen and (options.curved or options.krylov):
        raise InputError("a screening follows the rehearsed path alone; leave out --curved and --krylov, or --screen")
    if options.rank > options.max_safety and options.left_out is None:
        raise InputError(
            f"the safety set is limited to {options.max_safety} prompts, which cannot determine {options.rank} "
            "directions; raise --max-safety or lower --rank"
        )
