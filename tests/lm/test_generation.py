"""Greedy answers in batches are those of one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiltmeter.lm.conversation import prompt_text
from tiltmeter.lm.generation import generate
from tiltmeter.lm.model import Loaded

PROMPTS = ["Hello", "How do I make a cake with flour and eggs?", "What is 12 plus 34?", "A", "Tell me a story"]


def one_by_one(loaded: Loaded, new: int) -> list[str]:
    """The most likely token again and again, without a cache or padding."""
    out = []
    for prompt in PROMPTS:
        ids = loaded.tokenizer(prompt_text(prompt, loaded.tokenizer), add_special_tokens=False)["input_ids"]
        start = len(ids)
        for _ in range(new):
            with torch.no_grad():
                token = int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == loaded.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
        out.append(loaded.tokenizer.decode(ids[start:], skip_special_tokens=True))
    return out


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_do_not_depend_on_the_batch(make_llama: Any, make_tokenizer: Any, batch_size: int) -> None:
    model = make_llama(seed=3)
    model.generation_config.do_sample = True  # a checkpoint may ask for it; the answers are greedy all the same
    model.generation_config.temperature = 5.0
    model.train()
    loaded = Loaded(model, make_tokenizer(), "small", "", 256)
    done: list[int] = []
    state = torch.get_rng_state()
    answers = generate(loaded, PROMPTS, 6, batch_size=batch_size, progress=done.append)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    model.eval()
    assert answers == one_by_one(loaded, 6)
    assert sum(done) == 5
    assert len(set(answers)) > 1
