"""From predicted paths to a forecast with an interval and a horizon.

Two paths are evaluated: one straight, one curved. Where they agree, the forecast stands, with an interval made of the
scatter over safety prompts, the scatter over tuning batches and the difference between the paths. Where they part is
the horizon: beyond it nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def follow(path: Path, steps: Sequence[int], safety_kl: Objective, negative_margin: Objective) -> PathValues:
    """Evaluate KL and margin at a path's displacements.

    Cost: one forward pass of both objectives per step.
    """
    kl, margin = [], []
    for step in steps:
        displacement = path.displacement(step)
        kl.append(safety_kl.losses(displacement).double().cpu())
        margin.append(-negative_margin.losses(displacement).double().cpu())
        del displacement
    return PathValues(tuple(steps), torch.stack(kl), torch.stack(margin))


def bootstrap_mean(samples: Tensor, level: float, draws: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Percentile interval for the mean over the last axis, [...]: low, high.

    One column gives no interval: NaN, which a caller must turn into "not measured".
    """
    m = samples.shape[-1]
    if m < 2:
        return torch.full(samples.shape[:-1], math.nan), torch.full(samples.shape[:-1], math.nan)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(m, (draws, m), generator=generator)
    counts = torch.zeros(draws, m, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(draws, m, dtype=torch.float64)
    )
    means = samples.double() @ (counts / m).T
    tail = (1 - level) / 2
    # Percentiles of m resampled values are too narrow by sqrt((m - 1) / m) and by the missing t-quantile.
    widen = float(stats.t.ppf(1 - tail, m - 1) / stats.norm.ppf(1 - tail)) * math.sqrt(m / (m - 1))
    centre = samples.double().mean(-1)
    low, high = torch.quantile(means, tail, -1), torch.quantile(means, 1 - tail, -1)
    return centre - (centre - low) * widen, centre + (high - centre) * widen


def group_scatter(values: Tensor, level: float) -> float:
    """Half-width of an interval for the mean of J group values [J], Student's t; NaN for one group."""
    j = values.numel()
    if j < 2:
        return math.nan
    return float(stats.t.ppf((1 + level) / 2, j - 1) * values.double().std() / math.sqrt(j))


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


def part_ways(linear: Tensor, curved: Tensor, floor: float, tolerance: float = PART) -> Tensor:
    """Whether two predictions [s] of a change have parted, [s] bool.

    Args:
        linear: predicted change along the straight path.
        curved: along the curved one.
        floor: differences below this are below what matters or can be measured.
        tolerance: share of the larger change.
    """
    return (linear - curved).abs() > (tolerance * torch.maximum(linear.abs(), curved.abs())).clamp_min(floor)


def horizon(steps: Sequence[int], parted: Tensor) -> int:
    """Last step up to which the predictions agree at every evaluated step; 0 when they never do."""
    out = 0
    for step, apart in zip(steps, parted.tolist(), strict=True):
        if apart:
            break
        out = step
    return out


def combine(per_prompt: Tensor, level: float, batch_reach: Tensor, gap: Tensor, seed: int = 0) -> Curve:
    """Mean over prompts with an interval for prompts, tuning batches and the choice of path together.

    Args:
        per_prompt: [s, m].
        level: of the interval.
        batch_reach: [s], half-width that comes from the finite tuning sample.
        gap: [s], signed difference other path - this path; the interval is stretched to that side.
        seed: of the bootstrap.
    """
    value = per_prompt.mean(-1)
    low, high = bootstrap_mean(per_prompt, level, seed=seed)
    below = ((value - low).square() + batch_reach.square()).sqrt() + (-gap).clamp_min(0)
    above = ((high - value).square() + batch_reach.square()).sqrt() + gap.clamp_min(0)
    return Curve(value, value - below, value + above)


def first_crossing(steps: Sequence[int], values: Tensor, budget: float, *, rising: bool) -> float | None:
    """Step at which a curve [s] first passes a budget, linear between evaluated steps; None if it never does.

    The curve is taken to start at step 0 from its own first value's side of the budget.
    """
    beyond = values > budget if rising else values < budget
    previous: tuple[float, float | None] = (0.0, None)
    for step, value, over in zip(steps, values.tolist(), beyond.tolist(), strict=True):
        if over:
            before, was = previous
            if was is None:
                return float(step)
            return before + (step - before) * (budget - was) / (value - was)
        previous = (float(step), value)
    return None


def local_exponent(steps: Tensor, values: Tensor) -> Tensor:
    """Slope d log u / d log t between neighbouring points [s - 1]; NaN where a value is not positive."""
    log_value = torch.where(values > 0, values, torch.nan).log()
    return log_value.diff() / steps.double().log().diff()
