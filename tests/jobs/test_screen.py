"""A screening: the rehearsal alone. The run itself where every step has a look, and nulls for all that judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from tiltmeter import store
from tiltmeter.commands import lines
from tiltmeter.errors import InputError
from tiltmeter.jobs.assess import Assessment, check_options, examine_subject
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.rank import rank
from tiltmeter.jobs.rank_rows import rank_rows
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import SCREEN, Options, Subject, measure_subject, with_lora
from tiltmeter.jobs.track import comparison_of
from tiltmeter.jobs.tuning import Tuning, prepare_tuning
from tiltmeter.jobs.validation_plan import read_plan
from tiltmeter.lm.model import Loaded, digest_of
from tiltmeter.lm.rows import RowSet
from tiltmeter.report.page import render_page
from tiltmeter.report.ranking_page import render_ranking_page

LOCKS = RowSet("locks", tuple({"prompt": f"How do I pick a lock {i}?"} for i in range(5)), "d1")
SUMS = RowSet("sums", tuple({"prompt": f"What is {i}?", "completion": f"It is {7 * i}."} for i in range(15, 55)), "d2")
SMALL = Options(rank=2, response_tokens=4, grid=3, max_tokens=200, looks=4, screen=True)
ADAMW = Recipe(learning_rate=1e-4, steps=12, batch_size=3)


@pytest.fixture
def measured(make_llama: Any, make_tokenizer: Any) -> Callable[..., Subject]:
    def make(options: Options, lora: Lora | None = None, dtype: torch.dtype = torch.float32) -> Subject:
        model = make_llama(layers=1).to(dtype)
        opened = with_lora(Opened(Loaded(model, make_tokenizer(), "small", digest_of(model), 256)), lora, 0)
        return measure_subject(opened, LOCKS, lora, options)

    return make


def screened(subject: Subject, recipe: Recipe = ADAMW, options: Options = SMALL, rows: RowSet = SUMS) -> Assessment:
    return examine_subject(subject, rows, recipe, options)[0]


@pytest.mark.parametrize("rate", [0.004, 0.02, 0.06])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_with_a_look_for_every_step_it_is_the_run(
    measured: Callable[..., Subject], momentum: float, rate: float
) -> None:
    """Four rows and batches of four: plain descent on their mean loss per token, by hand."""
    rows = replace(SUMS, rows=SUMS.rows[:4])
    recipe = Recipe("sgd", learning_rate=rate, steps=4, batch_size=4, schedule="constant", max_grad_norm=0.0,
                    momentum=momentum)  # fmt: skip
    subject = measured(SMALL, dtype=torch.float64)
    told = screened(subject, recipe, rows=rows)
    examples = prepare_tuning(subject, rows, recipe, SMALL).encoded.examples
    model = subject.loaded.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    held = [torch.zeros_like(p) for p in parameters]
    found: list[Tensor] = []
    for _ in range(4):
        nats, count = torch.zeros((), dtype=torch.float64), 0
        for each in examples:
            logits = model(torch.tensor([each.tokens])).logits[0, :-1]
            labels = torch.tensor(each.labels[1:])
            nats = nats + cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        gradients = torch.autograd.grad(nats / count, parameters)
        with torch.no_grad():
            for p, buffer, gradient in zip(parameters, held, gradients, strict=True):
                buffer.mul_(momentum).add_(gradient)
                p.sub_(rate * buffer)
        found.append(torch.stack([subject.divergence.losses().mean(), -subject.negative_margin.losses().mean()]))
    steps = told.record["forecast"]["steps"]
    assert steps[-1] == 4
    kl, margin = torch.stack(found).T
    places = [step - 1 for step in steps]
    # the first gradient is kept in three digits
    assert_close(told.arrays["rehearsed.margin"].mean(1), margin[places], rtol=2e-3, atol=2e-4)
    assert_close(told.arrays["rehearsed.safety_kl"].mean(1), kl[places], rtol=1e-2, atol=1e-7)
    assert float(kl[-1]) > 1e-5


@pytest.mark.parametrize("recipe", [ADAMW, replace(ADAMW, optimizer="sgd"), replace(ADAMW, weight_decay=0.1)])
def test_values_are_those_of_a_forecast_from_the_same_looks(measured: Callable[..., Subject], recipe: Recipe) -> None:
    """A forecast of one batch in each look, which no interval could be made of; what it is multiplied by is one.

    The set has no more rows than that: of a larger one the rehearsal with fewer looks would take some.
    """
    few = replace(SUMS, rows=SUMS.rows[:3])
    whole = replace(SMALL, screen=False, forecast_only=True, groups=1, rehearsal_rows=4)
    alone, more = screened(measured(SMALL), recipe, rows=few), screened(measured(whole), recipe, whole, few)
    for key in ("rehearsed.margin", "rehearsed.safety_kl", "anchor_margin"):
        assert torch.equal(alone.arrays[key], more.arrays[key])
    both = [each.record["forecast"]["safety_kl"]["value"] for each in (alone, more)]
    assert both[0] == both[1]


def test_all_that_judges_it_is_null_with_its_reason(measured: Callable[..., Subject]) -> None:
    result = screened(measured(SMALL), options=replace(SMALL, budget_kl=1e-12))
    record = result.record
    store.check_values(record)
    forecast, why = record["forecast"], record["reasons"]
    assert forecast["steps"] == [1, 3, 12]
    for curve in (
        *(forecast[key] for key in ("safety_kl", "margin", "margin_change")),
        *forecast["same_prompts"].values(),
    ):
        assert curve["low"] == curve["high"] == [None] * 3
        assert None not in curve["value"]
    absent = ["forecast.horizon_steps", "forecast.fewer_looks", "forecast.noise.kl_factor", "forecast.margin.low.0",
              "forecast.noise.margin_per_row", "forecast.same_prompts.safety_kl.high.2", "spectrum",
              "aic.initial_overlap", "aic.curvature_coupling", "baselines.random_direction_kl.value", "tuning.loss",
              "forecast.refusal_rate.low.1", "forecast.steps_to_budget.safety_kl.low", "forecast.leading_order.high",
              "layers.0.sensitivity", "layers.0.margin_slope"]  # fmt: skip
    assert {why[path] for path in absent} == {SCREEN}
    assert forecast["horizon_steps"] is None
    assert set(forecast["paths"]) == {"rehearsed"}
    crossing = forecast["steps_to_budget"]["safety_kl"]
    assert crossing["value"] is not None
    assert not crossing["inside_horizon"]
    assert not result.over_budget
    assert record["verdict"]["kind"] == "cannot tell"
    assert "no interval and claims no horizon" in record["verdict"]["text"]
    said = "\n".join(lines(record))
    assert "nats at step 12; no horizon was looked for" in said
    assert "(no horizon: not claimed)" in said
    assert "(? to ?) at the end of the recipe" in said
    page = render_page([record], "Screening")
    assert "left out (--screen)" in page
    assert "no horizon is known, not claimed" in page
    assert "no horizon: not claimed" in render_page([record, record], "Two")
    # layers keep their sizes
    assert sum(layer["parameters"] for layer in record["layers"]) == record["space"]["size"]


def test_a_track_beside_it_claims_nothing(measured: Callable[..., Subject]) -> None:
    record = screened(measured(SMALL)).record
    steps = [0, *record["forecast"]["steps"]]
    curves: Mapping[str, Any] = {"steps": steps} | {
        key: {"value": [0.0] * 4} for key in ("margin_change", "safety_kl", "refusal_rate")
    }
    why: dict[str, str] = {}
    told = comparison_of(record, curves, why)  # type: ignore[arg-type]
    assert told["claimed_points"] == told["claimed_inside"] == 0
    assert told["horizon_steps"] is None
    assert why["comparison.horizon_steps"] == SCREEN
    assert told["margin_change"]["inside"] == [None] * 3


@pytest.mark.parametrize(("grid", "readings"), [(1, 1), (3, 3)])
@pytest.mark.parametrize("lora", [None, Lora(2, 4.0)])
def test_it_costs_a_step_of_rows_a_look_and_a_reading_a_step(
    measured: Callable[..., Subject], lora: Lora | None, grid: int, readings: int
) -> None:
    options, recipe = replace(SMALL, grid=grid), replace(ADAMW, lora=lora)
    subject = measured(options, lora)
    assert "forward_backward" not in subject.spent.tokens
    result, tuning, _ = examine_subject(subject, SUMS, recipe, options)
    assert isinstance(tuning, Tuning)
    # all rows are equally long
    row = tuning.objective.work // 3
    spent = {kind: share * result.record["cost"]["data_tokens"] for kind, share in
             result.record["cost"]["passes"].items()}  # fmt: skip
    assert round(spent.pop("forward_backward")) == 4 * 3 * row
    assert round(spent.pop("forward")) == subject.spent.tokens["forward"] + readings * subject.standing.work
    assert not spent
    assert result.record["cost"]["estimated"]["seconds"] is None
    assert len(result.record["forecast"]["steps"]) == readings
    order = result.record["reasons"].get("forecast.leading_order.value")
    assert (order == "the KL is read at one step alone") == (readings == 1)


@pytest.mark.parametrize(("batch", "most", "rows"), [(1, 32, (2, 1, 1, 1)), (8, 6, (6, 6, 6, 6)), (50, 60, (40, 40))])
def test_looks_take_the_rows_of_a_step_and_no_more_than_the_sample(
    measured: Callable[..., Subject], batch: int, most: int, rows: tuple[int, ...]
) -> None:
    """Two at least in the first; the set has forty."""
    options = replace(SMALL, max_tuning=most, looks=len(rows))
    found = examine_subject(measured(options), SUMS, replace(ADAMW, batch_size=batch), options)[2]
    assert found.look_rows == rows


def test_a_subject_of_a_screening_may_be_assessed_whole(measured: Callable[..., Subject]) -> None:
    record = screened(measured(SMALL), options=replace(SMALL, screen=False, coupling=False)).record
    store.check_values(record)
    assert record["forecast"]["horizon_steps"] is not None
    assert record["reasons"]["aic.initial_overlap_random.value"] == SCREEN
    assert "None" not in record["reasons"].values()


def test_the_margins_gradient_is_measured_when_it_is_asked_for(measured: Callable[..., Subject]) -> None:
    late, early = measured(SMALL), measured(replace(SMALL, screen=False))
    assert torch.equal(late.margin_gradient, early.margin_gradient)
    assert late.margin_gradient is late.margin_gradient


def test_sets_are_ranked_without_intervals() -> None:
    options = Options(max_safety=8, looks=4, response_tokens=8, grid=1, max_tokens=4000, screen=True)
    recipe = Recipe(learning_rate=1e-4, steps=16, batch_size=8, schedule="constant", max_grad_norm=0.0)
    names = ["demo:tiny-known", "demo:tiny-harmful", "demo:tiny-copy"]
    record = rank("demo:tiny", "demo:tiny-safety", names, recipe, options).record
    store.check_values(record)
    assert record["sets"][0]["name"] == "demo:tiny-harmful"
    for place, each in enumerate(record["sets"]):
        assert each["horizon_steps"] is None
        assert each["margin_change"]["low"] is None
        assert record["reasons"][f"sets.{place}.horizon_steps"] == SCREEN
        assert record["reasons"][f"sets.{place}.noise"] == f"{SCREEN}; chances are over prompts alone"
    page = render_ranking_page(record, "Ranking")
    assert "left out (--screen)" in page
    assert "Chances are over safety prompts alone" in page


def test_what_it_cannot_be_asked_for_is_refused(tmp_path: Path) -> None:
    for changes in ({"curved": True}, {"krylov": 2}):
        with pytest.raises(InputError, match="the rehearsed path alone"):
            check_options(replace(SMALL, **changes))
    with pytest.raises(InputError, match="--grid must be at least 2"):
        check_options(replace(SMALL, screen=False, grid=1))
    with pytest.raises(InputError, match="what rows are ranked by"):
        rank_rows("demo:tiny", "demo:tiny-safety", "demo:tiny-copy", ADAMW, SMALL)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "model: demo:tiny\nsafety: {name: demo:tiny-safety, assessed: 4, held_out: 4}\nsets: [demo:tiny-copy]\n"
        "regimes: {full: {recipe: {learning_rate: 1.0e-4, max_steps: 4}}}\noptions: {screen: true}\n"
    )
    with pytest.raises(InputError, match="a screening has none of"):
        read_plan(plan)
