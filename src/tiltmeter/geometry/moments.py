"""What an optimiser remembers of the gradients it has met, where each stands for several steps.

A displacement at constant gradient needs no memory (`metric`). Where the gradient changes, Adam divides by squares that
are partly of earlier, larger gradients, and momentum carries on in earlier directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.geometry.metric import Adam, Metric, Sgd
from tiltmeter.geometry.motion import narrow
from tiltmeter.geometry.path import pieces


class Moments(Protocol):
    """An optimiser's memory, empty at the anchor."""

    def meet(self, mean: Tensor, spread: Tensor, steps: int) -> Tensor:
        """Take in one gradient for a number of steps.

        Args:
            mean: mini-batch gradients over these steps, their mean [n]; bfloat16 is taken as the float32 it stands for.
            spread: their standard deviation [n].
            steps: how many; the memory fades as over so many steps.

        Returns: motion per flow time over these steps is minus this [n], a new vector.
        """
        ...


@dataclass
class AdamMoments:
    """Bias-corrected moving averages of the gradient and of its square, each [n]; in bfloat16 when n is large.

    Exact for steps of one: torch's own Adam. For a gradient that never changes it is `Adam.direction`.

    Attributes:
        metric: the optimiser.
        met: steps taken in.
        first: mean of past gradients.
        second: mean of their squares.
    """

    metric: Adam
    met: int = 0
    first: Tensor | None = None
    second: Tensor | None = None

    def meet(self, mean: Tensor, spread: Tensor, steps: int) -> Tensor:
        """Averages over everything met, in Adam's own ratio."""
        self.met += steps
        # corrected averages are moved, not raw ones: their weights stay far above what bfloat16 rounds away
        shares = [(1 - beta**steps) / (1 - beta**self.met) for beta in self.metric.betas]
        wide = torch.promote_types(mean.dtype, torch.float32)
        out = torch.empty_like(mean, dtype=wide)
        if self.first is None or self.second is None:
            self.first = narrow(torch.empty_like(out))
            self.second = narrow(torch.empty_like(out))
        for part in pieces(mean):
            value = mean[part].to(wide)
            new = value, value.square() + spread[part].to(wide).square()
            held = []
            for kept, met, share in zip((self.first, self.second), new, shares, strict=True):
                # the first share is one, and what was held before it is not a number yet
                moved = met if share == 1.0 else torch.lerp(kept[part].to(wide), met, share)
                kept[part] = moved
                held.append(moved)
            out[part] = held[0] / held[1].sqrt().add_(self.metric.epsilon)
        return out


@dataclass
class SgdMoments:
    """The mean gradient that heavy-ball or Nesterov momentum carries, [n]; none without momentum.

    Exact for steps of one: torch's own SGD, since flow time holds how much velocity has built up.

    Attributes:
        metric: the optimiser.
        met: steps taken in.
        carried: velocity over what a constant gradient would have built up.
    """

    metric: Sgd
    met: int = 0
    carried: Tensor | None = None

    def meet(self, mean: Tensor, spread: Tensor, steps: int) -> Tensor:
        """Velocity, per unit of what a constant gradient would have built up."""
        momentum, wide = self.metric.momentum, torch.promote_types(mean.dtype, torch.float32)
        if momentum == 0:
            return mean.to(wide, copy=True)
        self.met += steps
        built = (1 - momentum**self.met) / (1 - momentum)
        share = (1 - momentum**steps) / (1 - momentum**self.met)
        out = torch.empty_like(mean, dtype=wide)
        if self.carried is None:
            self.carried = narrow(mean.to(wide, copy=True))
        for part in pieces(mean):
            value = mean[part].to(wide)
            moved = torch.lerp(self.carried[part].to(wide), value, share)
            self.carried[part] = moved
            ahead = momentum * built
            out[part] = (value + ahead * moved) / (1 + ahead) if self.metric.nesterov else moved
        return out


def moments_of(metric: Metric) -> Moments:
    """The empty memory of an optimiser.

    Raises:
        TypeError: the optimiser is neither SGD nor Adam.
    """
    if isinstance(metric, Adam):
        return AdamMoments(metric)
    if isinstance(metric, Sgd):
        return SgdMoments(metric)
    raise TypeError(f"expected Sgd or Adam, got {type(metric).__name__}")


def remembered(metric: Metric, steps: Sequence[int]) -> Tensor:
    """Shares of the gradients met in what drives each stretch, [L, L]; lines add up to 1.

    Line i is the i-th stretch, column j the j-th gradient. Adam's second moment is taken as it is.

    Args:
        metric: the optimiser.
        steps: length of each stretch.
    """
    keep = metric.betas[0] if isinstance(metric, Adam) else metric.momentum if isinstance(metric, Sgd) else 0.0
    out = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    held, met = torch.zeros(len(steps), dtype=torch.float64), 0
    for i, count in enumerate(steps):
        met += count
        share = (1 - keep**count) / (1 - keep**met)
        held = (1 - share) * held
        held[i] += share
        out[i] = held
        if isinstance(metric, Sgd) and metric.nesterov:
            ahead = keep * (1 - keep**met) / (1 - keep)
            out[i] = ahead * held / (1 + ahead)
            out[i, i] += 1 / (1 + ahead)
    return out
