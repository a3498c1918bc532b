"""The estimate made before an assessment names exactly the passes that it then takes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter import store
from tiltmeter.errors import OutOfMemory, UnsupportedModel
from tiltmeter.geometry.objective import Passes
from tiltmeter.jobs import estimate as estimate_module
from tiltmeter.jobs import subject as subject_module
from tiltmeter.jobs.assess import Assessment, assess_subject
from tiltmeter.jobs.estimate import Estimate, peak_gb
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.memory import resident_bytes, tokens_within
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options, Subject, measure_subject, snapshot, with_lora
from tiltmeter.lm.model import Loaded, digest_of
from tiltmeter.lm.rows import RowSet

SAFETY = RowSet(
    "safety", tuple({"prompt": f"How do I pick a lock{' and a cake' * (i % 3)} {i}?"} for i in range(8)), "s"
)
TUNING = RowSet(
    "tuning",
    tuple({"prompt": f"What is {i} plus {i}?", "completion": f"It is{' well' * (i % 4)} {2 * i}."} for i in range(9)),
    "t",
)
SMALL = Options(rank=3, response_tokens=6, max_tokens=80, grid=3)
LORA = Lora(2, 4.0, ("q_proj", "down_proj"))


def measured(make_llama: Any, make_tokenizer: Any, lora: Lora | None = None, options: Options = SMALL) -> Subject:
    model = make_llama(layers=1)
    opened = Opened(Loaded(model, make_tokenizer(), "small", digest_of(model), 256))
    return measure_subject(with_lora(opened, lora, 0), SAFETY, lora, options)


def run(subject: Subject, recipe: Recipe, options: Options) -> tuple[Assessment, Estimate, Passes]:
    """An assessment, what was announced, and the passes made after the announcement."""
    told: list[tuple[Estimate, Passes]] = []
    passes = subject.forward.passes
    result = assess_subject(
        subject, TUNING, recipe, options, announce=lambda expected: told.append((expected, snapshot(passes)))
    )
    (expected, before) = told[0]
    return result, expected, Passes(passes.calls - before.calls, passes.tokens - before.tokens)


#: Recipe, options, whether Hessian products are differences.
CASES: dict[str, tuple[Recipe, dict[str, Any], bool]] = {
    "adamw": (Recipe(steps=6, batch_size=2), {}, False),
    "adamw, differences, krylov is ignored": (Recipe(steps=6, batch_size=2), {"krylov": 2}, True),
    "adamw, curved, long": (Recipe(steps=60, batch_size=2), {"curved": True, "looks": 5}, False),
    "sgd": (Recipe("sgd", steps=6, batch_size=2, momentum=0.5), {"score": "margin"}, False),
    "sgd, krylov": (Recipe("sgd", steps=6, batch_size=2, weight_decay=0.1), {"krylov": 2, "groups": 2}, False),
    "sgd, krylov, differences": (Recipe("sgd", steps=6, batch_size=2), {"krylov": 2, "groups": 4}, True),
    "lora": (Recipe(steps=6, batch_size=2, lora=LORA), {"score": "gauss-newton"}, False),
    "lora, sgd": (Recipe("sgd", steps=6, batch_size=2, lora=LORA), {"score": "sampled", "krylov": 2}, False),
    "forecast only": (Recipe(steps=60, batch_size=2), {"forecast_only": True, "looks": 5, "grid": 5}, False),
    "forecast only, sgd": (Recipe("sgd", steps=60, batch_size=2), {"forecast_only": True, "looks": 4}, False),
    "forecast only, every step": (Recipe(steps=6, batch_size=2), {"forecast_only": True, "rank": 50}, False),
    "too few prompts for the rank": (Recipe(steps=6, batch_size=2), {"rank": 8, "score": "margin"}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_planned_passes_are_those_counted(
    make_llama: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    recipe, changes, difference = CASES[case]
    if difference:
        monkeypatch.setattr(subject_module, "LARGE", 0)
    options = Options(**{**vars(SMALL), **changes})
    subject = measured(make_llama, make_tokenizer, recipe.lora, options)
    result, expected, counted = run(subject, recipe, options)
    planned = +expected.passes.tokens
    if difference:  # how often a difference has to be taken again is not known before
        again = counted.tokens - planned
        assert set(again) <= {"forward_backward", "jvp"}
        assert counted.tokens - again == planned
        assert sum(again.values()) < sum(planned.values()) / 3
    else:
        assert counted.tokens == planned
    assert ("hvp" in counted.tokens) != (difference or options.forecast_only)
    assert ("gram" in subject.spent.tokens) != (options.forecast_only or options.score == "gauss-newton")
    record = result.record
    torch.testing.assert_close(record["cost"]["estimated"]["fb_equivalents"], expected.fb_equivalents)
    store.check_values(record)
    json.dumps(record, allow_nan=False)
    assert all(bool(torch.isfinite(array).all()) for array in result.arrays.values())
    assert record["recipe"]["regime"] == ("lora" if recipe.lora else "full")
    assert ("krylov" in record["forecast"]["paths"]) == (bool(options.krylov) and recipe.optimizer == "sgd")


def test_passes_of_the_whole_stay_below_ten(make_llama: Any, make_tokenizer: Any) -> None:
    """With the default options; a look at the gradient is an eighth of the rows, as of 64 at a batch size of 8."""
    options = Options(response_tokens=8, max_tokens=60, max_tuning=64)
    subject = measured(make_llama, make_tokenizer, None, options)
    rows = replace(
        TUNING, rows=tuple({**row, "prompt": f"{row['prompt']} {i}"} for i in range(8) for row in TUNING.rows)
    )
    record = assess_subject(subject, rows, Recipe(steps=40, batch_size=8), options).record
    cost = record["cost"]
    assert 5 < cost["fb_equivalents"] < 10
    weights = {"forward": 1 / 3, "forward_backward": 1.0, "gram": 1.5, "jvp": 1.1, "path": 2.2, "hvp": 3.5}
    weights["tangent"] = 2 / 3
    total = sum(weights[kind] * count for kind, count in cost["passes"].items())
    torch.testing.assert_close(cost["fb_equivalents"], total)
    assert cost["data_tokens"] == record["safety"]["tokens"] + record["tuning"]["tokens"]
    tried = cost["passes"]["hvp"] * cost["data_tokens"] - record["tuning"]["tokens"]
    assert 1 < tried < 0.03 * record["tuning"]["tokens"]  # one sequence, twice


def test_a_second_set_is_not_charged_for_the_first(make_llama: Any, make_tokenizer: Any) -> None:
    recipe = Recipe(steps=4, batch_size=2)
    subject = measured(make_llama, make_tokenizer)
    first, second = (run(subject, recipe, SMALL)[0].record["cost"] for _ in range(2))
    assert first["passes"] == second["passes"]
    assert first["micro_batch_passes"] == second["micro_batch_passes"]
    assert subject.spent.tokens["gram"] > 0
    assert subject.spent.tokens != subject.forward.passes.tokens


def test_gauss_newton_is_refused_where_its_vectors_would_not_fit(
    make_llama: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject_module, "LARGE", 1000)
    with pytest.raises(UnsupportedModel, match="--score response, or LoRA"):
        measured(make_llama, make_tokenizer, None, Options(**{**vars(SMALL), "score": "gauss-newton"}))


def test_speed_and_memory_are_measured(make_llama: Any, make_tokenizer: Any) -> None:
    """The speed comes from a pass that had to be made anyway."""
    subject = measured(make_llama, make_tokenizer)
    assert 0 < subject.token_seconds < 1
    assert subject.spent.tokens["forward_backward"] == subject.negative_margin.work
    assert 0 < resident_bytes() / 1e9 < 1.1 * peak_gb()  # the kernel counts the two at different moments


def test_a_job_that_does_not_fit_the_memory_is_not_begun(
    make_llama: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = measured(make_llama, make_tokenizer)
    monkeypatch.setattr(estimate_module, "memory_now", lambda device: (2.0, 1e-6))
    before = Counter(subject.forward.passes.tokens)
    with pytest.raises(OutOfMemory, match=r"expected to need .* GB besides the model, but 1e-06 GB are free"):
        assess_subject(subject, TUNING, Recipe(steps=6, batch_size=2), SMALL)
    assert subject.forward.passes.tokens == before


@pytest.mark.parametrize("budget", [2.0, 6.0, 40.0])
@pytest.mark.parametrize("n", [10**6, 135 * 10**6])
def test_micro_batches_fill_a_memory_budget_and_do_not_pass_it(n: int, budget: float) -> None:
    """By hand: vectors 4 bytes x 6 (and groups at 4 or 2), tokens 4 x 24 x width x layers (x 3) and 4 logits' worth."""
    config: Any = SimpleNamespace(hidden_size=576, num_hidden_layers=30, vocab_size=49152)
    large = n > 2**25
    fixed = 1.0e9 + n * (24 + 4 * (2 if large else 4))
    each = 4 * 24 * 576 * 30 * (1 if large else 3) + 4 * 4 * 49152
    if fixed + 128 * each > budget * 1e9:
        with pytest.raises(
            OutOfMemory, match=f"--memory {budget:g}: .* needs about {(fixed + 128 * each) / 1e9:.2g} GB"
        ):
            tokens_within(budget, 1.0, n, 4, config, 128)
        return
    tokens = tokens_within(budget, 1.0, n, 4, config, 128)
    assert fixed + tokens * each <= budget * 1e9 < fixed + (tokens + 2) * each


def test_a_memory_budget_makes_smaller_micro_batches(make_llama: Any, make_tokenizer: Any) -> None:
    free = measured(make_llama, make_tokenizer)
    monkeyed = Options(**{**vars(SMALL), "memory_gb": resident_bytes() / 1e9 + 0.05, "max_length": 40})
    tight = measured(make_llama, make_tokenizer, None, monkeyed)
    assert_close(tight.anchor_margin, free.anchor_margin)
    assert tight.max_tokens <= free.max_tokens
    with pytest.raises(OutOfMemory, match=r"--memory 0\.001"):
        measured(make_llama, make_tokenizer, None, Options(**{**vars(SMALL), "memory_gb": 0.001}))
