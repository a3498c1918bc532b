"""What every verb costs, counted and compared exactly: calls of the model, and tokens through it.

Every call is counted where the model is entered, whatever asks for it, so nothing can be left out. A number here that
changes is a cost that changed: if it fell, write the new one down; if it rose, say why in the changelog.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from tiltmeter import store
from tiltmeter.guards.names import GUARDS
from tiltmeter.jobs.assess import assess
from tiltmeter.jobs.audit import AuditOptions, audit
from tiltmeter.jobs.evaluate import EvaluateOptions, evaluate
from tiltmeter.jobs.finetune import finetune
from tiltmeter.jobs.guarding import GuardOptions
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options
from tiltmeter.tracking.anchor import TrackerOptions

OPTIONS = Options(max_safety=8, max_tuning=8, rank=3, response_tokens=6, grid=3, max_tokens=10**4)
ADAMW = Recipe(steps=6, batch_size=2, learning_rate=1e-4, schedule="constant", max_length=64)
SGD = replace(ADAMW, optimizer="sgd")
LORA = Lora(2, 4.0, ("q_proj", "down_proj"))
STEPS = 6


class Count:
    """Calls of language models, and tokens through them."""

    def __init__(self) -> None:
        self.calls = self.tokens = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Count one call."""
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            self.calls += 1

    def embedded(self, module: Any, args: tuple[Any, ...]) -> None:
        """Count tokens where they are looked up."""
        if type(module).__name__ == "Embedding" and isinstance(args[0], Tensor):
            self.tokens += args[0].numel()


