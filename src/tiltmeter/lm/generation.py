"""Greedy generation in batches, with left padding and a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from tiltmeter.lm.conversation import prompt_tokens
from tiltmeter.lm.model import Loaded, undisturbed


def generate(
    loaded: Loaded,
    prompts: Sequence[Any],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's most likely answer to each prompt.

    Args:
        loaded: model and tokenizer.
        prompts: strings or conversations, rendered with the model's chat template.
        max_new_tokens: longest answer.
        batch_size: prompts of similar length generated together.
        progress: called with the number of answers finished in each batch.

    Returns: the answers, without special tokens, in the order of the prompts.

    Cost: one forward pass over every prompt and one token at a time over the answers.
    """
    tokenizer = loaded.tokenizer
    ids = [prompt_tokens(p, tokenizer) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    # A fresh configuration: the checkpoint's own may ask for sampling.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=loaded.model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    with undisturbed(loaded.model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            width = max(len(ids[i]) for i in members)
            tokens = torch.full((len(members), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(members):
                tokens[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, width - len(ids[i]) :] = 1
            device = loaded.model.device
            out = loaded.model.generate(
                input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            for row, i in enumerate(members):
                answers[i] = tokenizer.decode(out[row, width:], skip_special_tokens=True)
            if progress is not None:
                progress(len(members))
    return answers
