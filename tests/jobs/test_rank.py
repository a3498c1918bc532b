"""Ranking of sets and rows on demo:tiny: chances by hand, row harms by single gradients, real runs on either end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from tiltmeter import store
from tiltmeter.errors import InputError, OutputExists
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.motion import measure_slope
from tiltmeter.geometry.space import dot
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.rank import chances, rank
from tiltmeter.jobs.rank_rows import rank_rows, score_rows, write_filtered
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject, measure_subject, with_lora
from tiltmeter.jobs.trial import Asked, run_trial
from tiltmeter.jobs.tuning import prepare_tuning
from tiltmeter.lm.rows import RowSet
from tiltmeter.report.ranking_page import render_ranking_page

OPTIONS = Options(max_safety=8, max_tuning=32, rank=2, response_tokens=8, grid=2, max_tokens=4000)
SETS = ["demo:tiny-known", "demo:tiny-harmful", "demo:tiny-copy"]
SLOW = {"steps": 16, "batch_size": 8, "schedule": "constant", "max_grad_norm": 0.0}
RECIPES = {
    "adamw": Recipe(learning_rate=1e-4, **SLOW),
    "sgd": Recipe("sgd", learning_rate=3e-3, **SLOW),
}


@pytest.fixture(scope="module")
def subject() -> Subject:
    opened = with_lora(open_model("demo:tiny"), None, 0)
    return measure_subject(opened, open_rows("demo:tiny-safety"), None, OPTIONS)


def mixed(harmful: int, harmless: int) -> RowSet:
    """Harmful rows first."""
    parts = (open_rows("demo:tiny-harmful").rows[:harmful], open_rows("demo:tiny-known").rows[:harmless])
    return RowSet("mixed", parts[0] + parts[1], "0" * 16)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_chances_of_noisy_means_are_those_of_student(scale: float) -> None:
    change = torch.tensor([[-1.0] * 4, [0.0] * 4]) * scale
    found = chances(change, torch.tensor([2.0, 0.0]) * scale, [5, 5], 0, draws=40_000)
    assert abs(float(found.wins[0, 1]) - stats.t.cdf(0.5, 4)) < 0.01
    assert_close(found.wins + found.wins.T, torch.ones(2, 2, dtype=torch.float64))
    assert_close(found.worst.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_prompts_are_drawn_alike_for_all_sets() -> None:
    """One set does a little more harm on every prompt; prompts differ by far more, and must not blur that."""
    prompts = torch.tensor([-9.0, 0.0, 5.0, 40.0])
    found = chances(torch.stack([prompts - 0.01, prompts]), torch.zeros(2), [2, 2], 0)
    assert float(found.wins[0, 1]) == 1.0
    assert float(found.worst[0]) == 1.0


def test_sets_are_ranked_by_harm_with_one_safety_side(tmp_path: Path) -> None:
    stages: list[str] = []
    result = rank("demo:tiny", "demo:tiny-safety", SETS, RECIPES["adamw"], OPTIONS, report=stages.append)
    store.check_values(result.record)
    assert stages.count("safety subspace") == 1
    names = [each["name"] for each in result.record["sets"]]
    assert names == ["demo:tiny-harmful", "demo:tiny-copy", "demo:tiny-known"]
    first = result.record["sets"][0]
    assert_close(first["margin_change"]["value"], float(result.arrays["margin_change"][0].mean()))
    assert first["above_next"] == result.record["wins"][0][1] > 0.9
    page = render_ranking_page(result.record, "Ranking")
    assert all(name in page for name in names)


def test_fewer_than_two_sets_or_one_set_twice_are_refused() -> None:
    for names in (["demo:tiny-copy"], ["demo:tiny-copy"] * 2):
        with pytest.raises(InputError, match="two or more different"):
            rank("demo:tiny", "demo:tiny-safety", names, RECIPES["sgd"], OPTIONS)


@pytest.mark.parametrize("name", RECIPES)
def test_harms_of_rows_are_single_gradients_in_the_optimisers_metric(subject: Subject, name: str) -> None:
    recipe = RECIPES[name]
    tuning = prepare_tuning(subject, mixed(4, 8), recipe, OPTIONS)
    scores = score_rows(subject, tuning, recipe, explained=2)
    slope = measure_slope(tuning.objective, tuning.batches, groups=1)
    spread = slope.spread * tuning.spread_factor(tuning.batches)
    pull = subject.margin_gradient
    metric = recipe.metric
    if isinstance(metric, Adam):
        pull = pull / ((slope.mean.square() + spread.square()).sqrt() + metric.epsilon)
    else:
        assert isinstance(metric, Sgd)
    flow = recipe.steps * recipe.learning_rate
    for row in (0, 5, 11):
        one = torch.zeros(12, dtype=torch.float64)
        one[row] = 1.0
        expected = -flow * dot(tuning.objective.gradient(one), pull)
        assert_close(float(scores.first[row]), expected, rtol=1e-3, atol=1e-6)
    # what the rows do together is what the straight path does to the margin, at first order
    together = dot(subject.margin_gradient, metric.direction(slope.mean, spread)) * -flow
    weighted = float((scores.first * tuning.batches.mean(0)).sum())
    assert_close(weighted, together, rtol=1e-3, atol=1e-6)
    worst = int(scores.harm.argmax())
    assert len(scores.layers) == 2
    assert len(scores.layers[worst]) == 3
    assert scores.layers[worst][0][1] >= scores.layers[worst][1][1]


def test_harmful_rows_come_first_and_the_first_order_is_what_a_short_step_does(subject: Subject) -> None:
    recipe = RECIPES["sgd"]
    tuning = prepare_tuning(subject, mixed(8, 24), recipe, OPTIONS)
    scores = score_rows(subject, tuning, recipe, explained=0)
    # every machine trains the model for itself: on some one row of the eight is put behind, on others none
    before_all_others = (scores.harm[:8, None] > scores.harm[None, 8:]).all(1)
    assert int(before_all_others.sum()) >= 7
    # a short step along each harmful row's gradient
    gradients = [tuning.objective.gradient(torch.eye(32, dtype=torch.float64)[row]) for row in range(8)]

    def drop(length: float) -> torch.Tensor:
        moved = [subject.negative_margin.losses(-length * g) + subject.anchor_margin for g in gradients]
        return torch.stack(moved).double().mean(-1) / length * recipe.steps * recipe.learning_rate

    assert_close(drop(1e-4), scores.first[:8], rtol=0.05, atol=0.05)


def test_rows_keep_their_places_in_a_set_that_was_sampled(subject: Subject) -> None:
    tuning = prepare_tuning(subject, mixed(0, 64), RECIPES["sgd"], replace(OPTIONS, max_tuning=8))
    assert score_rows(subject, tuning, RECIPES["sgd"], 0).rows == (0, 8, 16, 24, 32, 40, 48, 56)


def test_the_worst_rows_are_left_out_of_the_written_set(tmp_path: Path) -> None:
    file, out = tmp_path / "mixed.jsonl", tmp_path / "filtered.jsonl"
    rows = mixed(4, 12).rows
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    result, held = rank_rows("demo:tiny", "demo:tiny-safety", str(file), RECIPES["adamw"], OPTIONS)
    store.check_values(result.record)
    ranked = [entry["row"] for entry in result.record["rows"]]
    assert sorted(ranked) == list(range(16))
    assert [entry["harm"] for entry in result.record["rows"]] == sorted(result.arrays["harm"].tolist(), reverse=True)
    assert write_filtered(result.record, held, 0.25, out) == 4
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert kept == [row for place, row in enumerate(rows) if place not in ranked[:4]]
    assert result.record["rows"][0]["layers"]
    assert result.record["rows"][-1]["layers"] is None
    page = render_ranking_page(result.record, "Rows")
    assert all(row["prompt"] not in page for row in rows)
    with pytest.raises(OutputExists):
        write_filtered(result.record, held, 0.25, out)
    for drop in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="--drop"):
            write_filtered(result.record, held, drop, tmp_path / "other.jsonl")


def test_the_worst_tenth_harms_more_than_a_random_one_and_the_best_less(subject: Subject, tmp_path: Path) -> None:
    """The ranking's own trial: three real fine-tunes with transformers' Trainer."""
    recipe = Recipe(learning_rate=1e-4, steps=6, batch_size=8, schedule="constant")
    rows = mixed(40, 120)
    tuning = prepare_tuning(subject, rows, recipe, replace(OPTIONS, max_tuning=160))
    order = score_rows(subject, tuning, recipe, explained=0).harm.argsort(descending=True).tolist()
    by_chance = torch.randperm(160, generator=torch.Generator().manual_seed(1)).tolist()
    asked = {"assessed": Asked(subject.safety, (), ())}
    drops = {}
    for name, chosen in (("worst", order[:16]), ("random", by_chance[:16]), ("best", order[-16:])):
        part = RowSet(name, tuple(rows.rows[i] for i in chosen), "0" * 16)
        folder = tmp_path / name
        trial = run_trial("demo:tiny", part, recipe, asked, [], folder, seed=0, answer_tokens=4, max_tokens=4000)
        margin = trial.seen["assessed"].margin
        drops[name] = float((margin[0] - margin[-1]).mean())
    assert drops["worst"] > drops["random"] + 0.5
    assert drops["random"] > drops["best"]
