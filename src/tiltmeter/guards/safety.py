"""What guards may know of safety: a few products, from a language model or a system solved by hand alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.geometry.objective import FunctionObjective, Objective, SoftmaxFunction
from tiltmeter.geometry.sensitivity import ROUNDING, Sensitivity, gram_matrix, measure_sensitivity, spectrum_of
from tiltmeter.geometry.space import ParameterSpace


class SafetySource(Protocol):
    """Safety as a guard sees it. All products are taken at the weights as they stand when they are asked for.

    The examples of `scores`, `divergence` and `replay` are the guard's own; `heldout` is measured on others. A source
    that watches a module's parameters has them by name as `parameters`, so that a copy of the model is told from it;
    one that is made of prompts may have a digest of them as `prompts`.
    """

    @property
    def space(self) -> ParameterSpace:
        """The trainable parameters."""
        ...

    @property
    def scores(self) -> Objective:
        """Minus log-probabilities [m] whose gradients span the sensitive directions."""
        ...

    @property
    def opening(self) -> int:
        """First tokens of an answer over which its KL is taken where it is more than over the whole; 0 for none."""
        ...

    @property
    def divergence(self) -> Objective:
        """KL(anchor || model) of every example, nats (per token)."""
        ...

    @property
    def replay(self) -> Objective:
        """Loss of the aligned model's own answers, what a fine-tune on safety examples would minimise."""
        ...

    def heldout(self) -> float:
        """Mean KL(anchor || model) on examples that no gradient is ever taken of. Cost: a forward pass."""
        ...

    def shift(self) -> Tensor:
        """Losses of `scores` now less those at the anchor [m]: G times the drift, without its expansion."""
        ...

    def sensitivity(self, rank: int) -> Sensitivity:
        """The most sensitive directions at the weights as they stand, at most `rank`.

        Raises:
            DegenerateError: the examples determine none.
        """
        ...

    def columns(self, coefficients: Tensor) -> Tensor:
        """Directions V' = C'G [k, n] of the scores here, for coefficients C [m, k]."""
        ...

    def fingerprint(self) -> float:
        """A number that tells two anchors apart: a guard resumed against another anchor would protect that."""
        ...


def top_directions(scores: Objective, rank: int, gram: Tensor) -> Sensitivity:
    """At most `rank` directions, as many as the Gram matrix [m, m] of the scores determines."""
    values = spectrum_of(gram)[0]
    determined = int((values > ROUNDING * values[0]).sum()) if bool(values[0] > 0) else 0
    return measure_sensitivity(scores, max(1, min(rank, determined)), gram)


@dataclass(frozen=True)
class SystemSafety:
    """Safety of a system: answer distributions as a function of one parameter vector, dense.

    Attributes:
        logits: theta [n] -> [m, y], the guard's own examples.
        heldout_logits: theta [n] -> [m', y'], the held-out ones.
        anchor: the aligned model [n].
        live: the weights as they stand [n], the very tensor that is trained.
        names: the parameter space, if the vector is called otherwise than theta.
    """

    logits: Callable[[Tensor], Tensor]
    heldout_logits: Callable[[Tensor], Tensor]
    anchor: Tensor
    live: Tensor
    names: ParameterSpace | None = None

    @property
    def space(self) -> ParameterSpace:
        """One tensor."""
        return self.names or ParameterSpace(("theta",), (tuple(self.anchor.shape),))

    def _of(self, function: Callable[[Tensor], Tensor]) -> FunctionObjective:
        return FunctionObjective(function, self.live.detach(), self.names)

    @property
    def scores(self) -> FunctionObjective:
        """Minus the log-probability of every outcome, weighted so that G'G / (m y) is the mean Fisher matrix."""
        with torch.no_grad():
            p = torch.softmax(self.logits(self.live.detach()), -1)
        weight = (p * p.shape[-1]).sqrt()
        return self._of(lambda theta: -(weight * torch.log_softmax(self.logits(theta), -1)).reshape(-1))

    @property
    def opening(self) -> int:
        """None: an answer is one outcome."""
        return 0

    @property
    def divergence(self) -> FunctionObjective:
        """KL of every example."""
        return self._of(lambda theta: _kl(self.logits, self.anchor, theta))

    @property
    def replay(self) -> FunctionObjective:
        """Cross-entropy to the anchor's distributions: the mean loss of its own answers."""
        with torch.no_grad():
            p = torch.softmax(self.logits(self.anchor), -1)
        return self._of(lambda theta: -(p * torch.log_softmax(self.logits(theta), -1)).sum(-1))

    def heldout(self) -> float:
        """Mean KL of the held-out examples."""
        with torch.no_grad():
            return float(_kl(self.heldout_logits, self.anchor, self.live.detach()).mean())

    def shift(self) -> Tensor:
        """Change of the weighted log-probabilities since the anchor, negative."""
        scores = self.scores
        return scores.losses() - scores.losses(self.anchor - self.live.detach())

    def sensitivity(self, rank: int) -> Sensitivity:
        """Top directions of the Fisher matrix at the weights as they stand."""
        scores = self.scores
        return top_directions(scores, rank, gram_matrix(scores))

    def columns(self, coefficients: Tensor) -> Tensor:
        """One gradient for every direction."""
        scores = self.scores
        return torch.stack([scores.gradient(column) for column in coefficients.T])

    def fingerprint(self) -> float:
        """Sum of the anchor's log-probabilities."""
        with torch.no_grad():
            return float(SoftmaxFunction(self.logits, self.anchor).log_probability(self.anchor).double().sum())


def draw(m: int, count: int, seed: int) -> Tensor:
    """Weights [m] of a mean over `count` examples drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(m, dtype=torch.float64)
    weights[torch.randperm(m, generator=generator)[:count]] = 1 / min(m, count)
    return weights


def _kl(logits: Callable[[Tensor], Tensor], anchor: Tensor, theta: Tensor) -> Tensor:
    """KL(anchor || theta) [m], summed without cancellation as in `lm.forward.divergence`."""
    with torch.no_grad():
        reference = torch.log_softmax(logits(anchor), -1)
    difference = torch.log_softmax(logits(theta), -1) - reference
    return (reference.exp() * (torch.expm1(difference) - difference)).sum(-1)
