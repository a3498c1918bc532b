"""Rank the rows of one tuning set by what each does to the refusal margin, and leave the worst out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltmeter import store
from tiltmeter.errors import InputError, OutputExists
from tiltmeter.geometry.metric import Adam
from tiltmeter.geometry.motion import Slope, measure_slope
from tiltmeter.geometry.path import LinearPath
from tiltmeter.geometry.space import dot
from tiltmeter.jobs.inputs import open_rows
from tiltmeter.jobs.rank import Ranking, head_of, open_subject
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.subject import Options, Report, Subject, silent
from tiltmeter.jobs.tuning import Tuning, prepare_tuning
from tiltmeter.lm.gram import per_layer_name
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.rows import RowSet

#: Worst rows that are explained by layers, one gradient each.
EXPLAINED = 5
#: Layers named for each of them.
LAYERS = 3


@dataclass(frozen=True)
class RowScores:
    """Predicted harm of rows.

    Attributes:
        rows: [m], place of each scored row in its set.
        first: [m], first order: margin drop by the end of the recipe if all rows pulled like this one, nats.
        harm: [m], the same with the slopes taken midway, which carries the second order.
        layers: place among the scored rows -> layers and the share of the row's first-order harm in each.
    """

    rows: tuple[int, ...]
    first: Tensor
    harm: Tensor
    layers: dict[int, list[tuple[str, float]]]


def score_rows(subject: Subject, tuning: Tuning, recipe: Recipe, explained: int = EXPLAINED) -> RowScores:
    """Harm of every row: its gradient against the margin's, in the optimiser's metric.

    The optimiser moves by -D g with g the mean of row gradients g_i, so row i changes minus the margin by -m' D g_i per
    flow time. That is one forward-mode pass over the rows along D m, at the anchor (first order) and at the middle of
    the straight path (the midpoint rule: second order).

    Args:
        subject: the aligned model.
        tuning: the rows.
        recipe: what will be run.
        explained: worst rows whose layers are told.

    Cost: one gradient of the rows, two JVPs over them, one gradient of the openings, one gradient per explained row.
    Error: exact to second order for SGD; under Adam D is frozen at the start. Clipping counts by its mean share.
    """
    metric, clock = recipe.metric, recipe.clock()
    clip = recipe.max_grad_norm or None
    slope = measure_slope(tuning.objective, tuning.batches, clip=clip, groups=1)
    slope = replace(slope, spread=slope.spread.mul_(tuning.spread_factor(tuning.batches)))
    covered = float(metric.flow_time(clock)[-1])
    kept = 1.0 if clip is None else float((clip / slope.norms.clamp_min(1e-300)).clamp_max(1.0).mean())
    pull = _in_metric(subject.margin_gradient, slope, metric)
    first = tuning.objective.directional(pull) * (-covered * kept)
    middle = LinearPath(metric, clock, slope).displacement(max(1, clock.steps // 2))
    there = _in_metric(subject.negative_margin.gradient(None, middle), slope, metric)
    harm = tuning.objective.directional(there, middle) * (-covered * kept)
    layers = {}
    for place in harm.argsort(descending=True)[:explained].tolist():
        weights = torch.zeros(tuning.objective.m, dtype=torch.float64)
        weights[place] = 1.0
        layers[place] = _by_layer(subject, tuning.objective.gradient(weights), pull)
    rows = tuple(example.row for example in tuning.encoded.examples)
    return RowScores(rows, first, harm, layers)


def _in_metric(gradient: Tensor, slope: Slope, metric: Any) -> Tensor:
    gradient = gradient.to(slope.mean.dtype)
    return metric.preconditioner(slope.mean, slope.spread) * gradient if isinstance(metric, Adam) else gradient


def _by_layer(subject: Subject, gradient: Tensor, pull: Tensor) -> list[tuple[str, float]]:
    """Layers that carry most of a row's harm, with their share of the sum of absolute parts."""
    parts: dict[str, float] = {}
    for name, part, _ in subject.forward.space.slices():
        layer = per_layer_name(name)
        parts[layer] = parts.get(layer, 0.0) - dot(gradient[part], pull[part])
    total = sum(abs(value) for value in parts.values()) or 1.0
    ranked = sorted(parts.items(), key=lambda item: -item[1])
    return [(layer, value / total) for layer, value in ranked[:LAYERS]]


def rank_rows(
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
) -> tuple[Ranking, RowSet]:
    """Order the rows of one set by predicted harm.

    Args:
        model: the aligned model.
        safety: safety prompts.
        tuning: the set; `options.max_tuning` rows of it are scored.
        recipe: what will be run.
        options: how much to measure.
        refusal_opening: how a refusal of this model begins.
        compliance_opening: how a compliant answer begins.
        adapter: an adapter folder to merge into `model` first.
        dtype: of the weights.
        device: "auto", "cpu", "cuda", ...
        trust_remote_code: run code that a hub model brings along.
        report: told of every stage.

    Returns: the ranking, without any text of the rows, and the rows.

    Cost: the safety side, and `score_rows`.
    """
    options = options or Options()
    if options.screen:
        raise InputError("--screen leaves out what rows are ranked by; rank whole sets with it, or leave it out")
    begin = time.perf_counter()
    rows = open_rows(tuning)
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
    report("rows")
    with undisturbed(subject.loaded.model):
        sample = prepare_tuning(subject, rows, recipe, options)
        scores = score_rows(subject, sample, recipe)
    why = Reasons()
    why["sets"] = why["wins"] = "rows of one set were ranked"
    ranked: list[dict[str, Any]] = []
    for place in scores.harm.argsort(descending=True).tolist():
        first, harm = float(scores.first[place]), float(scores.harm[place])
        layers = scores.layers.get(place)
        entry = {
            "row": scores.rows[place],
            "harm": harm,
            "first_order": first,
            "order": "first" if abs(first) >= abs(harm - first) else "second",
            "layers": None if layers is None else [{"name": name, "share": share} for name, share in layers],
        }
        if layers is None:
            why[f"rows.{len(ranked)}.layers"] = f"only the {EXPLAINED} worst rows are explained"
        ranked.append(entry)
    record = {
        **head_of(subject, recipe, options, why),
        "tuning": {"name": rows.name, "digest": rows.digest, "rows_read": len(rows.rows), "scored": len(ranked)},
        "sets": None,
        "rows": ranked,
        "unit": "nats of margin lost by the end of the recipe if every row pulled like this one",
        "wins": None,
        "seconds": time.perf_counter() - begin,
        "reasons": dict(why),
    }
    return Ranking(record, {"harm": scores.harm, "first_order": scores.first}), rows


def write_filtered(record: dict[str, Any], rows: RowSet, drop: float, path: Path) -> int:
    """Write the rows without the worst share of those that were scored; rows that were not scored are kept.

    Returns: rows left out.

    Raises:
        InputError: the share is not between 0 and 1.
        OutputExists: the file is there already.
    """
    if not 0 < drop < 1:
        raise InputError(f"--drop is the share of rows to leave out, between 0 and 1; got {drop}")
    if path.exists():
        raise OutputExists(f"{path} exists already; results are never overwritten. Give another name.")
    count = round(drop * len(record["rows"]))
    out = {entry["row"] for entry in record["rows"][:count]}
    kept = [json.dumps(row, ensure_ascii=False) for place, row in enumerate(rows.rows) if place not in out]
    store.write_text(path, "\n".join(kept) + "\n")
    return count
