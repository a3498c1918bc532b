"""How good were the forecasts? Rank agreement, size, coverage and collapses, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Fewest sets a rank agreement is given for.
FEWEST = 4


def ranks(values: Tensor) -> Tensor:
    """Average ranks along the last axis [..., n], 1 for the smallest; ties share their mean rank."""
    smaller = (values[..., None, :] < values[..., :, None]).double().sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).double().sum(-1)
    return smaller + (equal + 1) / 2


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis [..., n] -> [...]; NaN where one side is constant."""
    a, b = ranks(x.double()), ranks(y.double())
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 1e-12, (a * b).sum(-1) / scale.clamp_min(1e-300), math.nan)


def resampled_spearman(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Spearman's correlation of x and y [n], every entry taken so many times, counts [..., n] -> [...]; NaN if flat."""
    counts = counts.double()

    def centred(values: Tensor) -> Tensor:
        smaller = (values[None, :] < values[:, None]).double()
        equal = (values[None, :] == values[:, None]).double()
        rank = counts @ smaller.T + (counts @ equal.T + 1) / 2
        mean = (counts * rank).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1.0)
        return rank - mean

    a, b = centred(x.double()), centred(y.double())
    scale = ((counts * a.square()).sum(-1) * (counts * b.square()).sum(-1)).sqrt()
    return torch.where(scale > 1e-12, (counts * a * b).sum(-1) / scale.clamp_min(1e-300), math.nan)


@dataclass(frozen=True)
class Agreement:
    """Rank agreement of one predictor with a measured quantity.

    Attributes:
        value: mean of the regimes' correlations over sets; NaN where no regime has one.
        low: lower end of the bootstrap interval over sets; NaN where there are too few.
        high: upper end.
        by_regime: regime -> correlation.
        sets: regime -> sets it is over.
        draws: regime -> bootstrap draws, NaN where a draw has none.
    """

    value: float
    low: float
    high: float
    by_regime: dict[str, float]
    sets: dict[str, int]
    draws: dict[str, Tensor]


def agreement(
    predicted: Mapping[tuple[str, str], float],
    measured: Mapping[tuple[str, str], float],
    names: Sequence[str],
    level: float,
    draws: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Spearman over the sets of each regime, averaged over regimes; risks of two regimes have no common scale.

    Args:
        predicted: (regime, set) -> risk.
        measured: (regime, set) -> harm, mean over seeds.
        names: all sets.
        level: of the interval.
        draws: of the bootstrap; each picks as many sets as were measured in a regime, the same for all predictors and
            quantities, and the same in all regimes of the same sets. Regimes of other sets are drawn by themselves:
            that some of their sets are the same is left out of the mean's interval.
        seed: of the bootstrap.
    """
    by_regime: dict[str, float] = {}
    counts: dict[str, int] = {}
    drawn: dict[str, Tensor] = {}
    for regime in sorted({regime for regime, _ in measured}):
        there = [name for name in names if (regime, name) in measured]
        held = [i for i, name in enumerate(there) if (regime, name) in predicted]
        counts[regime] = len(held)
        if len(held) < FEWEST:
            continue
        x = torch.tensor([predicted[regime, there[i]] for i in held], dtype=torch.float64)
        y = torch.tensor([measured[regime, there[i]] for i in held], dtype=torch.float64)
        value = float(spearman(x, y))
        if math.isnan(value):
            continue
        by_regime[regime] = value
        picks = torch.randint(len(there), (draws, len(there)), generator=torch.Generator().manual_seed(seed))
        taken = torch.zeros(draws, len(there)).scatter_add_(1, picks, torch.ones(draws, len(there)))
        drawn[regime] = resampled_spearman(x, y, taken[:, held])
    if not by_regime:
        return Agreement(math.nan, math.nan, math.nan, {}, counts, {})
    mean = torch.stack([*drawn.values()]).nanmean(0)
    known = mean[torch.isfinite(mean)]
    tail = (1 - level) / 2
    ends = (float(known.quantile(tail)), float(known.quantile(1 - tail))) if known.numel() else (math.nan, math.nan)
    return Agreement(sum(by_regime.values()) / len(by_regime), *ends, by_regime, counts, drawn)


def ahead(one: Agreement, other: Agreement) -> float:
    """Share of bootstrap draws in which one agreement exceeds another, over the regimes that both were asked in.

    Ties count half. NaN without common draws.
    """
    common = sorted(one.draws.keys() & other.draws.keys())
    if not common:
        return math.nan
    a, b = (torch.stack([each.draws[regime] for regime in common]) for each in (one, other))
    both = torch.isfinite(a) & torch.isfinite(b)
    a, b = (torch.where(both, draws, math.nan).nanmean(0) for draws in (a, b))
    known = torch.isfinite(a)
    if not bool(known.any()):
        return math.nan
    return float(((a > b).double() + (a == b).double() / 2)[known].mean())


def size_error(predicted: float, measured: float, error: float) -> float:
    """|predicted - measured| over the larger of |measured| and the measurement error."""
    return abs(predicted - measured) / max(abs(measured), error)


def crossing(steps: Sequence[int], margins: Tensor) -> float | None:
    """Step at which half of the prompts have a margin below zero: that of the lower median of [s, m], linear between.

    None where it never comes to that, or where it was so from the start.
    """
    middle = margins.double().quantile(0.5, dim=-1, interpolation="lower").tolist()
    if middle[0] < 0:
        return None
    for place in range(1, len(middle)):
        if middle[place] < 0:
            before, after = middle[place - 1], middle[place]
            return float(steps[place - 1] + (steps[place] - steps[place - 1]) * before / (before - after))
    return None


@dataclass(frozen=True)
class Collapses:
    """How collapses were foretold; counts of cells.

    Attributes:
        cells: cells whose aligned model had not collapsed to begin with.
        happened: collapses measured.
        foretold: of these, foretold within the recipe.
        dated: of these, foretold within a factor of two of their step.
        alarms: collapses foretold that did not happen.
    """

    cells: int
    happened: int
    foretold: int
    dated: int
    alarms: int


def collapses(pairs: Sequence[tuple[float | None, float | None]]) -> Collapses:
    """Count over pairs of foretold and measured step, None for no collapse."""
    happened = [(told, seen) for told, seen in pairs if seen is not None]
    return Collapses(
        len(pairs),
        len(happened),
        sum(told is not None for told, _ in happened),
        sum(told is not None and 0.5 <= max(told, 1e-9) / max(seen, 1e-9) <= 2 for told, seen in happened),
        sum(told is not None and seen is None for told, seen in pairs),
    )
