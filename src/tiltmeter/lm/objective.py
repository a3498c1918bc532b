"""The four products of a language model's losses over its supervised tokens, in micro-batches of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp

from tiltmeter.errors import NumericalError, OutOfMemory, PartLost, SpaceMismatch
from tiltmeter.geometry.space import ParameterSpace, dot, norm
from tiltmeter.lm.conversation import Batch, Example, batches
from tiltmeter.lm.difference import ATTEMPTS, FIRST, PILOT, next_length, tells
from tiltmeter.lm.forward import Forward, Reading, negative_log_likelihood
from tiltmeter.lm.gathered import own_part
from tiltmeter.lm.memory import logger, release, shrinking
from tiltmeter.lm.model import second_order
from tiltmeter.lm.packed import packs
from tiltmeter.lm.reversible import agree, beyond, duals, reversible
from tiltmeter.lm.sharding import is_divided

#: Key of `learned`: 1 where Hessian products need backward mode twice, 0 where forward mode and then backward will do.
TWICE = "backward twice"

#: Number of a micro-batch, the micro-batch, and the weights of its sequences.
Share = tuple[int, Batch, Tensor]


@dataclass(frozen=True)
class LanguageObjective:
    """Losses of m examples, each a fixed combination of readings of one or more token sequences.

    Attributes:
        forward: the model.
        chunks: micro-batches: sequence numbers and their batch.
        owner: [s] long, the example that each sequence belongs to.
        factor: [s], what its reading is multiplied by.
        reading: what is read off the logits.
        examples: m.
        hessian: "exact" or "difference" (two gradients, less memory, about 1 % off in float32).
        learned: lengths of difference steps that were good, parameter units, by what was differentiated; and `TWICE`,
            once it was tried whether forward mode through this model can be differentiated.
    """

    forward: Forward
    chunks: tuple[tuple[Tensor, Batch], ...]
    owner: Tensor
    factor: Tensor
    reading: Reading
    examples: int
    hessian: Literal["exact", "difference"] = "exact"
    learned: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def space(self) -> ParameterSpace:
        """The trainable parameters."""
        return self.forward.space

    @property
    def m(self) -> int:
        """Number of examples."""
        return self.examples

    @property
    def work(self) -> int:
        """Tokens of one pass, padding included."""
        return sum(batch.tokens.numel() for _, batch in self.chunks)

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch, padding included; 0 if there is none."""
        return max((batch.tokens.numel() for _, batch in self.chunks), default=0)

    @shrinking
    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Losses [m]. Cost: one forward pass."""
        parameters = self.forward.at(displacement)
        out = torch.zeros(self.m, dtype=torch.float64)
        with torch.no_grad():
            for number, (members, batch) in enumerate(self.chunks):
                self.forward.passes.add("forward", batch.tokens.numel())
                values = self.reading(*self.forward.logits(parameters, batch), number)
                self._scatter(out, members, values)
        return finite(out, "loss")

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """G v [m]. Cost: one JVP."""
        return self.losses_and_slopes(v, displacement)[1]

    @shrinking
    def losses_and_slopes(self, v: Tensor, displacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses [m] and G v [m]. Cost: one JVP, which makes the losses on its way."""
        parameters, tangent = self.forward.at(displacement), self.forward.along(v)
        losses, slopes = (torch.zeros(self.m, dtype=torch.float64) for _ in range(2))
        with torch.no_grad(), second_order():
            for number, (members, batch) in enumerate(self.chunks):
                self.forward.passes.add("jvp", batch.tokens.numel())

                def read(at: dict[str, Tensor], number: int = number, batch: Batch = batch) -> Tensor:
                    return self.reading(*self.forward.logits(at, batch), number)

                both = jvp(read, (parameters,), (tangent,))
                self._scatter(losses, members, both[0])
                self._scatter(slopes, members, both[1])
        return finite(losses, "loss"), finite(slopes, "directional derivative")

    @shrinking
    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """G' w [n]; micro-batches whose weights are all zero are skipped. Cost: one forward+backward of the rest."""
        return self._gradient(self.forward.at(displacement), weights)

    def _gradient(self, parameters: dict[str, Tensor], weights: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Weighted gradient at named parameters, added to `onto` by autograd itself, so that nothing is held twice."""
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        out, total = self._empty(leaves) if onto is None else (onto, self.space.split(onto))
        for name, leaf in leaves.items():
            leaf.grad = total[name]
        for loss in self._weighted(leaves, weights, "forward_backward"):
            loss.backward(inputs=list(leaves.values()))  # type: ignore[no-untyped-call]
        return out

    @shrinking
    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """H v [n]. Cost: one HVP (exact: 3.5 forward+backward, less where forward mode and then backward will do;
        difference: 2, and again while the step is not good, which is first asked of one example in sixteen).
        """
        if self.hessian == "difference":
            return self._difference(v, weights, displacement)
        size = norm(v)
        if size == 0 or not self.chunks:
            return torch.zeros_like(v)
        if TWICE not in self.learned:
            # a direction that every operation feels, as well as the one that is asked for
            probe = self.forward.random(0).to(v)
            probe = probe.mul_(size / norm(probe)).add_(v)
            self._learn(self._reversible(probe, displacement))
        if not self.learned[TWICE]:
            try:
                return self._forward_then_backward(v, self._shares(weights, "hvp"), displacement)
            except RuntimeError as error:
                if not beyond(error):
                    raise
                self._learn(possible=False)
        return self._backward_twice(v, self._shares(weights, "hvp"), displacement)

    def _learn(self, possible: bool) -> None:
        self.learned[TWICE] = 0.0 if possible else 1.0
        if not possible:
            logger.info("forward mode through this model cannot be differentiated: Hessian products go backward twice")

    def _reversible(self, v: Tensor, displacement: Tensor | None) -> bool:
        """Whether forward mode through this model can be differentiated, tried on little.

        Silently wrong derivatives are told from right ones by backward mode twice.

        Cost: two products of what `_tried` gives.
        """
        number, batch = self._tried()
        shares = [(number, batch, torch.ones(len(batch.tokens), dtype=torch.float64))]
        found = []
        for way in (self._forward_then_backward, self._backward_twice):
            self.forward.passes.add("hvp", batch.tokens.numel())
            try:
                found.append(way(v, iter(shares), displacement))
            except RuntimeError as error:
                if not beyond(error):
                    raise
                return False
        return agree(*found)

    def _tried(self) -> tuple[int, Batch]:
        """What a Hessian product is tried on: the first sequence of the smallest micro-batch; all of that where the
        reading knows micro-batches by number.
        """
        number = min(range(len(self.chunks)), key=lambda i: self.chunks[i][1].tokens.numel())
        batch = self.chunks[number][1]
        return number, batch.only(torch.arange(1))[1] if self.reading is negative_log_likelihood else batch

    @property
    def trial(self) -> int:
        """Tokens that the first exact Hessian product takes besides those of every other."""
        return 2 * self._tried()[1].tokens.numel() if self.chunks else 0

    def _forward_then_backward(self, v: Tensor, shares: Iterator[Share], displacement: Tensor | None) -> Tensor:
        """Gradient of the directional derivative along v."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.forward.at(displacement).items()}
        tangent = self.forward.along(v)
        out, total = self._empty(leaves)
        for name, leaf in leaves.items():
            leaf.grad = total[name]
        with reversible(self.forward.model):
            for number, batch, share in shares:
                with forward_ad.dual_level():
                    loss = self._loss(duals(leaves, tangent), number, batch, share)
                    slope = forward_ad.unpack_dual(loss).tangent  # type: ignore[no-untyped-call]
                    del loss
                # outside, or backward mode would carry tangents of its own
                if slope is not None and slope.requires_grad:
                    slope.backward(inputs=list(leaves.values()))
        return out

    def _backward_twice(self, v: Tensor, shares: Iterator[Share], displacement: Tensor | None) -> Tensor:
        """Gradient of <gradient, v>, for models with operations whose tangents cannot be differentiated."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.forward.at(displacement).items()}
        tangent = self.forward.along(v)
        out, total = self._empty(leaves)
        with second_order():
            for number, batch, share in shares:
                loss = self._loss(leaves, number, batch, share)
                slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
                # gradients that depend on no parameter have no graph; v goes in from behind, without a product g'v
                held = [(g, tangent[name]) for name, g in zip(leaves, slopes, strict=True) if g.requires_grad]
                if not held:
                    continue
                outputs, weighted_by = zip(*held, strict=True)
                products = torch.autograd.grad(outputs, list(leaves.values()), weighted_by, allow_unused=True)
                for name, part in zip(leaves, products, strict=True):
                    if part is not None:  # a parameter that no gradient depends on
                        total[name].add_(part)
        return out

    def _difference(self, v: Tensor, weights: Tensor | None, displacement: Tensor | None) -> Tensor:
        size, anchor = norm(v), self.anchor_norm()
        if size == 0:
            return torch.zeros_like(v)
        step = self.learned.get("gradient", FIRST * anchor) / size
        few = None if "gradient" in self.learned else self._pilot(weights)
        if few is not None:
            step = self._differ(v, few, displacement, step, anchor, pilot=True)[2] or step
        out, step, better = self._differ(v, weights, displacement, step, anchor)
        if better is not None:
            self.learned["gradient"] = step * size
        return out.div_(-2 * step)

    def _differ(
        self,
        v: Tensor,
        weights: Tensor | None,
        displacement: Tensor | None,
        step: float,
        anchor: float,
        *,
        pilot: bool = False,
    ) -> tuple[Tensor, float, float | None]:
        """Gradient behind minus gradient ahead at a good step, or the last one tried.

        A pilot ends as soon as it tells the step: all examples are differentiated there, and tell whether it is good.

        Returns: the difference; its step; the step to go on with, None where there was no gradient to tell by.
        """
        size, better = norm(v), None
        for attempt in range(1, ATTEMPTS + 1):
            # here the most vectors are alive: what earlier gradients freed is not kept (0.7 GB each on a 135 M model)
            release()
            out = self._gradient(self.forward.at(displacement, v, step), weights)
            ahead = norm(out)
            out.neg_()
            release()
            self._gradient(self.forward.at(displacement, v, -step), weights, out)
            if ahead == 0:
                break
            change, dtype = norm(out) / (2 * ahead), widest(self.forward)
            better = next_length(step * size, change, anchor, dtype) / size
            if math.isclose(better, step) or attempt == ATTEMPTS or (pilot and tells(change, dtype)):
                break
            step = better
            del out
        return out, step, better

    def _pilot(self, weights: Tensor | None) -> Tensor | None:
        """Weights of the few examples on which a step is sought first; None where that would save little."""
        held = sorted({int(example) for members, _ in self.chunks for example in self.owner[members]})
        if weights is not None and weights.shape == (self.m,):  # what is wrong is told where they are used
            held = [example for example, weight in zip(held, weights[held].tolist(), strict=True) if weight]
        count = math.ceil(len(held) / PILOT)
        if 4 * count > len(held) or not count:
            return None
        chosen = [held[(2 * i + 1) * len(held) // (2 * count)] for i in range(count)]
        few = torch.zeros(self.m, dtype=torch.float64)
        few[chosen] = 1.0 / count if weights is None or len(weights) != self.m else weights.double().cpu()[chosen]
        return few

    def anchor_norm(self) -> float:
        """Norm of the parameters."""
        parts = (own_part(p).reshape(-1) for p in self.forward.parameters.values())
        return math.sqrt(sum(dot(part, part) for part in parts))

    def _empty(self, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A zero vector [n] and its views by name, to add gradients into without a second copy."""
        like = next(iter(leaves.values()))
        out = like.new_zeros(self.space.size)
        return out, self.space.split(out)

    def _weighted(self, leaves: dict[str, Tensor], weights: Tensor | None, kind: str) -> Iterator[Tensor]:
        """Weighted loss of every micro-batch that carries weight."""
        for number, batch, share in self._shares(weights, kind):
            yield self._loss(leaves, number, batch, share)

    def _loss(self, parameters: dict[str, Tensor], number: int, batch: Batch, share: Tensor) -> Tensor:
        values = self.reading(*self.forward.logits(parameters, batch), number)
        return (values * share.to(values)).sum()

    def _shares(self, weights: Tensor | None, kind: str) -> Iterator[Share]:
        """Number, batch and weights of every micro-batch that carries any; counts a pass of it."""
        if weights is None:
            weights = torch.full((self.m,), 1.0 / self.m, dtype=torch.float64)
        if weights.shape != (self.m,):
            raise SpaceMismatch(f"expected {self.m} weights, one per example, got shape {tuple(weights.shape)}")
        sequence = weights.double().cpu()[self.owner] * self.factor
        for number, (members, batch) in enumerate(self.chunks):
            share = sequence[members]
            held = share.nonzero()[:, 0]
            if held.numel() == 0:
                continue
            if held.numel() < share.numel() and self.reading is negative_log_likelihood:
                kept, batch = batch.only(held)
                share = share[kept]
            self.forward.passes.add(kind, batch.tokens.numel())
            yield number, batch, share

    def halve(self) -> bool:
        """Split the largest micro-batches, for good. False where the reading knows them by number: its owner splits.

        Raises:
            OutOfMemory: they hold one sequence each.
            PartLost: the weights are divided among processes.
        """
        if self.reading is not negative_log_likelihood:
            return False
        object.__setattr__(self, "chunks", tuple(part for part, _, _ in halved(self.chunks, self.forward)))
        return True

    def _scatter(self, out: Tensor, members: Tensor, values: Tensor) -> None:
        out.index_add_(0, self.owner[members], values.double().cpu() * self.factor[members])


def widest(forward: Forward) -> torch.dtype:
    """That of the parameters while they are differentiated."""
    wide = any(p.dtype == torch.float64 for p in forward.parameters.values())
    return torch.float64 if wide else torch.float32


def halved(chunks: Sequence[tuple[Tensor, Batch]], forward: Forward) -> list[tuple[tuple[Tensor, Batch], int, Tensor]]:
    """Micro-batches with the largest split in two: sequence numbers and batch, the number it had, the rows of it.

    Raises:
        OutOfMemory: the largest holds one sequence.
        PartLost: the model is divided among processes, of which the others are in the middle of the pass that failed in
            this one and cannot do it again.
    """
    if is_divided(forward.model):
        raise PartLost(
            "memory ran out in one of the processes that the weights are divided among, while the others were in the "
            "same pass, so it cannot be done again in smaller pieces. Give --memory, so that micro-batches are small "
            "from the start, shorten the rows (--max-length), or start more processes."
        )
    most = max(batch.tokens.numel() for _, batch in chunks)
    out = []
    for number, (members, batch) in enumerate(chunks):
        rows = torch.arange(len(members)).view(-1, batch.together)
        split = 2 * batch.tokens.numel() > most and len(rows) > 1
        if batch.tokens.numel() == most and not split:
            raise OutOfMemory(
                f"memory ran out on a single sequence of {batch.tokens.shape[1]} tokens. Shorten the rows "
                "(--max-length), train fewer parameters (--lora-r), or use a larger machine."
            )
        for half in rows.tensor_split(2) if split else (rows,):
            part = half.flatten()
            out.append(((members[part], batch.only(part)[1] if split else batch), number, part))
    logger.warning("memory ran out: micro-batches of at most %d tokens become half as large", most)
    return out


def finite(values: Tensor, what: str) -> Tensor:
    """Return `values` if all are finite.

    Raises:
        NumericalError: some are not; names the first such example.
    """
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
        raise NumericalError(
            f"the {what} of example {bad[0]} (and {len(bad) - 1} more) is not finite; expected numbers. "
            "Check the data for empty answers, and load the model in float32."
        )
    return values


def likelihood_objective(
    forward: Forward,
    examples: Sequence[Example],
    pad_id: int,
    max_tokens: int,
    *,
    per: Literal["token", "response", "root"],
    hessian: Literal["exact", "difference"] = "exact",
    groups: Sequence[Sequence[int]] | None = None,
) -> LanguageObjective:
    """Negative log-likelihood of the supervised tokens of each example.

    Args:
        forward: the model.
        examples: m tokenised examples.
        pad_id: token to pad with.
        max_tokens: micro-batch size, padding included.
        per: "token": sums divided by the mean number of supervised tokens, so that the mean over examples is the mean
            over tokens that a trainer minimises; "response": plain sums; "root": sums divided by the root of each
            example's own number of tokens, which puts the Fisher matrix of responses on the scale of one token's.
        hessian: how Hessian products are taken.
        groups: examples that are used together (a trainer's batches), so that no micro-batch mixes two groups.
    """
    counts = torch.tensor([example.supervised for example in examples], dtype=torch.float64)
    factor = {"token": 1 / counts.mean().expand_as(counts), "response": torch.ones_like(counts), "root": counts.rsqrt()}
    chunks = tuple(
        (torch.tensor([group[i] for i in members]), batch)
        for group in (groups if groups is not None else [range(len(examples))])
        for members, batch in batches([examples[i] for i in group], pad_id, max_tokens)
    )
    owner = torch.arange(len(examples))
    return LanguageObjective(forward, chunks, owner, factor[per], negative_log_likelihood, len(examples), hessian)


def negative_margin_objective(
    forward: Forward,
    refusals: Sequence[Example],
    compliances: Sequence[Example],
    pad_id: int,
    max_tokens: int,
    *,
    packed: bool = False,
) -> LanguageObjective:
    """-(log p(refusal opening) - log p(compliance opening)) of each prompt, nats: a loss, so that lower is safer.

    Args:
        forward: the model.
        refusals: m prompts with the refusal opening supervised.
        compliances: the same prompts with the compliance opening supervised.
        pad_id: token to pad with.
        max_tokens: micro-batch size.
        packed: read each prompt once for both openings; ask `kl_and_margin.reads_packed` first.
    """
    m = len(refusals)
    pairs = list(zip(refusals, compliances, strict=True))
    laid = (
        packs(pairs, pad_id, max_tokens)
        if packed
        else batches([example for pair in pairs for example in pair], pad_id, max_tokens)
    )
    chunks = tuple((torch.tensor(members), batch) for members, batch in laid)
    owner = torch.arange(m).repeat_interleave(2)
    factor = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(m)
    return LanguageObjective(forward, chunks, owner, factor, negative_log_likelihood, m)
