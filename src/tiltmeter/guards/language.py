"""What guards may know of the safety of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltmeter.errors import DataError
from tiltmeter.geometry.objective import Objective
from tiltmeter.geometry.sensitivity import SampleBasis, Sensitivity
from tiltmeter.geometry.space import ParameterSpace, vectors_in_parts
from tiltmeter.guards.safety import top_directions
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.divergence import divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.gram import combine, gram
from tiltmeter.lm.model import trainable, undisturbed
from tiltmeter.lm.objective import likelihood_objective
from tiltmeter.lm.processes import agreed
from tiltmeter.lm.rows import digest_of
from tiltmeter.lm.safety import spread
from tiltmeter.lm.scores import score_loss
from tiltmeter.lm.template import UNSUPERVISED

#: Of this many safety examples one is held out.
HELD_OUT_EVERY = 3


@dataclass(frozen=True)
class Undisturbed:
    """An objective of a model in training, evaluated without dropout and without a trace.

    Where there are several processes all of them ask, and get the main one's numbers: a last digit that differs would
    let what they train drift apart.

    Attributes:
        inner: the objective.
        model: its model.
    """

    inner: Objective
    model: nn.Module

    @property
    def space(self) -> ParameterSpace:
        """That of the inner one."""
        return self.inner.space

    @property
    def m(self) -> int:
        """That of the inner one."""
        return self.inner.m

    @property
    def work(self) -> int:
        """That of the inner one."""
        return self.inner.work

    def _agreed(self, vector: Tensor) -> Tensor:
        """Of a divided vector every process has a part of its own, and what made it was the same in all."""
        return vector if vectors_in_parts() else agreed(vector)

    def _quietly(self) -> AbstractContextManager[None]:
        return undisturbed(self.model)

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Losses [m]."""
        with self._quietly():
            return agreed(self.inner.losses(displacement))

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """G v [m]."""
        with self._quietly():
            return agreed(self.inner.directional(v, displacement))

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """G' w [n]."""
        with self._quietly(), torch.enable_grad():
            return self._agreed(self.inner.gradient(weights, displacement))

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """H v [n]."""
        with self._quietly(), torch.enable_grad():
            return self._agreed(self.inner.hvp(v, weights, displacement))


class LanguageSafety:
    """Safety of a causal language model: its own answers to safety prompts, as tokens.

    One example in three is held out: of these only the KL is measured.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        pad_id: int,
        max_tokens: int = 2048,
        *,
        opening: int = 0,
        scored: int | None = None,
    ) -> None:
        """Measure the anchor: `model` must be the aligned model, before any training.

        Args:
            model: of transformers or peft, with the parameters to be trained marked by `requires_grad`.
            examples: prompts with the aligned model's own answers supervised.
            pad_id: token to pad with.
            max_tokens: per micro-batch.
            opening: first tokens of every answer over which the KL is taken where it is more than over the whole.
            scored: most examples whose scores span the sensitive directions, spread evenly over the guard's own; None
                for all of these.

        Raises:
            DataError: fewer than `HELD_OUT_EVERY` examples.

        Cost: three forward passes over the examples.
        """
        if len(examples) < HELD_OUT_EVERY:
            raise DataError(
                f"a guard needs at least {HELD_OUT_EVERY} safety examples, of which one in {HELD_OUT_EVERY} is held "
                f"out; got {len(examples)}. Add safety prompts."
            )
        held = [example for i, example in enumerate(examples) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        own = [example for i, example in enumerate(examples) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        self.model, self.opening = model, opening
        parts = (("own", own), ("held", held))
        self.prompts = digest_of([{"of": part, "tokens": _prompt_of(each)} for part, some in parts for each in some])
        with undisturbed(model):
            forward = Forward(model, trainable(model, parts=True))
            self.passes = forward.passes
            some = own if scored is None else [own[i] for i in spread(len(own), scored)]
            self._score = likelihood_objective(forward, some, pad_id, max_tokens, per="root")
            divergence, apart = (
                divergence_objective(forward, answers, pad_id, max_tokens, opening=opening) for answers in (own, held)
            )
            self._divergence, self._heldout = Undisturbed(divergence, model), Undisturbed(apart, model)
            self._replay = Undisturbed(likelihood_objective(forward, own, pad_id, max_tokens, per="token"), model)
        self._scores = Undisturbed(self._score, model)
        self._at_anchor = self._scores.losses()

    @property
    def space(self) -> ParameterSpace:
        """The parameters that were trainable when this was built."""
        return self._score.space

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Those that were trainable when this was built."""
        return self._score.forward.parameters

    @property
    def scores(self) -> Objective:
        """Minus log p of each answer, divided by the root of its length."""
        return self._scores

    @property
    def divergence(self) -> Objective:
        """Safety KL of each answer, nats per token, over the whole or over its opening."""
        return self._divergence

    @property
    def replay(self) -> Objective:
        """Loss of the answers, mean per token."""
        return self._replay

    def heldout(self) -> float:
        """Mean over the held-out answers of their safety KL, nats per token, each over the whole or its opening."""
        return float(self._heldout.losses().mean())

    def shift(self) -> Tensor:
        """Change of the scores' losses since the anchor [m]."""
        return self._scores.losses() - self._at_anchor

    def sensitivity(self, rank: int) -> Sensitivity:
        """Top directions of the empirical Fisher matrix of the answers. Cost: one layer-wise Gram matrix."""
        score, mix = self._score, self._mix()
        products = gram(self.model, [batch for _, batch in score.chunks], score_loss, score.forward.parameters)
        score.forward.passes.add("gram", score.work, len(score.chunks))
        total = agreed(products.total)
        found = top_directions(score, rank, mix @ total.cpu() @ mix.T)
        if not isinstance(found.basis, SampleBasis):
            return found
        basis = SampleBasis(self._scores, found.basis.coefficients)
        return Sensitivity(found.eigenvalues, found.spectrum, found.trace, basis)

    def columns(self, coefficients: Tensor) -> Tensor:
        """All directions in one sweep, at about the cost of the Gram matrix, where k gradients would be k passes."""
        score = self._score
        weights = coefficients.double().cpu().T @ self._mix()
        found = combine(self.model, [batch for _, batch in score.chunks], score_loss, score.forward.parameters, weights)
        score.forward.passes.add("gram", score.work, len(score.chunks))
        columns = torch.cat([found[name].flatten(1) for name in self.space.names], 1)
        return columns if vectors_in_parts() else agreed(columns)

    def _mix(self) -> Tensor:
        """Examples as combinations of the sequences in the order of the micro-batches, [m, s]."""
        score = self._score
        sequences = torch.cat([members for members, _ in score.chunks])
        mix = torch.zeros(score.m, len(sequences), dtype=torch.float64)
        mix[score.owner[sequences], torch.arange(len(sequences))] = score.factor[sequences]
        return mix

    def fingerprint(self) -> float:
        """Sum of the scores' losses at the anchor, nats."""
        return float(self._at_anchor.sum())


def _prompt_of(example: Example) -> list[int]:
    return [token for token, label in zip(example.tokens, example.labels, strict=True) if label == UNSUPERVISED]