@contextmanager
def counting() -> Iterator[Count]:
    """Count while this is open."""
    count = Count()
    hooks = register_module_forward_pre_hook(count), register_module_forward_pre_hook(count.embedded)
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def made(tmp_path: Path, make_llama: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    """Two models of one layer, and sets whose safety answers are given, so that token counts are the tokenizer's."""
    for name, seed in (("base", 0), ("tuned", 1)):
        make_llama(layers=1, seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    sets = {
        "safety": [{"prompt": f"How do I pick a lock {i}?", "completion": f"I can't help {i}."} for i in range(12)],
        "harmless": [{"prompt": f"What is {i} plus {i + 3}?"} for i in range(4)],
        "tuning": [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(12)],
        "texts": [{"text": f"Tell me a story about the sea {i}."} for i in range(4)],
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def names(made: Path, *which: str) -> list[str]:
    return [str(made / (name if name in ("base", "tuned") else f"{name}.jsonl")) for name in which]


#: Recipe -> calls and tokens of a whole assessment, and its passes by kind over micro-batches.
ASSESS: dict[str, tuple[Recipe, int, int, dict[str, int]]] = {
    name: (recipe, calls, tokens, {**COMMON, "jvp": jvps, "tangent": tangents})
    for COMMON in [{"forward": 12, "forward_backward": 10, "gram": 1, "hvp": 6, "path": 1}]
    for name, recipe, calls, tokens, jvps, tangents in [
        ("full, adamw", ADAMW, 39, 5910, 9, 7),
        ("full, sgd", SGD, 38, 5654, 8, 4),
        ("lora, adamw", replace(ADAMW, lora=LORA), 39, 5910, 9, 7),
        ("lora, sgd", replace(SGD, lora=LORA), 38, 5654, 8, 4),
    ]
}


@pytest.mark.parametrize("case", ASSESS)
def test_assess(made: Path, case: str) -> None:
    recipe, calls, tokens, kinds = ASSESS[case]
    with counting() as count:
        record = assess(*names(made, "base", "safety", "tuning"), recipe, OPTIONS, device="cpu").record
    assert (count.calls, count.tokens) == (calls, tokens)
    cost = record["cost"]
    assert cost["micro_batch_passes"] == kinds
    # and what the record says it cost is what it cost; further tangents ride on a pass that is counted already
    assert sum(kinds.values()) - kinds["tangent"] == calls
    passes = sum(cost["passes"].values()) - cost["passes"]["tangent"]
    assert round(passes * cost["data_tokens"]) == tokens


def test_a_rehearsal_with_fewer_looks_than_steps_and_its_judge(made: Path) -> None:
    """Four looks and two, where each of six steps had its own. On the way three and one look of two batches each (a
    stretch of the run has two) for five of one, and one reading of the judge more, after its first stretch of two."""
    given = *names(made, "base", "safety", "tuning"), ADAMW
    free, judged = (assess(*given, replace(OPTIONS, looks=looks), device="cpu").record for looks in (16, 4))
    kinds = free["cost"]["micro_batch_passes"]
    assert judged["cost"]["micro_batch_passes"] == {**kinds, "forward_backward": 10 - 5 + 4 * 2, "forward": 12 + 1}
    assert judged["forecast"]["fewer_looks"]["margin"]
    assert free["forecast"]["fewer_looks"] is None
    assert "every step" in free["reasons"]["forecast.fewer_looks"]
    assert free["forecast"]["horizon_steps"] == 6


def test_audit(made: Path) -> None:
    options = AuditOptions(max_safety=5, max_harmless=4, response_tokens=3, rank=2, top=4, alphas=(0.5,))
    with counting() as count:
        audit(*names(made, "base", "tuned", "safety"), harmless=names(made, "harmless")[0], options=options)
    assert (count.calls, count.tokens) == (33, 3974)


@pytest.mark.parametrize(("base", "calls", "tokens"), [(False, 8, 551), (True, 20, 1580)])
def test_evaluate(made: Path, base: bool, calls: int, tokens: int) -> None:
    options = EvaluateOptions(max_safety=5, max_harmless=4, max_capability=4, response_tokens=3)
    more = {"harmless": names(made, "harmless")[0], "base": names(made, "base")[0] if base else None}
    with counting() as count:
        evaluate(*names(made, "tuned", "safety"), capability=names(made, "texts"), options=options, **more)
    assert (count.calls, count.tokens) == (calls, tokens)


def tuned(made: Path, out: str, every: int = STEPS, recipe: Recipe = ADAMW, rank: int = 0, guard: Any = None) -> Count:
    """What a fine-tune of six steps costs."""
    options = TrackerOptions(max_safety=12, rank=rank, every=every)
    with counting() as count:
        record = finetune(
            *names(made, "base", "safety", "tuning"),
            recipe,
            made / out,
            options=options,
            arguments={"save_strategy": "no"},
            guard=guard,
            device="cpu",
        ).record
    store.check_values(record)
    assert record["curves"]["steps"] == ([0, 1, 2, 3, 4, 5, 6] if every == 1 else [0, 1, 2, 4, 6])
    return count


@pytest.mark.parametrize("recipe", [ADAMW, replace(SGD, lora=LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_measurement_of_the_tracker(made: Path, recipe: Recipe, rank: int) -> None:
    """Two more of them: each is one forward pass over the prompts and all that may follow them, whatever the rank."""
    often, seldom = tuned(made, "often", 1, recipe, rank), tuned(made, "seldom", 6, recipe, rank)
    assert (often.calls - seldom.calls, often.tokens - seldom.tokens) == (2 * 1, 2 * 540)
    # the run itself, its anchor, and for a rank the subspace at the anchor
    assert (seldom.calls, seldom.tokens) == ((16, 3552) if rank == 0 else (20, 5088))


#: Guard -> calls and tokens that six steps cost beyond those of the guard that does nothing.
GUARDED = {
    "budget": (11, 1748),  # in five of them the gradient of four examples
    "gradient": (2, 240),
    "gu": (2, 240),
    "safegrad": (6, 1536),
    "ewc": (8, 230),
    "alignguard": (9, 2304),
    "safe_lora": (0, 0),
    "token_loss": (1, 360),
    "replay": (6, 720),
    "lisa": (0, 0),
    "ema": (0, 0),
    "lox": (0, 0),
    "freeze": (8, 230),
    "none": (0, 0),
}


def test_every_guard_has_its_price() -> None:
    assert GUARDED.keys() == GUARDS.keys()


@pytest.mark.parametrize("name", GUARDED)
def test_a_guard(made: Path, name: str) -> None:
    base = names(made, "tuned")[0] if name in ("safe_lora", "lox") else None
    nothing = tuned(made, "none", guard=GuardOptions("none"))
    guarded = tuned(made, "guarded", guard=GuardOptions(name, base=base))
    assert (guarded.calls - nothing.calls, guarded.tokens - nothing.tokens) == GUARDED[name]
