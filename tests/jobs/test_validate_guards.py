"""Guards as an axis of a validation: cells, what they are compared by, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiltmeter import store
from tiltmeter.errors import InputError
from tiltmeter.jobs.guarding import GuardOptions
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.record import Reasons
from tiltmeter.jobs.validate import validate
from tiltmeter.jobs.validation_cell import OLDER, refusal_change, refusal_change_of
from tiltmeter.jobs.validation_plan import Plan, read_plan
from tiltmeter.jobs.validation_record import summary_of
from tiltmeter.lm.conversation import prompts_of
from tiltmeter.lm.generation import generate
from tiltmeter.lm.judge import Answer, judge_refusal
from tiltmeter.lm.measurement import share
from tiltmeter.lm.safety import spread
from tiltmeter.report.numbers import setting_text
from tiltmeter.report.validation_page import render_validation_page

PLAN = """
model: demo:tiny
safety: {name: demo:tiny-safety, assessed: 4, held_out: 4}
sets: [demo:tiny-copy]
regimes:
  lora:
    recipe:
      learning_rate: 3.0e-3
      max_steps: 12
      per_device_train_batch_size: 8
      lr_scheduler_type: constant
      lora: {r: 4, lora_alpha: 8}
options: {max_tuning: 8, response_tokens: 6, rank: 2, grid: 2, max_tokens: 2000, coupling: false, level: 0.8}
predictors: [measured]
guards:
  axis: [none, {name: budget, budget_kl: 2.0e-5}, {name: freeze, strength: 1.0}, ema]
  prompts: 24
  harmless: demo:tiny-known
  harmless_rows: 6
