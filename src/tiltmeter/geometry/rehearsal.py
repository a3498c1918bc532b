"""The run in fewer and longer steps: the gradient is measured where the path has come to, and drives it for a while.

What is extrapolated from gradients near the anchor knows nothing of those that a run meets later. A rehearsal meets
some of them in their order: few gradients, each of fresh batches, each measured in
the middle of the stretch that it drives, in the optimiser's own rule with its memory. With as many looks as steps it is
the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Metric
from tiltmeter.geometry.moments import moments_of, remembered
from tiltmeter.geometry.motion import Slope, narrow
from tiltmeter.geometry.noise import Mixture


class Look(Protocol):
    """Gradients at a place of the path."""

    def __call__(self, number: int, displacement: Tensor | None) -> Slope:
        """Mean and spread of mini-batch gradients.

        Args:
            number: of the look, from 0.
            displacement: where, [n], in bfloat16 when n is large; None for the anchor.
        """
        ...


@dataclass(frozen=True)
class Rehearsal:
    """A run rehearsed in few looks at the gradient.

    Attributes:
        metric: the optimiser.
        clock: learning rates of every step.
        looks: gradients that are measured; no more are than there are steps.
        decayed: the anchor's decayed parameters [n] (zero where decay does not apply), if there is weight decay.

    Error: against gradient descent, eta^2 c (c - 1) / 2 H g from the c steps of the first stretch, and third order in
        flow time. Under Adam also what its first moment lags behind within a stretch. With few rows in a look, their
        noise: `mixture`.
    """

    metric: Metric
    clock: Clock
    looks: int
    decayed: Tensor | None = None

    def stretches(self) -> list[tuple[int, int]]:
        """Steps (after which, until which) that each look drives; the first, at the anchor, has half a stretch."""
        steps = self.clock.steps
        looks = min(self.looks, steps)
        ends = [round(steps * (i + 0.5) / (looks - 0.5)) for i in range(looks)]
        ends = sorted({min(max(1, end), steps) for end in ends})
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def walk(self, look: Look, at: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Walk the path, once.

        Args:
            look: measures gradients.
            at: steps to stop at, ascending.

        Yields: a step of `at` and the displacement there, [n], which changes when the walk goes on.

        Cost: of the looks; memory for the displacement, the optimiser's memory and two vectors more.
        """
        covered = self.metric.flow_time(self.clock).tolist()
        moments = moments_of(self.metric)
        displacement: Tensor | None = None
        direction: Tensor | None = None
        for number, (begin, end) in enumerate(self.stretches()):
            where = None
            if displacement is not None and direction is not None:
                # the gradients of these steps are taken after `begin` to `end - 1` steps: here is their middle
                ahead = (covered[end - 1] - covered[begin]) / 2
                where = narrow(torch.add(displacement, direction, alpha=-ahead))  # in a look memory is fullest
                del direction
            slope = look(number, where)
            del where
            direction = moments.meet(slope.mean, slope.spread, end - begin)
            del slope
            if displacement is None:
                displacement = torch.zeros_like(direction)
            here = begin
            for step in [*(each for each in at if begin < each < end), end]:
                moved = covered[step] - covered[here]
                displacement.add_(direction, alpha=-moved)
                if self.decayed is not None and self.metric.weight_decay:
                    displacement.add_(self.decayed, alpha=-moved * self.metric.weight_decay)
                here = step
                if step in at:
                    yield step, displacement

    def driven(self) -> Tensor:
        """Share of the flow time so far that each look has driven, [steps + 1, L]; before any, it is the first's.

        Through the optimiser's memory a look drives later stretches too. Adam's second moment is taken as it is.
        """
        covered, stretches = self.metric.flow_time(self.clock), self.stretches()
        direct = torch.stack([covered.clamp(covered[begin], covered[end]) - covered[begin] for begin, end in stretches])
        out = direct.T @ remembered(self.metric, [end - begin for begin, end in stretches])
        first = torch.zeros_like(out)
        first[:, 0] = 1.0
        moved = covered[:, None] > 0
        return torch.where(moved, out / covered[:, None].clamp_min(1e-300), first)

    def mixture(self, members: Sequence[Sequence[int]], rows: int) -> Mixture:
        """Which rows the path is made of.

        Args:
            members: for every look the numbers of the rows in it; a row that is there twice counts twice.
            rows: how many there are.
        """
        shares = torch.zeros(len(members), rows, dtype=torch.float64)
        for share, each in zip(shares, members, strict=True):
            share.index_add_(0, torch.tensor(each), torch.full((len(each),), 1 / len(each), dtype=torch.float64))
        return Mixture(self.driven(), shares)
