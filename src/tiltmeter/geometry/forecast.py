"""From predicted paths to a forecast with an interval and a horizon.

The run is rehearsed twice, with more and with fewer looks at the gradient. Where both end alike, the forecast stands,
with an interval made of the scatter over safety prompts, the noise of the tuning rows and the difference between the
two. Where they part is the horizon: beyond it nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy import stats
from torch import Tensor

from tiltmeter.geometry.objective import Objective
from tiltmeter.geometry.path import Path

#: Two paths agree while their predictions differ by less than this share of the larger change.
PART = 0.35


@dataclass(frozen=True)
class Curve:
    """A quantity over steps with its interval; all [s]."""

    value: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class PathValues:
    """Safety quantities along one predicted path, per safety prompt.

    Attributes:
        steps: optimiser steps, ascending, [s].
        safety_kl: [s, m], nats per token.
        margin: [s, m], nats; higher is safer.
    """

    steps: tuple[int, ...]
    safety_kl: Tensor
    margin: Tensor


class Standing(Protocol):
    """How safe a model is at a displacement."""

    @property
    def work(self) -> int:
        """Tokens of one reading."""
        ...

    def __call__(self, displacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Safety KL [m], nats per token, and margin [m], nats."""
        ...


@dataclass(frozen=True)
class Separate:
    """A standing from an objective each. Cost: one forward pass of both per reading.

    Attributes:
        safety_kl: the KL.
        negative_margin: minus the margin.
    """

    safety_kl: Objective
    negative_margin: Objective

    @property
    def work(self) -> int:
        """Tokens of one reading."""
        return self.safety_kl.work + self.negative_margin.work

    def __call__(self, displacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Safety KL [m], nats per token, and margin [m], nats."""
        return self.safety_kl.losses(displacement), -self.negative_margin.losses(displacement)


def follow(path: Path, steps: Sequence[int], standing: Standing) -> tuple[PathValues, Tensor]:
    """Evaluate KL and margin at a path's displacements.

    Returns: the values, and the displacement [n] of the last step.

    Cost: one reading of `standing` per step.
    """
    kl, margin = [], []
    displacement = None
    for step in steps:
        del displacement  # before the next is made
        displacement = path.displacement(step)
        both = standing(displacement)
        kl.append(both[0].double().cpu())
        margin.append(both[1].double().cpu())
    if displacement is None:
        raise ValueError("expected at least one step to follow a path to")
    return PathValues(tuple(steps), torch.stack(kl), torch.stack(margin)), displacement


def read_along(walk: Iterable[tuple[int, Tensor]], standing: Standing) -> tuple[PathValues, Tensor]:
    """Evaluate KL and margin at steps and displacements [n] as a walk comes to them.

    Returns: the values, and the displacement of the last step.

    Cost: one reading of `standing` per place.
    """
    steps: list[int] = []
    both: list[tuple[Tensor, Tensor]] = []
    displacement = None
    for step, displacement in walk:
        steps.append(step)
        both.append(standing(displacement))
    if displacement is None:
        raise ValueError("expected a walk of at least one step")
    kl, margin = (torch.stack([each.double().cpu() for each in held]) for held in zip(*both, strict=True))
    return PathValues(tuple(steps), kl, margin), displacement


def joined(first: PathValues, second: PathValues) -> PathValues:
    """The values of one path at the steps before the second's, and those of the second.

    Args:
        first: of a path that is the same up to there.
        second: from there on.
    """
    kept = sum(step < second.steps[0] for step in first.steps)
    return PathValues(
        first.steps[:kept] + second.steps,
        torch.cat([first.safety_kl[:kept], second.safety_kl]),
        torch.cat([first.margin[:kept], second.margin]),
    )


def mean_interval(samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Interval for the mean over the last axis, corrected for skewness, [...]: low, high.

    KL over prompts is skewed: most prompts hardly move, a few move far. Student's interval and the percentile bootstrap
    then miss on the high side. Here Student's quantiles apply to t + k t^2/3 + k^2 t^3/27 + k/6m (k the skewness of the
    mean, t in standard errors over sqrt(m)), a monotone function of t whose distribution is symmetric to this order.

    One column gives no interval: NaN, which a caller must turn into "not measured".

    Error: 90 % intervals of 2000 simulated samples held the mean of a chi-square in 83, 87, 89, 90 % for m = 4, 8, 16,
        32 (percentile bootstrap widened by the t-quantile: 77, 80, 83, 87), of a lognormal in 83, 86, 86, 86 % (78, 79,
        81, 85), of a normal in 89 to 90 % (89 to 90).
    Source: Hall 1992, "On the removal of skewness by transformation", J. R. Statist. Soc. B 54.
    """
    m = samples.shape[-1]
    centre = samples.double().mean(-1)
    if m < 2:
        return torch.full_like(centre, math.nan), torch.full_like(centre, math.nan)
    residual = samples.double() - centre.unsqueeze(-1)
    width = residual.square().mean(-1).sqrt()
    skewness = residual.pow(3).mean(-1) / width.pow(3).clamp_min(1e-300)
    quantile = float(stats.t.ppf((1 + level) / 2, m - 1)) / math.sqrt(m - 1)

    def deviation(y: float) -> Tensor:
        """Solve t + k t^2/3 + k^2 t^3/27 + k/6m = y; the cube root in a form that has no 0/0 at k = 0."""
        shifted = y - skewness / (6 * m)
        inner = 1 + skewness * shifted
        root = inner.abs().pow(1 / 3) * inner.sign()
        return 3 * shifted / (root * root + root + 1)

    return centre - width * deviation(quantile), centre - width * deviation(-quantile)


def jackknife(forms: Tensor, level: float) -> tuple[float, float]:
    """Interval of sqrt(mean_{i != j} v_i' F v_j) over batches, by leaving out one group at a time: low, high.

    Args:
        forms: [J, J], mean over prompts.
        level: for example 0.9.
    """
    j = forms.shape[0]
    if j < 3:
        return math.nan, math.nan

    def off_diagonal(keep: Tensor) -> float:
        part = forms[keep][:, keep]
        k = part.shape[0]
        return float((part.sum() - torch.diagonal(part).sum()) / (k * (k - 1)))

    everything = torch.arange(j)
    whole = off_diagonal(everything)
    left_out = torch.tensor([off_diagonal(everything[everything != i]) for i in range(j)], dtype=torch.float64)
    error = math.sqrt((j - 1) / j * float((left_out - left_out.mean()).square().sum()))
    reach = float(stats.t.ppf((1 + level) / 2, j - 1)) * error
    return math.sqrt(max(0.0, whole - reach)), math.sqrt(max(0.0, whole + reach))


def part_ways(linear: Tensor, curved: Tensor, floor: Tensor | float, tolerance: float = PART) -> Tensor:
    """Whether two predictions [s] of a change have parted, [s] bool.

    Args:
        linear: predicted change along one path.
        curved: along the other.
        floor: differences below this are below what matters or can be measured, one for all or [s].
        tolerance: share of the larger change.

    A prediction that is not finite has parted.
    """
    apart = (linear - curved).abs() > (tolerance * torch.maximum(linear.abs(), curved.abs())).clamp_min(floor)
    # Comparisons with NaN are false and inf > 0.35 inf is false too: an exploded path would seem to agree.
    return apart | ~torch.isfinite(linear) | ~torch.isfinite(curved)


def horizon(steps: Sequence[int], parted: Tensor) -> int:
    """Last step up to which the predictions agree at every evaluated step; 0 when they never do."""
    out = 0
    for step, apart in zip(steps, parted.tolist(), strict=True):
        if apart:
            break
        out = step
    return out


def combine(per_prompt: Tensor, level: float, batch_reach: Tensor, gap: Tensor) -> Curve:
    """Mean over prompts with an interval for prompts, tuning batches and the choice of path together.

    Their squares are added, as those of independent errors.

    Args:
        per_prompt: [s, m].
        level: of the interval.
        batch_reach: [s], half-width that comes from the tuning rows (`noise.RowNoise`).
        gap: [s], what another path would change; its sign says nothing of where this path errs.
    """
    value = per_prompt.mean(-1)
    low, high = mean_interval(per_prompt, level)
    others = batch_reach.square() + gap.square()
    return Curve(
        value, value - ((value - low).square() + others).sqrt(), value + ((high - value).square() + others).sqrt()
    )


def on_these_prompts(value: Tensor, batch_reach: Tensor, gap: Tensor) -> Curve:
    """A mean with an interval for the tuning batches and the choice of path alone: for the very prompts it is over.

    Other prompts answer differently, which `combine` allows for; arguments as there, `value` [s] the mean.
    """
    reach = (batch_reach.square() + gap.square()).sqrt()
    return Curve(value, value - reach, value + reach)


def first_crossing(steps: Sequence[int], values: Tensor, budget: float, *, rising: bool) -> float | None:
    """Step at which a curve [s] first passes a budget, linear between evaluated steps; None if it never does.

    The curve is taken to start at step 0 from its own first value's side of the budget. Values that are not a number
    are passed over.
    """
    beyond = values > budget if rising else values < budget
    previous: tuple[float, float | None] = (0.0, None)
    for step, value, over in zip(steps, values.tolist(), beyond.tolist(), strict=True):
        if over:
            before, was = previous
            if was is None:
                return float(step)
            return float(before + (step - before) * (budget - was) / (value - was))
        if not math.isnan(value):
            previous = (float(step), value)
    return None


def local_exponent(steps: Tensor, values: Tensor) -> Tensor:
    """Slope d log u / d log t between neighbouring points [s - 1]; NaN where a value is not positive."""
    log_value = torch.where(values > 0, values, torch.nan).log()
    return log_value.diff() / steps.double().log().diff()
