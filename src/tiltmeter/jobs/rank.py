"""Rank: one model and safety set measured once, many tuning sets laid side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.jobs.assess import Assessment, check_options, examine_subject
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.measure import Findings
from tiltmeter.jobs.outlook import HEADLINE
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import SCREEN, Options, Report, Subject, measure_subject, silent, with_lora
from tiltmeter.jobs.tuning import sample_tuning
from tiltmeter.lm.model import undisturbed

SCHEMA = "tiltmeter/ranking/1"

#: Bootstrap draws.
DRAWS = 4000


@dataclass(frozen=True)
class Ranking:
    """Tuning sets, or rows of one, by predicted harm.

    Attributes:
        record: everything, as plain values (schema tiltmeter/ranking/1).
        arrays: predicted margin changes by set and prompt, or harms by row.
    """

    record: dict[str, Any]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Chances:
    """Bootstrap over prompts and tuning groups.

    Attributes:
        wins: [k, k], chance that set i lowers the margin more than set j; a half on the diagonal.
        worst: [k], chance that set i lowers it most.
    """

    wins: Tensor
    worst: Tensor


def chances(change: Tensor, noise: Tensor, known: Sequence[int], seed: int, draws: int = DRAWS) -> Chances:
    """Win probabilities of tuning sets.

    Args:
        change: predicted change of the margin, [k, m] for k sets and m prompts. A draw of prompts is the same for all
            sets: a prompt that moves far under one set mostly does so under the others.
        noise: [k], standard deviation of a set's mean change by the sample of rows and one run's batches.
        known: tuning rows that each noise is known from; Student's t with one degree fewer.
        seed: of the draws.
        draws: number of them.
    """
    k, m = change.shape
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(m, (draws, m), generator=generator)
    means = change.double()[:, picks].mean(-1)
    for i in range(k):
        freedom = max(known[i] - 1, 1)
        normal = torch.randn(draws, generator=generator, dtype=torch.float64)
        square = torch.randn(draws, freedom, generator=generator, dtype=torch.float64).square().mean(-1)
        means[i] += noise[i] * normal / square.sqrt()
    below = (means[:, None] < means[None]).double().mean(-1) + (means[:, None] == means[None]).double().mean(-1) / 2
    worst = torch.bincount(means.argmin(0), minlength=k).double() / draws
    return Chances(below, worst)


def rank(
    model: str,
    safety: str,
    tuning: Sequence[str],
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
) -> Ranking:
    """Order tuning sets by the harm they are predicted to do.

    Args:
        model: the aligned model.
        safety: safety prompts.
        tuning: at least two tuning sets.
        recipe: what will be run, the same for all.
        options: how much to measure.
        refusal_opening: how a refusal of this model begins.
        compliance_opening: how a compliant answer begins.
        adapter: an adapter folder to merge into `model` first.
        dtype: of the weights.
        device: "auto", "cpu", "cuda", ...
        trust_remote_code: run code that a hub model brings along.
        report: told of every stage.

    Returns: the ranking; nothing is written.

    Raises: InputError: something given cannot be used.

    Cost: the safety side once, one assessment per set.
    """
    options = options or Options()
    if len(tuning) < 2 or len(set(tuning)) < len(tuning):
        raise InputError(f"expected two or more different --tuning sets to rank, got {', '.join(tuning) or 'none'}")
    begin = time.perf_counter()
    sets = [open_rows(name) for name in tuning]
    subject = open_subject(
        model,
        safety,
        recipe,
        options,
        refusal_opening=refusal_opening,
        compliance_opening=compliance_opening,
        loading={"adapter": adapter, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
        report=report,
    )
    found: list[tuple[Assessment, Findings]] = []
    with undisturbed(subject.loaded.model):
        for rows in sets:  # data that cannot be used should end the job before the long part
            sample_tuning(subject.loaded, rows, recipe, options)
        for rows in sets:
            name = rows.name

            def tell(stage: str, name: str = name) -> None:
                report(f"{name}: {stage}")

            result, _, findings = examine_subject(subject, rows, recipe, options, report=tell)
            found.append((result, findings))
    return _ranking(subject, found, recipe, options, time.perf_counter() - begin)


def open_subject(
    model: str,
    safety: str,
    recipe: Recipe,
    options: Options,
    *,
    refusal_opening: str | None,
    compliance_opening: str | None,
    loading: dict[str, Any],
    report: Report,
) -> Subject:
    """Load the model and measure its safety side."""
    check_options(options)
    recipe.clock()
    rows = open_rows(safety)
    report("loading the model")
    opened = open_model(model, **loading)
    opened = replace(
        opened,
        refusal_opening=refusal_opening or opened.refusal_opening,
        compliance_opening=compliance_opening or opened.compliance_opening,
    )
    opened = with_lora(opened, recipe.lora, options.seed)
    with undisturbed(opened.loaded.model):
        return measure_subject(opened, rows, recipe.lora, options, report=report)


def _ranking(
    subject: Subject, found: list[tuple[Assessment, Findings]], recipe: Recipe, options: Options, seconds: float
) -> Ranking:
    why = Reasons()
    anchor = subject.anchor_margin.double()
    found = sorted(found, key=lambda pair: float(pair[1].values[HEADLINE].margin[-1].mean()))
    change = torch.stack([findings.values[HEADLINE].margin[-1] - anchor for _, findings in found])
    noise = torch.stack([findings.rehearsed.margin_scatter()[-1] for _, findings in found])
    known = [findings.rehearsed.rows for _, findings in found]
    for i, value in enumerate(noise.tolist()):
        if math.isnan(value):
            few = SCREEN if options.screen else "a single tuning row"
            why[f"sets.{i}.noise"] = f"{few}; chances are over prompts alone"
    told = chances(change, noise.nan_to_num(0.0), known, options.seed)
    entries = []
    for i, (result, _) in enumerate(found):
        held, path = result.record, f"sets.{i}"
        forecast = held["forecast"]
        entry: dict[str, Any] = {"name": held["tuning"]["name"], "digest": held["tuning"]["digest"]}
        entry |= {key: held["tuning"][key] for key in ("rows_read", "used", "loss")}
        few = SCREEN if options.screen else "too few prompts or tuning batches"
        if options.screen:
            why[f"{path}.horizon_steps"] = why[f"{path}.loss"] = SCREEN
        for key in ("margin_change", "safety_kl"):
            ends = {end: why.number(f"{path}.{key}.{end}", forecast[key][end][-1], few) for end in _ENDS}
            entry[key] = {**ends, "unit": forecast[key]["unit"]}
        if i + 1 < len(found):
            entry["above_next"] = float(told.wins[i, i + 1])
        else:
            entry["above_next"] = None
            why[f"{path}.above_next"] = "the last of the ranking"
        noise_value = None if math.isnan(float(noise[i])) else float(noise[i])
        entry |= {"worst": float(told.worst[i]), "noise": noise_value, "horizon_steps": forecast["horizon_steps"]}
        entry |= {"verdict": held["verdict"]["kind"], "text": held["verdict"]["text"]}
        entries.append(entry)
    why["rows"] = "sets were ranked, not rows"
    record = {
        **head_of(subject, recipe, options, why),
        "sets": entries,
        "rows": None,
        "wins": told.wins.tolist(),
        "seconds": seconds,
        "reasons": dict(why),
    }
    return Ranking(record, {"margin_change": change, "wins": told.wins})


_ENDS = ("value", "low", "high")


def head_of(subject: Subject, recipe: Recipe, options: Options, why: Reasons) -> dict[str, Any]:
    """What every ranking begins with."""
    lora = recipe.as_dict()["lora"]
    if lora is None:
        why["recipe.lora"] = "full fine-tuning"
    elif lora["targets"] is None:
        why["recipe.lora.targets"] = "peft's own choice for this architecture"
    return {
        "schema": SCHEMA,
        **provenance(str(subject.forward.device)),
        "seed": options.seed,
        "level": options.level,
        "model": {"name": subject.loaded.name, "digest": subject.loaded.digest},
        "safety": {"name": subject.rows.name, "digest": subject.rows.digest, "used": subject.safety.m},
        "recipe": recipe.as_dict(),
        "margin_anchor": float(subject.anchor_margin.mean()),
    }
