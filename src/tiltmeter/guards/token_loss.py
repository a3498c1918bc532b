"""Constrained token loss: the first tokens of an answer may not move far from the aligned model's.

Source: Qi et al. 2024 (Safety Alignment Should Be More Than a Few Tokens Deep, arXiv:2406.05946): the loss of a token
is -2 / beta log sigmoid(beta log(p / p_aligned)), so its gradient is that of -log p times 2 sigmoid(-beta log(p /
p_aligned)): one at the start, and less the further the token has moved; beta is largest on tokens 2 to 5.

It changes the loss, so it is the one guard that the training loop has to call: `compute_loss_func=guard.trainer_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltmeter.errors import DataError, InputError
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee
from tiltmeter.lm.conversation import Example, batches
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.template import UNSUPERVISED

#: beta of the first token, of tokens 2 to 5, and of the later ones, as in the paper.
FIRST, EARLY, LATER = 0.5, 2.0, 0.1

#: Labels of a row without trailing padding -> the aligned model's log-probability of every supervised token.
References = Mapping[tuple[int, ...], Tensor]


def token_references(model: Any, examples: Sequence[Example], pad_id: int, max_tokens: int = 2048) -> References:
    """Log-probabilities of the tuning answers under the aligned model; `model` must not be trained yet.

    Raises:
        DataError: two examples have the same labels after different prompts, and could not be told apart.

    Cost: one forward pass over the tuning set.
    """
    out: dict[tuple[int, ...], Tensor] = {}
    prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
    device = model.get_input_embeddings().weight.device
    with undisturbed(model), torch.no_grad():
        for members, batch in batches(examples, pad_id, max_tokens):
            logits = model(input_ids=batch.tokens.to(device), use_cache=False).logits
            picked = _picked(logits, batch.labels.to(device))
            for row, index in enumerate(members):
                key = _key(batch.labels[row])
                if prompts.setdefault(key, examples[index].tokens) != examples[index].tokens:
                    raise DataError(
                        f"rows {index} and another have the same answer after different prompts of one length, and the "
                        "constrained token loss cannot tell them apart; remove one"
                    )
                out[key] = picked[row][batch.labels[row, 1:].to(device) != UNSUPERVISED].cpu()
    return MappingProxyType(out)


@dataclass(frozen=True)
class ConstrainedTokens:
    """Settings of the loss.

    Attributes:
        references: of the tuning examples, by `token_references`; not needed where `loss` is called directly.
        strength: multiplies every beta; towards 0 the loss becomes cross-entropy, less a constant; at 0 it is that.
    """

    references: References = field(default_factory=lambda: MappingProxyType({}), repr=False)
    strength: float = 1.0
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 0

    def loss(self, log_probability: Tensor, reference: Tensor) -> Tensor:
        """Sum over one answer's tokens.

        Args:
            log_probability: of each token under the model [T].
            reference: under the aligned model [T].
        """
        self.memory.numbers["calls"] = self.memory.numbers.get("calls", 0) + 1
        if self.strength == 0:
            return -log_probability.sum()
        beta = torch.full_like(log_probability, LATER)
        beta[:5] = EARLY
        beta[:1] = FIRST
        beta = beta * self.strength
        return -(2 / beta * logsigmoid(beta * (log_probability - reference.to(log_probability)))).sum()

    def trainer_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss in the form of transformers' `compute_loss_func`: mean over supervised tokens.

        Of evaluation rows, which no gradient is taken of, it is the plain cross-entropy.

        Raises:
            DataError: a row is not one of those whose references are known.
        """
        picked = _picked(outputs.logits, labels)
        supervised = labels[:, 1:] != UNSUPERVISED
        count = supervised.sum() if num_items_in_batch is None else num_items_in_batch
        if not picked.requires_grad:
            return -picked[supervised].sum() / count
        total = picked.new_zeros(())
        for row in range(len(labels)):
            key = _key(labels[row])
            if key not in self.references:
                raise DataError(
                    "a training row has no reference log-probabilities: build the guard with token_references of the "
                    "same rows, tokenised as the trainer tokenises them"
                )
            total = total + self.loss(picked[row][supervised[row]], self.references[key])
        return total / count

    def start(self, model: Trainee) -> None:
        """Check the strength; whether the loss is used shows at the first step."""
        require_strength("token_loss", self.strength, None)
        self.memory.numbers["calls"] = 0

    def shape_gradient(self, model: Trainee) -> None:
        """Check that this loss was trained on.

        Raises:
            InputError: it was not; the optimiser has not moved yet.
        """
        if not self.memory.numbers["calls"]:
            raise InputError(
                "the constrained token loss was not called, so nothing is protected: give the trainer "
                "compute_loss_func=guard.trainer_loss, or call guard.loss in your own loop"
            )
        self.memory.numbers["calls"] = 0

    def shape_update(self, model: Trainee) -> None:
        """Nothing."""

    def finish(self, model: Trainee) -> None:
        """Nothing."""


def _picked(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every label [b, T - 1]."""
    targets = labels[:, 1:].clamp_min(0)
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, targets[..., None])[..., 0]


def _key(labels: Tensor) -> tuple[int, ...]:
    values = labels.tolist()
    while values and values[-1] == UNSUPERVISED:
        values.pop()
    return tuple(values)
