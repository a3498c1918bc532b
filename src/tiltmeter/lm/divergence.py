"""Safety KL with the exact softmax, and the derivatives of a model's log-probabilities along directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.func import jvp, vmap

from tiltmeter.geometry.motion import LARGE
from tiltmeter.geometry.objective import covariance_over_outcomes
from tiltmeter.geometry.space import ParameterSpace, norm
from tiltmeter.lm.conversation import Batch, Example, batches
from tiltmeter.lm.difference import ATTEMPTS, FIRST_SLOPE, next_length
from tiltmeter.lm.forward import Forward, Reading, divergence, negative_log_likelihood, per_sequence
from tiltmeter.lm.memory import out_of_memory, shrinking, within_memory
from tiltmeter.lm.model import second_order
from tiltmeter.lm.objective import LanguageObjective, finite, halved, widest
from tiltmeter.lm.template import UNSUPERVISED

#: Logits at supervised positions, [P, vocabulary], as a function of the named parameters.
Logits = Callable[[dict[str, Tensor]], Tensor]


def tangents_at_once(size: int) -> int:
    """Directions that one JVP carries in a space of `size` parameters: each holds a vector of it."""
    return 1 if size > LARGE else 8


@dataclass(frozen=True)
class DivergenceObjective:
    """Safety KL(anchor || model) of m responses with the exact softmax at every response token; a `SoftmaxObjective`.

    Attributes:
        inner: losses and products of the KL.
        log_probability: the anchor's, [P, vocabulary] per micro-batch; memory 4 P vocabulary bytes.
        opening: first tokens of every response whose mean counts where it is more than that of the whole; 0 for none.
            `fisher_form` and `path_form` are those of whole responses, and at the anchor, where both means are zero,
            `hvp` is that of half their sum.
    """

    inner: LanguageObjective
    log_probability: tuple[Tensor, ...]
    opening: int = 0

    @property
    def space(self) -> ParameterSpace:
        """The trainable parameters."""
        return self.inner.space

    @property
    def m(self) -> int:
        """Number of responses."""
        return self.inner.m

    @property
    def work(self) -> int:
        """Tokens of one pass."""
        return self.inner.work

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.inner.largest

    @property
    def trial(self) -> int:
        """Tokens that the first exact Hessian product takes besides those of every other."""
        return self.inner.trial

    @shrinking
    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """KL [m], nats per token."""
        return self.inner.losses(displacement)

    @shrinking
    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """Slope of the KL along v [m]; zero at the anchor."""
        return self.inner.directional(v, displacement)

    @shrinking
    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """Gradient of the weighted KL [n]; zero at the anchor. Responses without weight cost nothing."""
        if weights is None or weights.shape != (self.m,) or bool((weights != 0).all()):
            return self.inner.gradient(weights, displacement)
        return self._only(weights.cpu() != 0).gradient(weights, displacement)

    def _only(self, held: Tensor) -> LanguageObjective:
        """The KL on the responses of a mask [m] alone; the others are nowhere read."""
        chunks, references = [], []
        for (members, batch), reference in zip(self.inner.chunks, self.log_probability, strict=True):
            rows = held[members].nonzero()[:, 0]
            if rows.numel():
                chunks.append((members[rows], batch.only(rows)[1]))
                references.append(_rows(reference, batch, rows))
        return replace(self.inner, chunks=tuple(chunks), reading=_reading(references, self.opening))

    def only(self, numbers: Sequence[int]) -> DivergenceObjective:
        """The same responses, of which only the micro-batches with these numbers are measured; others give zero."""
        references = tuple(self.log_probability[i] for i in numbers)
        chunks = tuple(self.inner.chunks[i] for i in numbers)
        return replace(
            self,
            inner=replace(self.inner, chunks=chunks, reading=_reading(references, self.opening)),
            log_probability=references,
        )

    def anchor_of(self, members: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The anchor's log-probabilities [P, vocabulary] in micro-batches of these responses."""
        if [list(each) for each in members] == [each.tolist() for each, _ in self.inner.chunks]:
            return self.log_probability
        blocks: dict[int, Tensor] = {}
        for (numbers, batch), reference in zip(self.inner.chunks, self.log_probability, strict=True):
            counts = _supervised(batch).sum(1).tolist()
            blocks |= dict(zip(numbers.tolist(), torch.split(reference, counts), strict=True))
        return tuple(torch.cat([blocks[number] for number in group]) for group in members)

    def halve(self) -> bool:
        """Split the largest micro-batches, for good; what the anchor said of them is split with them.

        Raises:
            OutOfMemory: they hold one response each.
        """
        before = self.inner.chunks
        parts = halved(before, self.inner.forward)
        references = tuple(_rows(self.log_probability[i], before[i][1], rows) for _, i, rows in parts)
        chunks = tuple(part for part, _, _ in parts)
        object.__setattr__(self, "log_probability", references)
        reading = _reading(references, self.opening)
        object.__setattr__(self, "inner", replace(self.inner, chunks=chunks, reading=reading))
        return True

    @shrinking
    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """Hessian of the KL times v [n]; the exact Fisher product F v at the anchor."""
        return self.inner.hvp(v, weights, displacement)

    @shrinking
    def fisher_form(self, directions: Sequence[Tensor]) -> Tensor:
        """v_i' F_e v_j [m, k, k], float64, nats per token.

        Cost: of every `tangents_at_once` directions the first is a JVP and the others are tangents; k JVPs for models
            with an operation that torch cannot batch.
        """
        forward, k = self.inner.forward, len(directions)
        parameters = forward.at()
        at_once = tangents_at_once(forward.whole.size)
        parts = [range(start, min(start + at_once, k)) for start in range(0, k, at_once)]

        def one_by_one(logits: Logits, tokens: int, members: Sequence[int]) -> Tensor:
            forward.passes.add("jvp", tokens * len(members), len(members))
            return torch.stack([jvp(logits, (parameters,), (forward.along(directions[i]),))[1] for i in members])

        def together(logits: Logits, tokens: int, members: Sequence[int]) -> Tensor:
            split = [forward.along(directions[i]) for i in members]
            tangents = {name: torch.stack([v[name] for v in split]) for name in parameters}
            out: Tensor = vmap(lambda along: jvp(logits, (parameters,), (along,))[1])(tangents)
            forward.passes.add("jvp", tokens)
            forward.passes.add("tangent", tokens * (len(members) - 1), len(members) - 1)
            return out

        def derive(logits: Logits, tokens: int) -> Tensor:
            out = []
            for members in parts:
                if len(members) == 1:
                    out.append(one_by_one(logits, tokens, members))
                    continue
                try:
                    out.append(together(logits, tokens, members))
                except RuntimeError as error:
                    if out_of_memory(error):
                        raise
                    out.append(one_by_one(logits, tokens, members))
            return torch.cat(out)

        return self._forms(derive, k)

    @shrinking
    def path_form(self, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """Covariance of the first two derivatives of log p along the path, [m, 2, 2], float64. Cost: see `Passes`.

        The log-probabilities are differentiated twice in forward mode along theta + t velocity + t^2/2 acceleration.
        """
        if self.inner.hessian == "difference":
            return self._path_by_difference(velocity, acceleration)
        forward = self.inner.forward
        # as one vector: the sums below are then three, and not three for every parameter
        dtype = widest(forward)
        start, first, second = (
            v.to(forward.device, dtype) for v in (forward.space.flatten(forward.at()), velocity, acceleration)
        )

        def derive(logits: Logits, tokens: int) -> Tensor:
            forward.passes.add("path", tokens)

            def along(t: Tensor) -> Tensor:
                moved = start + t * first + t**2 / 2 * second
                return torch.log_softmax(logits(forward.space.split(moved)), -1)

            def slope(t: Tensor) -> Tensor:
                derivative: Tensor = jvp(along, (t,), (torch.ones_like(t),))[1]
                return derivative

            zero = torch.zeros((), device=forward.device, dtype=dtype)
            return torch.stack(jvp(slope, (zero,), (torch.ones_like(zero),))[:2])

        return self._forms(derive, 2)

    def _path_by_difference(self, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """The same from first derivatives at two points of the path; two parameter copies less in memory."""
        forward = self.inner.forward
        size, anchor = norm(velocity), self.inner.anchor_norm()
        if size == 0:
            return torch.zeros(self.m, 2, 2, dtype=torch.float64)
        known = "slope" in self.inner.learned
        length = self.inner.learned.get("slope", FIRST_SLOPE * anchor)
        chunks = [batch for _, batch in self.inner.chunks]
        smallest = sorted(chunks, key=lambda batch: batch.tokens.numel())[:1]
        cheap = 4 * sum(batch.tokens.numel() for batch in smallest) <= self.inner.work
        pilot = smallest if cheap and not known else []
        for part in (pilot, chunks) if pilot else (chunks,):
            for attempt in range(1, ATTEMPTS + 1):
                step = length / size
                derivatives = self._two_slopes(velocity, acceleration, step, part)
                self.inner.learned["slope"] = length
                better = next_length(length, _change(*derivatives), anchor, widest(forward))
                if better == length or attempt == ATTEMPTS:
                    break
                length = better
                del derivatives
        out = torch.zeros(self.m, 2, 2, dtype=torch.float64)
        for number, (members, batch) in enumerate(self.inner.chunks):
            ahead, behind = derivatives[0][number], derivatives[1][number]
            both = torch.stack([(ahead + behind) / 2, (ahead - behind) / (2 * step)])
            covariance = covariance_over_outcomes(both.double(), self.log_probability[number].double())
            out[members] = per_sequence(covariance.cpu(), _supervised(batch))
        return finite(out, "path form")

    def _two_slopes(
        self, velocity: Tensor, acceleration: Tensor, step: float, chunks: Sequence[Batch]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives of log p along the path at a step ahead and a step behind, per micro-batch."""
        forward, out = self.inner.forward, []
        for t in (step, -step):
            parameters = forward.at(None, velocity, t)
            first, second = forward.along(velocity), forward.along(acceleration)
            for name, p in parameters.items():  # fresh tensors, so adding in place leaves the anchor alone
                p.add_(second[name], alpha=t**2 / 2)
            tangent = {name: torch.add(first[name], second[name], alpha=t) for name in parameters}
            out.append(self._slopes(parameters, tangent, chunks))
            del parameters, tangent
        return out[0], out[1]

    def _slopes(
        self, parameters: dict[str, Tensor], tangent: dict[str, Tensor], chunks: Sequence[Batch]
    ) -> list[Tensor]:
        """Derivative of log p along a tangent, [P, vocabulary] per micro-batch."""
        out = []
        with torch.no_grad(), second_order():
            for batch in chunks:
                self.inner.forward.passes.add("jvp", batch.tokens.numel())

                def read(at: dict[str, Tensor], batch: Batch = batch) -> Tensor:
                    logits = self.inner.forward.logits(at, batch)[0][_supervised(batch)]
                    return torch.log_softmax(logits, -1)

                out.append(jvp(read, (parameters,), (tangent,))[1])
        return out

    def _forms(self, derive: Callable[[Logits, int], Tensor], k: int) -> Tensor:
        """Covariance over the vocabulary at every position, averaged over each response's positions."""
        out = torch.zeros(self.m, k, k, dtype=torch.float64)
        # Gradient mode stays on: without it silu's derivative has no forward derivative of its own. Nothing here
        # requires a gradient, so no graph is kept.
        with torch.enable_grad(), second_order():
            for (members, batch), reference in zip(self.inner.chunks, self.log_probability, strict=True):
                supervised = _supervised(batch)

                def logits(at: dict[str, Tensor], batch: Batch = batch, supervised: Tensor = supervised) -> Tensor:
                    return self.inner.forward.logits(at, batch)[0][supervised]

                derivatives = derive(logits, batch.tokens.numel())
                covariance = covariance_over_outcomes(derivatives.double(), reference.double())
                out[members] = per_sequence(covariance.cpu(), supervised.cpu())
        return finite(out, "Fisher form")


def _change(ahead: Sequence[Tensor], behind: Sequence[Tensor]) -> float:
    """|ahead - behind| / (|ahead| + |behind|); 0 where both are zero."""
    apart = math.fsum(float((x - y).double().square().sum()) for x, y in zip(ahead, behind, strict=True)) ** 0.5
    sizes = [math.fsum(float(x.double().square().sum()) for x in side) ** 0.5 for side in (ahead, behind)]
    return apart / sum(sizes) if sum(sizes) else 0.0


def _supervised(batch: Batch) -> Tensor:
    return batch.targets[0] != UNSUPERVISED


def _rows(reference: Tensor, batch: Batch, rows: Tensor) -> Tensor:
    """What a reference [P, vocabulary] over the supervised positions of a batch holds of some of its responses."""
    position = _supervised(batch).nonzero()[:, 0]
    return reference[torch.isin(position, rows).to(reference.device)]


def _reading(references: Sequence[Tensor], opening: int) -> Reading:
    """KL to the anchor's log-probabilities [P, vocabulary] of each micro-batch."""

    def reading(logits: Tensor, labels: Tensor, number: int) -> Tensor:
        return divergence(references[number], logits, labels, opening)

    return reading


def divergence_objective(
    forward: Forward,
    examples: Sequence[Example],
    pad_id: int,
    max_tokens: int,
    *,
    hessian: Literal["exact", "difference"] = "exact",
    opening: int = 0,
) -> DivergenceObjective:
    """Safety KL on responses of the aligned model itself; measures the anchor's softmax once.

    Args:
        forward: the model, at the anchor.
        examples: m prompts with the anchor's own responses supervised.
        pad_id: token to pad with.
        max_tokens: micro-batch size.
        hessian: how Hessian products are taken.
        opening: first tokens of every response that count by themselves, too; see `DivergenceObjective`.

    Cost: one forward pass now.
    """
    chunks = tuple((torch.tensor(members), batch) for members, batch in batches(examples, pad_id, max_tokens))
    m = len(examples)
    ones = torch.ones(m, dtype=torch.float64)
    answers = LanguageObjective(forward, chunks, torch.arange(m), ones, negative_log_likelihood, m, hessian)
    reference = within_memory(answers, lambda: _anchor(answers))
    return DivergenceObjective(replace(answers, reading=_reading(reference, opening)), tuple(reference), opening)


def _anchor(answers: LanguageObjective) -> list[Tensor]:
    """The anchor's log-probabilities [P, vocabulary] of each micro-batch."""
    forward, reference = answers.forward, []
    with torch.no_grad():
        parameters = forward.at()
        for _, batch in answers.chunks:
            forward.passes.add("forward", batch.tokens.numel())
            logits, labels = forward.logits(parameters, batch)
            reference.append(torch.log_softmax(logits[labels != UNSUPERVISED], -1))
    return reference