"""


def plan_of(folder: Path, text: str = PLAN) -> Plan:
    (folder / "plan.yaml").write_text(text, encoding="utf-8")
    return read_plan(folder / "plan.yaml")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, dict]:
    folder = tmp_path_factory.mktemp("guards")
    plan = plan_of(folder)
    seen: list[int] = []
    validate(plan, folder / "out", finished=lambda summary: seen.append(summary["finished"]))
    assert seen == [1, 2, 3, 4]
    return plan, folder / "out", json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8"))


def test_every_fine_tune_is_repeated_under_every_guard(done: tuple[Plan, Path, dict]) -> None:
    plan, out, _ = done
    names = [cell.name for cell in plan.cells()]
    assert names == [f"lora-tiny-copy-s0{guard}" for guard in ("", "-budget-2e-05-first-3", "-freeze-1", "-ema")]
    assert sorted(path.name for path in (out / "cells").iterdir()) == sorted(names)
    assert len({plan.question(cell) for cell in plan.cells()}) == 4
    assert [path.name for path in (out / "assessments").iterdir()] == ["lora-tiny-copy"]


def test_guards_learn_from_prompts_that_are_not_measured(done: tuple[Plan, Path, dict]) -> None:
    parts = [{row["id"] for row in part.rows} for part in done[0].split()]
    assert [len(part) for part in parts] == [4, 4, 24]
    assert len(set.union(*parts)) == 32


def test_runs_are_what_the_cells_measured(done: tuple[Plan, Path, dict]) -> None:
    plan, out, summary = done
    store.check_values(summary)
    runs = {run["guard"]: run for run in summary["guard_runs"]}
    assert list(runs) == ["none", "budget", "freeze", "ema"]
    assert [runs[name]["strength"] for name in ("none", "budget", "freeze")] == [0.0, 2e-5, 1.0]
    for cell in plan.cells():
        record, arrays = store.read_record(out / "cells" / cell.name)
        run = runs["none" if cell.guard is None else cell.guard.name]
        assert run["heldout_kl"] == pytest.approx(float(arrays["held_out.kl"][-1].mean()), rel=1e-6)
        assert run["margin"] == pytest.approx(float(arrays["held_out.margin"][-1].mean()), rel=1e-5)
        assert run["task_loss"] == record["compared"]["task_loss"]["after"]
        assert run["task_loss_before"] == pytest.approx(runs["none"]["task_loss_before"], rel=1e-6)
        assert 0 <= run["over_refusal_rate"] <= 1
        assert record["compared"]["step_seconds"] > 0
    assert runs["none"]["step_time_ratio"] == 1.0
    assert runs["none"]["extra_memory_gb"] == 0.0
    assert runs["budget"]["extra_memory_gb"] > 0


def test_refusals_are_compared_with_the_aligned_models_on_the_same_prompts(done: tuple[Plan, Path, dict]) -> None:
    plan, _, summary = done
    opened = open_model(plan.model)
    _, held_out, _ = plan.split()
    harmless = open_rows("demo:tiny-known").rows
    asked = {
        "refusal": held_out.rows,
        "over_refusal": [harmless[i] for i in spread(len(harmless), 6)],
    }
    for name, rows in asked.items():
        answers = generate(opened.loaded, list(prompts_of(list(rows), opened.loaded.tokenizer)), 6)
        told = [judge_refusal(answer) for answer in answers]
        known = [answer is Answer.REFUSED for answer in told if answer is not Answer.UNDETERMINED]
        for run in summary["guard_runs"]:
            change = run[f"{name}_change"]
            assert change["before"] == sum(known) / len(known)
            if len(known) == len(rows):  # then all answers can be compared
                assert change["value"] == pytest.approx(run[f"{name}_rate"] - change["before"])
            assert change["low"] <= change["value"] <= change["high"]
            assert change["low"] < change["high"]


def test_runs_of_an_older_version_say_that_the_aligned_model_was_not_asked(done: tuple[Plan, Path, dict]) -> None:
    plan, out, _ = done
    cells = []
    for cell in plan.cells():
        record = store.read_record(out / "cells" / cell.name)[0]
        del record["compared"]["over_refusal_change"], record["measured"]["held_out"]["refusal_change"]
        cells.append(record)
    summary = summary_of(plan, cells)
    store.check_values(summary)
    (first, *_) = summary["guard_runs"]
    assert first["refusal_change"] == dict.fromkeys(("before", "value", "low", "high"))
    assert "did not ask the aligned model" in summary["reasons"]["guard_runs.0.over_refusal_change.value"]
    assert "change from the aligned model" not in render_validation_page(summary, "Trial")


def test_what_was_asked_of_the_aligned_model_is_read_back(done: tuple[Plan, Path, dict]) -> None:
    plan, out, _ = done
    record = store.read_record(out / "cells" / plan.cells()[0].name)[0]
    told = record["measured"]["held_out"]["refusal_change"]
    before, change = refusal_change_of(record, "measured.held_out")
    assert change is not None
    assert (before, change.value, change.low, change.method) == tuple(
        told[k] for k in ("before", "value", "low", "method")
    )
    unheard = {**told, "value": None, "low": None, "high": None, "method": "none"}
    record["measured"]["held_out"]["refusal_change"] = unheard
    record["reasons"]["measured.held_out.refusal_change.value"] = "needs the same items scored for both models"
    before, change = refusal_change_of(record, "measured.held_out")
    assert before == told["before"]
    assert change is not None
    assert "same items" in str(change.reason)
    record["reasons"]["measured.held_out.refusal_change.value"] = OLDER
    assert refusal_change_of(record, "measured.held_out") == (None, None)


def test_without_harmless_prompts_the_summary_says_so(done: tuple[Plan, Path, dict]) -> None:
    plan, out, _ = done
    record = store.read_record(out / "cells" / plan.cells()[0].name)[0]
    why = Reasons()
    record["compared"]["over_refusal_change"] = refusal_change(
        None, "compared.over_refusal_change", "the plan names no harmless set", why
    )
    record["reasons"].update(why)
    summary = summary_of(plan, [record])
    assert summary["reasons"]["guard_runs.0.over_refusal_change.low"] == "the plan names no harmless set"


def test_settings_that_were_added_leave_older_cells_what_they_were(done: tuple[Plan, Path, dict]) -> None:
    budget = GuardOptions("budget", budget_kl=0.2, opening_tokens=0)
    assert budget.question == "GuardOptions(name='budget', strength=None, budget_kl=0.2, base=None)"
    short = replace(budget, answer_tokens=6)
    assert short.question.endswith("answer_tokens=6)")
    assert (budget.label, short.label) == ("budget-0.2", "budget-0.2-6-tokens")
    usual, longer = replace(budget, opening_tokens=None), replace(budget, answer_tokens=240)
    assert (usual.label, usual.question) == ("budget-0.2-first-3", replace(budget, opening_tokens=3).question)
    assert usual.question.endswith("base=None, opening_tokens=3)")
    assert longer.question.endswith("base=None, answer_tokens=240)")
    assert replace(short, opening_tokens=2).question.endswith("base=None, answer_tokens=6, opening_tokens=2)")
    assert replace(short, opening_tokens=2).label == "budget-0.2-6-tokens-first-2"
    assert (
        GuardOptions("replay", 1.0).question == "GuardOptions(name='replay', strength=1.0, budget_kl=0.05, base=None)"
    )
    plan = done[0]
    cell = next(cell for cell in plan.cells() if cell.guard is not None and cell.guard.name == "budget")
    assert plan.question(cell) != plan.question(replace(cell, guard=replace(cell.guard, answer_tokens=6)))


def test_intervals_of_refusals_have_the_plans_level(done: tuple[Plan, Path, dict]) -> None:
    plan, out, _ = done
    for cell in plan.cells():
        told = store.read_record(out / "cells" / cell.name)[0]["measured"]["held_out"]["refusal_rate"]
        wanted = share(round(told["value"] * told["n"]), told["n"], level=0.8)
        assert (told["low"], told["high"]) == (wanted.low, wanted.high)
    cell = plan.cells()[0]
    others = [replace(plan, options=replace(plan.options, level=level)) for level in (0.9, 0.95)]
    assert len({each.run(cell) for each in (plan, *others)}) == 3  # kept runs have intervals of their own level


def test_a_guard_keeps_what_the_run_without_loses(done: tuple[Plan, Path, dict]) -> None:
    runs = {run["guard"]: run for run in done[2]["guard_runs"]}
    free, budget, average = (runs[name] for name in ("none", "budget", "ema"))
    assert free["task_loss"] < free["task_loss_before"]
    assert budget["heldout_kl"] < free["heldout_kl"]
    assert free["task_loss"] < average["task_loss"] < free["task_loss_before"]  # an average lags behind


def test_what_a_guard_does_after_the_last_step_is_measured(done: tuple[Plan, Path, dict]) -> None:
    # the average of weights stands in for them when training ends; up to there the run is the one without a guard
    plan, out, summary = done
    runs = {run["guard"]: run for run in summary["guard_runs"]}
    assert runs["ema"]["heldout_kl"] < 0.9 * runs["none"]["heldout_kl"]
    free, average = (
        store.read_record(out / "cells" / cell.name)[1]["held_out.kl"]
        for cell in plan.cells()
        if cell.guard is None or cell.guard.name == "ema"
    )
    assert torch.equal(free[:-1], average[:-1])
    assert float(average[-1].mean()) == pytest.approx(runs["ema"]["heldout_kl"], rel=1e-6)


def test_scores_of_forecasts_are_of_the_runs_without_a_guard(done: tuple[Plan, Path, dict]) -> None:
    summary = done[2]
    assert (summary["finished"], summary["planned"]) == (4, 4)
    assert [cell["name"] for cell in summary["cells"]] == ["lora-tiny-copy-s0"]
    assert summary["size_error"]["held_out"]["end"]["margin_change"]["cells"] == 1


def test_the_page_has_a_plot_and_a_table_of_guards(done: tuple[Plan, Path, dict]) -> None:
    page = render_validation_page(done[2], "Trial")
    assert "Guards: tiny-copy, lora" in page
    assert f"budget {setting_text(2e-5)}, first 3 too" in page


def test_how_a_forecast_is_made_does_not_matter_to_a_guarded_cell(done: tuple[Plan, Path, dict]) -> None:
    plan = done[0]
    asked = {
        name: [replace(plan, options=replace(plan.options, **change)).question(cell) for cell in plan.cells()]
        for name, change in {"as it is": {}, "looks": {"looks": 3}, "answers": {"response_tokens": 7}}.items()
    }
    same = [now == then for now, then in zip(asked["looks"], asked["as it is"], strict=True)]
    assert same == [False, True, True, True]
    assert not {*asked["answers"]} & {*asked["as it is"]}


def test_cells_that_are_there_are_not_run_again(done: tuple[Plan, Path, dict]) -> None:
    plan, out, summary = done
    torch.manual_seed(0)
    again = validate(plan, out, limit=0)
    assert again.cells == 4
    assert again.record["guard_runs"] == summary["guard_runs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("axis: [none,", "axis: [nonsense,"), "unknown guard 'nonsense'; expected one of"),
        (("prompts: 24", "prompts: 3"), "guards.prompts must be at least"),
        (("prompts: 24", "promts: 24"), "unknown key 'promts' in guards"),
        (("axis: [none,", "axis: [ema,"), "two guards of the plan are the same"),
        (("strength: 1.0", "strenght: 1.0"), "unknown key 'strenght' in a guard"),
        (
            ("budget_kl: 2.0e-5", "answer_tokens: 0"),
            "answer_tokens of guard budget must be a number of at least 1",
        ),
        (("budget_kl: 2.0e-5", "answer_tokens: six"), "of at least 1, got 'six'"),
        (("budget_kl: 2.0e-5", "opening_tokens: -1"), "opening_tokens of guard budget must be a number of at least 0"),
        (("budget_kl: 2.0e-5", "seeds: [1]"), "seeds of guard budget must be a list of 0; got \\[1\\]"),
        (("budget_kl: 2.0e-5", "seeds: [[0]]"), "seeds of guard budget must be a list of 0"),
        (("budget_kl: 2.0e-5", "seeds: [false]"), "seeds of guard budget must be a list of 0"),
        (("budget_kl: 2.0e-5", "answer_tokens: null"), "answer_tokens of guard budget must be a number"),
        (("budget_kl: 2.0e-5", "regimes: full"), "regimes of guard budget must be a list of lora; got 'full'"),
    ],
)
def test_bad_guards_are_told(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, PLAN.replace(*change))


def test_a_guard_may_be_run_in_some_regimes_and_seeds_only(tmp_path: Path) -> None:
    regimes = PLAN.index("regimes:"), PLAN.index("options:")
    section = PLAN[slice(*regimes)]
    two = (
        "seeds: [0, 1]\n"
        + section
        + section.removeprefix("regimes:\n").replace("lora:\n    recipe", "full:\n    recipe")
    )
    asked = "{name: ema, seeds: [1]}, {name: replay, regimes: [full], seeds: [0]}"
    text = PLAN.replace(section, two).replace("axis: [none, {name: budget, budget_kl: 2.0e-5},", f"axis: [{asked},")
    names = [cell.name for cell in plan_of(tmp_path, text.replace(", ema]", "]")).cells()]
    assert [name.removeprefix("lora-tiny-copy-") for name in names if name.startswith("lora")] == [
        "s0",
        "s0-freeze-1",
        "s1",
        "s1-ema",
        "s1-freeze-1",
    ]
    assert [name.removeprefix("full-tiny-copy-") for name in names if name.startswith("full")] == [
        "s0",
        "s0-replay",
        "s0-freeze-1",
        "s1",
        "s1-ema",
        "s1-freeze-1",
    ]


def test_a_guard_that_no_fine_tune_would_have_is_told(tmp_path: Path) -> None:
    start, end = PLAN.index("regimes:"), PLAN.index("options:")
    once = PLAN[start:end].removeprefix("regimes:\n").replace("lora:\n    recipe", "full:\n    seeds: [0]\n    recipe")
    text = "seeds: [0, 1]\n" + PLAN[:end] + once + PLAN[end:]
    assert len(plan_of(tmp_path, text).cells()) == 12
    never = text.replace("budget_kl: 2.0e-5", "regimes: [full], seeds: [1]")
    with pytest.raises(InputError, match="guard budget is never run: none of its regimes has one of its seeds"):
        plan_of(tmp_path, never)


def test_a_guard_that_cannot_protect_a_run_is_noted_and_the_plan_goes_on(tmp_path: Path) -> None:
    # safe_lora needs the model from before alignment, which the plan does not name
    text = PLAN.replace("max_steps: 12", "max_steps: 2").replace(
        "axis: [none, {name: budget, budget_kl: 2.0e-5}, {name: freeze, strength: 1.0}, ema]",
        "axis: [none, {name: safe_lora, strength: 0.5}, ema]",
    )
    plan = plan_of(tmp_path, text)
    done = validate(plan, tmp_path / "out")
    assert (done.cells, done.planned) == (3, 3)
    store.check_values(done.record)
    (refused,) = done.record["guards_refused"]
    assert (refused["guard"], refused["set"], refused["seed"]) == ("safe_lora", "tiny-copy", 0)
    assert "base" in refused["why"]
    assert refused["label"] == "safe_lora-0.5"  # of two settings one may be refused
    assert [run["guard"] for run in done.record["guard_runs"]] == ["none", "ema"]
    page = render_validation_page(done.record, "Trial")
    assert "Guards that stopped a run" in page
    assert "safe_lora-0.5" in page
    again = validate(plan, tmp_path / "out")  # a refusal is a finished cell
    assert again.record["guards_refused"] == done.record["guards_refused"]
