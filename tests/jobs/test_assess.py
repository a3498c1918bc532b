"""Assessments of demo:tiny against fine-tunes that are really run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tiltmeter import store
from tiltmeter.errors import InputError
from tiltmeter.jobs.assess import assess, assess_subject, check_options
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options, Subject, measure_subject, with_lora
from tiltmeter.lm.conversation import collate, encode

OPTIONS = Options(max_safety=16, max_tuning=64, rank=4, response_tokens=8, grid=4, max_tokens=4000)


@pytest.fixture(scope="module")
def subject() -> Subject:
    opened = with_lora(open_model("demo:tiny"), None, 0)
    return measure_subject(opened, open_rows("demo:tiny-safety"), None, OPTIONS)


def fine_tuned(subject: Subject, name: str, recipe: Recipe) -> dict[int, tuple[float, float]]:
    """Step -> change of the mean margin and mean safety KL of a real run, at the steps of the forecast."""
    model = copy.deepcopy(subject.loaded.model)
    examples = encode(open_rows(name).rows, subject.loaded.tokenizer, 512).examples
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, momentum=recipe.momentum)
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, betas=recipe.betas, weight_decay=recipe.weight_decay)
    start = subject.forward.space.flatten(subject.forward.at())
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    out = {}
    for step, rate in enumerate(recipe.clock().rates.tolist(), start=1):
        if len(order) < recipe.batch_size:
            order = torch.randperm(len(examples), generator=generator).tolist()
        batch = collate([examples[order.pop()] for _ in range(recipe.batch_size)], 0)
        optimizer.zero_grad()
        model(input_ids=batch.tokens, labels=batch.labels).loss.backward()
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if step in recipe.clock().grid(OPTIONS.grid):
            moved = torch.cat([p.detach().flatten() for p in parameters]) - start
            margin = -subject.negative_margin.losses(moved) - subject.anchor_margin
            out[step] = float(margin.mean()), float(subject.divergence.losses(moved).mean())
    return out


SLOW = {"steps": 16, "batch_size": 16, "schedule": "constant", "max_grad_norm": 0.0}
GENTLE: dict[str, tuple[str, Recipe, str]] = {
    "adamw on a new task": ("demo:tiny-copy", Recipe(learning_rate=1e-4, **SLOW), "wears"),
    "sgd on the known task": ("demo:tiny-known", Recipe("sgd", learning_rate=3e-3, **SLOW), "holds"),
    "adamw on harmful rows": ("demo:tiny-harmful", Recipe(learning_rate=1e-4, **SLOW), "wears"),
}


@pytest.mark.parametrize("case", GENTLE)
def test_inside_the_horizon_a_real_run_is_where_the_forecast_says(subject: Subject, case: str) -> None:
    name, recipe, verdict = GENTLE[case]
    forecast = (record := assess_subject(subject, open_rows(name), recipe, OPTIONS).record)["forecast"]
    truth = fine_tuned(subject, name, recipe)
    last = forecast["horizon_steps"]
    assert last >= 6
    assert record["verdict"]["kind"] == verdict
    at = forecast["steps"].index(last)
    margin, kl = truth[last]
    change = forecast["margin_change"]
    assert change["low"][at] < margin < change["high"][at]
    assert abs(change["value"][at] / margin - 1) < 0.5
    assert 0.4 < forecast["safety_kl"]["value"][at] / kl < 2.5
    # and the interval is narrow enough to tell the direction
    assert change["low"][at] * change["high"][at] > 0


@pytest.mark.parametrize("rate", [5e-4, 1e-3])
def test_a_collapse_is_announced_and_happens(subject: Subject, rate: float) -> None:
    recipe = Recipe(learning_rate=rate, steps=32, batch_size=16, schedule="constant")
    result = assess_subject(
        subject, open_rows("demo:tiny-copy"), recipe, Options(**{**vars(OPTIONS), "budget_margin": 1.0})
    )
    margin = fine_tuned(subject, "demo:tiny-copy", recipe)[32][0] + float(subject.anchor_margin.mean())
    assert float(subject.anchor_margin.mean()) > 5
    assert margin < -5
    assert result.outlook.verdict == "collapses"
    assert result.over_budget
    assert 3 < result.outlook.crossings[0].value < 32
    # how deep it falls once it has fallen depends on the model, which every machine trains for itself and rounds in its
    # own way: 12 % and 25 % off at the two rates on one, less than 20 % on others
    assert result.record["forecast"]["margin_change"]["value"][-1] == pytest.approx(
        margin - float(subject.anchor_margin.mean()), rel=0.3
    )


def test_the_same_rate_on_the_known_task_is_no_collapse(subject: Subject) -> None:
    recipe = Recipe(learning_rate=1e-3, steps=32, batch_size=16, schedule="constant")
    assert fine_tuned(subject, "demo:tiny-known", recipe)[32][0] > -0.5
    told = assess_subject(subject, open_rows("demo:tiny-known"), recipe, OPTIONS)
    assert told.outlook.verdict in ("holds", "cannot tell")


def test_a_subject_serves_only_recipes_that_train_its_parameters(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"trains Lora\(r=2.*measured for all parameters"):
        assess_subject(subject, open_rows("demo:tiny-copy"), Recipe(lora=Lora(2, 4.0)), OPTIONS)


def test_assess_with_lora_by_name_is_the_same_every_time() -> None:
    recipe = Recipe(learning_rate=1e-3, steps=8, batch_size=4, lora=Lora(2, 4.0, ("q_proj",)))
    options = Options(max_safety=4, max_tuning=8, rank=2, response_tokens=8, grid=3, max_tokens=200)
    state = torch.get_rng_state()
    stages: list[str] = []
    runs = [
        assess("demo:tiny", "demo:tiny-safety", "demo:tiny-copy", recipe, options, report=stages.append)
        for _ in range(2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    store.check_values(runs[0].record)
    assert stages[0] == "loading the model"
    assert "rehearsal" in stages
    for key in ("forecast", "aic", "spectrum", "layers", "baselines", "verdict"):
        assert runs[0].record[key] == runs[1].record[key]
    assert runs[0].record["space"]["kind"] == "lora"
    assert runs[0].record["space"]["size"] == 2 * 2 * 64 * 2
    assert runs[0].record["model"]["parameters"] == 115264
    assert runs[0].record["safety"]["refusal_opening"] == "sorry I cannot"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_safety": 1}, "--max-safety must be at least 2, got 1"),
        ({"max_tuning": 1}, "--max-tuning must be at least 2"),
        ({"groups": 1}, "--groups must be at least 2"),
        ({"krylov": -1}, "--krylov must be at least 0"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"level": 1.0}, "--level must lie between 0 and 1"),
        ({"level": float("nan")}, "--level must lie between 0 and 1"),
        ({"rank": 9, "max_safety": 8}, "limited to 8 prompts, which cannot determine 9"),
    ],
)
def test_options_that_cannot_give_an_answer(changes: dict[str, Any], message: str) -> None:
    check_options(Options())
    check_options(Options(rank=9, max_safety=8, forecast_only=True))  # no directions are looked for
    with pytest.raises(InputError, match=message):
        check_options(Options(**changes))
