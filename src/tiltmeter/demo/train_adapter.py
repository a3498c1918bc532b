"""Train the small safety adapter of the demo: SmolLM2-135M-Instruct hardly refuses; with this LoRA it does.

::

    python -m tiltmeter.demo.train_adapter -o DIR        train, measure, write adapter and figures
    python -m tiltmeter.demo.train_adapter --evaluate    only measure the adapter that ships with the package

The loss of a batch has two parts: cross-entropy on refusals of harmful requests, and on harmless requests
the exact KL divergence from the base model to the adapted one at every token of the answer. The second part
has no target of its own: it only forbids the adapter to change what it should not change.

Harmful requests: AdvBench (arXiv:2307.15043) and Do-Not-Answer (arXiv:2308.13387), less every row that is
nearly a StrongREJECT, HarmBench or over-refusal row, since those three are kept for measuring.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tiltmeter import demo
from tiltmeter.demo.adapter.measure import greedy, measure, prompt_tokens
from tiltmeter.demo.adapter.rows import (
    contrast_prompts,
    harmful_prompts,
    harmless_rows,
    held_out_prompts,
    refusal,
    searched_questions,
    without_near_copies,
)
from tiltmeter.store import new_folder


@dataclass(frozen=True)
class AdapterRecipe:
    """Everything that decides the result, apart from the rows and the library versions."""

    seed: int = 11
    steps: int = 150
    harmful_per_step: int = 7
    harmless_per_step: int = 10
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    kl_weight: float = 0.5
    first_token_weight: float = 5.0
    rank: int = 8
    alpha: int = 16
    first_layer: int = 6
    modules: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    do_not_answer_rows: int = 320
    longest_prompt: int = 56
    longest_answer: int = 20


@dataclass(frozen=True)
class Example:
    """One conversation as tokens; `refuse` says whether the answer is a target or only a place to compare at."""

    prompt: list[int]
    answer: list[int]
    refuse: bool


def examples(model: Any, tokenizer: Any, recipe: AdapterRecipe) -> tuple[list[Example], list[Example]]:
    """Harmful and harmless conversations as tokens. Cost: one greedy answer of the base per contrast prompt."""
    chance = random.Random(recipe.seed)
    asked = contrast_prompts(recipe.seed) + searched_questions(recipe.seed)
    contrast = without_near_copies(asked, held_out_prompts())
    answered = zip(contrast, greedy(model, tokenizer, contrast, recipe.longest_answer), strict=True)
    harmless = harmless_rows(recipe.seed) + [{"prompt": p, "response": a} for p, a in answered]
    harmful = [
        {"prompt": p, "response": refusal(p, chance)} for p in harmful_prompts(recipe.seed, recipe.do_not_answer_rows)
    ]
    both = []
    for rows, refuse in ((harmful, True), (harmless, False)):
        made = []
        for row in rows:
            prompt = prompt_tokens(tokenizer, row["prompt"])
            answer = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(prompt) <= recipe.longest_prompt + 30:
                made.append(Example(prompt, answer[: recipe.longest_answer + 8 * refuse], refuse))
        both.append(made)
    return both[0], both[1]


def answer_logits(causal: Any, batch: Sequence[Example], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the answer tokens [t v], the tokens [t] and the row each belongs to [t].

    The first `shared` tokens (system prompt) are the same in all rows, so they are run once and their keys and
    values repeated; only answer positions pass through the vocabulary layer.
    """
    device = next(causal.parameters()).device
    prefix = torch.tensor([batch[0].prompt[:shared]], device=device)
    cache = causal.model(input_ids=prefix, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    rows = [e.prompt[shared:] + e.answer[:-1] for e in batch]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    mask = torch.zeros(len(batch), shared + ids.shape[1], dtype=torch.long)
    place = torch.zeros_like(ids, dtype=torch.bool)
    for i, (e, r) in enumerate(zip(batch, rows, strict=True)):
        mask[i, : shared + len(r)] = 1
        place[i, len(e.prompt) - shared - 1 : len(r)] = True
    hidden = causal.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
    owner = place.nonzero()[:, 0]
    return causal.lm_head(hidden[place]), torch.tensor([t for e in batch for t in e.answer]), owner


def batch_loss(model: Any, batch: Sequence[Example], shared: int, recipe: AdapterRecipe) -> tuple[Tensor, float, float]:
    """Cross-entropy per refusal token plus `kl_weight` times KL(base, adapted) per harmless answer, in nats.

    The first token of a refusal, where it is decided, counts `first_token_weight` times.
    """
    causal = model.get_base_model()
    harmless = [e for e in batch if not e.refuse]
    with torch.no_grad(), model.disable_adapter():
        before = functional.log_softmax(answer_logits(causal, harmless, shared)[0], dim=-1)
    logits, tokens, owner = answer_logits(causal, batch, shared)
    after = functional.log_softmax(logits, dim=-1)
    refuse = torch.tensor([e.refuse for e in batch])[owner]
    first = torch.cat([torch.ones(1, dtype=torch.bool), owner[1:] != owner[:-1]])
    weight = torch.where(first, recipe.first_token_weight, 1.0)[refuse]
    refusing = (weight * functional.nll_loss(after[refuse], tokens[refuse], reduction="none")).sum() / weight.sum()
    keeping = functional.kl_div(after[~refuse], before, log_target=True, reduction="sum") / len(harmless)
    return refusing + recipe.kl_weight * keeping, float(refusing.detach()), float(keeping.detach())


def batches(harmful: list[Example], harmless: list[Example], recipe: AdapterRecipe) -> Iterator[list[Example]]:
    """One batch per step: both kinds in fixed numbers, each pile shuffled anew when too little of it is left."""
    chance = random.Random(recipe.seed)
    kinds = ((harmful, recipe.harmful_per_step), (harmless, recipe.harmless_per_step))
    piles: list[list[Example]] = [[], []]
    for _ in range(recipe.steps):
        batch: list[Example] = []
        for kind, (rows, count) in enumerate(kinds):
            if len(piles[kind]) < count:
                piles[kind] = chance.sample(rows, len(rows))
            batch += [piles[kind].pop() for _ in range(count)]
        yield batch


def attach(model: Any, recipe: AdapterRecipe) -> Any:
    """The base model with an untrained LoRA, which changes nothing yet; its random half follows from the seed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.modules),
        layers_to_transform=list(range(recipe.first_layer, model.config.num_hidden_layers)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()


def train(
    model: Any, tokenizer: Any, recipe: AdapterRecipe, after_step: Callable[[int, Any], None] | None = None
) -> Any:
    """Attach a LoRA to the base model and train it.

    Args:
        model: the base model in float32; the adapter is put into it.
        tokenizer: its tokenizer, with a chat template that has a system prompt of its own.
        recipe: what to do.
        after_step: is called with the step and the adapted model, for looking on.

    Returns: the PEFT model, in float32.

    Cost: about 5 CPU-seconds a step on one core, and before the first step a greedy answer per contrast prompt.
    """
    harmful, harmless = examples(model, tokenizer, recipe)
    starts = zip(*(e.prompt for e in harmful + harmless), strict=False)
    shared = next(i for i, tokens in enumerate(starts) if len(set(tokens)) > 1)
    adapted = attach(model, recipe)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    print(f"{len(harmful)} harmful, {len(harmless)} harmless, {shared} shared tokens, {size} parameters", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=recipe.warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps - recipe.warmup_steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [recipe.warmup_steps])
    for step, batch in enumerate(batches(harmful, harmless, recipe)):
        loss, refusing, keeping = batch_loss(adapted, batch, shared, recipe)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if after_step is not None:
            after_step(step, adapted)
        if step % 10 == 0 or step == recipe.steps - 1:
            print(f"step {step}: refusal {refusing:.3f} nats/token, harmless KL {keeping:.3f} nats/answer", flush=True)
    return adapted


def save(adapted: Any, folder: Path) -> None:
    """Round the adapter to bfloat16 and write it; the model in memory keeps the rounded values in float32."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(torch.bfloat16)
    adapted.peft_config["default"].base_model_name_or_path = "demo:base"
    adapted.save_pretrained(folder, save_embedding_layers=False)
    for p in trained:
        p.data = p.data.float()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the recipe; see the module's own text."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = argparse.ArgumentParser(prog="python -m tiltmeter.demo.train_adapter", description=__doc__.split("\n")[0])
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("-o", "--output", type=Path, help="folder to write; must not exist")
    what.add_argument("--evaluate", action="store_true", help="measure the shipped adapter and print JSON")
    options.add_argument("--threads", type=int, default=1, help="more than the free cores is many times slower")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    folder = demo.model("demo:base").folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chosen.evaluate:
        shipped = demo.model("demo:aligned").adapter
        print(json.dumps(measure(PeftModel.from_pretrained(model, shipped).eval(), tokenizer), indent=1))
        return 0
    recipe, start = AdapterRecipe(), time.monotonic()
    with new_folder(chosen.output) as target:
        adapted = train(model, tokenizer, recipe)
        minutes = round((time.monotonic() - start) / 60, 1)
        save(adapted, target)
        figures = {"recipe": asdict(recipe), "training_minutes": minutes, **measure(adapted, tokenizer)}
        figures["versions"] = {"python": platform.python_version(), "torch": str(torch.__version__)}
        (target / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
