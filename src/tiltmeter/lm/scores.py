"""Which gradients span the safety subspace.

- "response": log p of the aligned model's own answer. Cross-token terms stay; the subspace is that of these answers.
- "sampled": log p of answers drawn token by token from the model: the true Fisher matrix in expectation, but one draw
  per prompt is no estimate of a subspace (two draws share almost nothing), so read its split-half overlap.
- "margin": the refusal margin. Does not vanish where refusals are saturated.
- "gauss-newton": the exact softmax Fisher matrix by Lanczos; for small spaces such as LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tiltmeter.lm.conversation import Example, batches
from tiltmeter.lm.forward import Forward, negative_log_likelihood
from tiltmeter.lm.template import UNSUPERVISED

Score = Literal["response", "sampled", "margin", "gauss-newton"]


def score_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p over supervised tokens [b], from all logits [b, T, vocabulary] and unshifted labels [b, T]."""
    return negative_log_likelihood(logits[:, :-1], labels[:, 1:])


def sampled_labels(
    forward: Forward, examples: Sequence[Example], pad_id: int, max_tokens: int, seed: int
) -> tuple[Example, ...]:
    """The same sequences with every supervised label drawn from the model's own distribution at that position.

    Cost: one forward pass.
    """
    generator = torch.Generator().manual_seed(seed)
    out = list(examples)
    parameters = forward.at()
    with torch.no_grad():
        for members, batch in batches(examples, pad_id, max_tokens):
            forward.passes.add("forward", batch.tokens.numel())
            logits, _ = forward.logits(parameters, batch)
            keep = (batch.labels[:, 1:] != UNSUPERVISED).any(0).nonzero()[:, 0] + 1
            draws = torch.multinomial(logits.softmax(-1).flatten(0, 1).cpu(), 1, generator=generator)
            drawn = draws.view(len(members), len(keep))
            for row, index in enumerate(members):
                labels = list(examples[index].labels)
                for column, position in enumerate(keep.tolist()):
                    if position < len(labels) and labels[position] != UNSUPERVISED:
                        labels[position] = int(drawn[row, column])
                out[index] = Example(examples[index].tokens, tuple(labels), examples[index].row)
    return tuple(out)
