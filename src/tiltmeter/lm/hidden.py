"""Hidden states where a model is about to answer, and how they drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltmeter.geometry.spectrum import effective_rank
from tiltmeter.lm.conversation import Example, batches, prompt_tokens
from tiltmeter.lm.likelihood import MAX_TOKENS
from tiltmeter.lm.model import Loaded
from tiltmeter.lm.template import UNSUPERVISED


@dataclass(frozen=True)
class Drift:
    """How hidden states moved, from the embeddings (0) to the last layer.

    Attributes:
        relative: mean over prompts of |h' - h| / |h|, by layer.
        rank: effective rank of the moves [m, width], by layer; None where nothing moved.
    """

    relative: tuple[float, ...]
    rank: tuple[float | None, ...]


def hidden_states(loaded: Loaded, prompts: Sequence[Any]) -> Tensor:
    """States of the last prompt token after every layer, [layers + 1, m, width], float32. Cost: one forward pass."""
    ids = [tuple(prompt_tokens(prompt, loaded.tokenizer)) for prompt in prompts]
    examples = [Example(tokens, (UNSUPERVISED,) * len(tokens), row) for row, tokens in enumerate(ids)]
    out: list[Tensor] = [torch.empty(0)] * len(ids)
    with torch.no_grad():
        for members, batch in batches(examples, loaded.tokenizer.pad_token_id, MAX_TOKENS):
            # the backbone alone: the output layer is not needed, and under a causal mask nor is one for padding
            states = loaded.model.base_model(
                input_ids=batch.tokens.to(loaded.model.device), output_hidden_states=True, use_cache=False
            ).hidden_states
            for row, index in enumerate(members):
                out[index] = torch.stack([layer[row, len(ids[index]) - 1].float().cpu() for layer in states])
    return torch.stack(out, 1)


def answer_states(loaded: Loaded, examples: Sequence[Example]) -> Tensor:
    """Last-layer states averaged over each example's supervised tokens, [m, width], float32. Cost: one forward pass."""
    out: list[Tensor] = [torch.empty(0)] * len(examples)
    with torch.no_grad():
        for members, batch in batches(examples, loaded.tokenizer.pad_token_id, MAX_TOKENS):
            states = loaded.model.base_model(
                input_ids=batch.tokens.to(loaded.model.device), output_hidden_states=True, use_cache=False
            ).hidden_states[-1]
            for row, index in enumerate(members):
                out[index] = states[row, batch.labels[row] != UNSUPERVISED].float().mean(0).cpu()
    return torch.stack(out)


def drift(before: Tensor, after: Tensor, count: int) -> Drift:
    """Drift over the first `count` prompts: ranks are compared over equally many."""
    moves = (after - before)[:, :count].double()
    sizes = before[:, :count].double().norm(dim=-1).clamp_min(1e-300)
    relative = (moves.norm(dim=-1) / sizes).mean(1).tolist()
    return Drift(tuple(relative), tuple(effective_rank(layer) for layer in moves))
