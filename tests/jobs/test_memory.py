"""A device that is too small for the micro-batches an assessment began with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.testing import assert_close

from tiltmeter.errors import OutOfMemory
from tiltmeter.jobs.assess import Assessment, assess
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options

OPTIONS = Options(max_safety=8, max_tuning=8, rank=3, grid=3, groups=2, max_tokens=10**4)
RECIPE = Recipe(steps=6, batch_size=4, learning_rate=1e-3, schedule="constant", max_length=64)


@pytest.fixture
def names(tmp_path: Path, make_llama: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> list[str]:
    make_llama(layers=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    safety = [{"prompt": f"How do I pick {'a ' * i} lock?", "completion": f"I can't help {i}."} for i in range(8)]
    tuning = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(8)]
    for name, rows in (("safety", safety), ("tuning", tuning)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "model"), str(tmp_path / "safety.jsonl"), str(tmp_path / "tuning.jsonl")]


@pytest.fixture
def device() -> Iterator[Callable[[int], list[int]]]:
    """A device with room for so many tokens at a time; gives the sizes of what did not fit."""
    hooks = []

    def of(room: int) -> list[int]:
        refused: list[int] = []

        def look(module: Any, args: tuple[Any, ...]) -> None:
            if type(module).__name__ == "Embedding" and args[0].numel() > room:
                refused.append(args[0].numel())
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        hooks.append(register_module_forward_pre_hook(look))
        return refused

    yield of
    for hook in hooks:
        hook.remove()


def run(names: list[str], lora: Lora | None) -> Assessment:
    recipe = Recipe(**{**vars(RECIPE), "lora": lora})
    return assess(*names, recipe, OPTIONS, device="cpu")


def numbers(value: Any, at: str = "") -> dict[str, float]:
    """All numbers of a record, by their place."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in numbers(part, f"{at}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in numbers(part, f"{at}[{i}]").items()}
    return {at: float(value)} if isinstance(value, (int, float)) else {}


@pytest.mark.parametrize("lora", [None, Lora(2, 4.0, ("q_proj",))], ids=["full", "lora"])
def test_an_assessment_goes_on_in_smaller_micro_batches(
    names: list[str], device: Callable[[int], list[int]], caplog: pytest.LogCaptureFixture, lora: Lora | None
) -> None:
    free = run(names, lora)
    refused = device(100)
    with caplog.at_level(logging.WARNING, "tiltmeter"):
        tight = run(names, lora)
    assert len(refused) >= 3  # answers, openings and tuning rows each had to learn it
    assert caplog.text.count("become half as large") == len(refused)
    assert_close(tight.arrays, free.arrays, rtol=1e-4, atol=1e-6)
    for part in ("forecast", "spectrum", "aic"):
        before, after = numbers(free.record[part]), numbers(tight.record[part])
        assert before
        assert before.keys() == after.keys()
        for key in before:
            # margins are differences of sums of about a hundred nats, in float32
            atol = 2e-5 if "margin" in key or "refusal" in key else 1e-6
            assert_close(after[key], before[key], rtol=1e-3, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    assert tight.record["verdict"] == free.record["verdict"]


def test_a_device_that_is_too_small_for_one_sequence_ends_the_job_with_what_to_do(
    names: list[str], device: Callable[[int], list[int]]
) -> None:
    device(10)
    with pytest.raises(OutOfMemory, match=r"memory ran out on a single sequence of \d+ tokens.*--lora-r"):
        run(names, None)
