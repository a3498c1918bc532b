"""What changed between two models, item by item, with a paired bootstrap interval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Change:
    """A difference tuned - base over the items both were measured on.

    Attributes:
        value: in `unit`; None where there is nothing to compare.
        low: lower end of the interval.
        high: upper end.
        n: items that were compared.
        unit: of value, low and high.
        method: how the interval was made.
        reason: why value or interval is missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    method: str
    reason: str | None = None


def paired_change(
    before: Sequence[float | None],
    after: Sequence[float | None],
    unit: str,
    *,
    level: float = 0.9,
    seed: int = 0,
    share: bool = False,
) -> Change:
    """Mean of after - before over the items that both have.

    Args:
        before: base, one value an item; None where it was not scored.
        after: tuned model, the same items.
        unit: of the values.
        level: of the interval.
        seed: of the bootstrap.
        share: values are 0 or 1. If no item changed, or all did, a bootstrap would give an interval of no width; then
            the ends are what n items alike leave possible at most (Clopper-Pearson).
    """
    held = [(a, b) for a, b in zip(before, after, strict=True) if _known(a) and _known(b)]
    none = "needs the same items scored for both models"
    if not held:
        return Change(None, None, None, 0, unit, "none", none)
    old, new = (np.array(side, dtype=np.float64) for side in zip(*held, strict=True))
    value = float((new - old).mean())
    if np.ptp(new - old) == 0:
        least = ((1 - level) / 2) ** (1 / len(held))  # share of items alike that all n alike leave possible
        if share and value == 0:
            return Change(0.0, least - 1, 1 - least, len(held), unit, "no item changed: exact binomial bound")
        if share:
            low, high = (value, -least) if value < 0 else (least, value)
            return Change(value, low, high, len(held), unit, "all items changed: exact binomial bound")
        why = "one item gives no interval" if len(held) == 1 else "all items changed by the same amount"
        return Change(value, None, None, len(held), unit, "none", why)
    low, high, method = bootstrap((old, new), lambda a, b, axis: (b - a).mean(axis=axis), level, seed)
    return Change(value, low, high, len(held), unit, method)


def bootstrap(
    data: tuple[Array, ...], statistic: Callable[..., Any], level: float, seed: int
) -> tuple[float, float, str]:
    """Interval of a statistic over items that are resampled together; NaN, NaN where the sample does not give one.

    Args:
        data: arrays [n], one row an item.
        statistic: takes resampled arrays and `axis`.
        level: of the interval.
        seed: fixed, so that the same data give the same interval.

    Returns: low, high and the method: BCa, or percentile where BCa is not defined.

    Source: Efron 1987, "Better bootstrap confidence intervals", J. Am. Statist. Assoc. 82; scipy.stats.bootstrap.
    """
    for method, name in (("BCa", "BCa"), ("percentile", "percentile")):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the percentile method follows
            found = stats.bootstrap(
                data,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=RESAMPLES,
                confidence_level=level,
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            return float(found.low), float(found.high), f"paired bootstrap over items, {name}, {RESAMPLES} resamples"
    return math.nan, math.nan, "none"


def ratio_of_sums(top: Sequence[float], bottom: Sequence[float], level: float, seed: int) -> tuple[float, float, float]:
    """sum(top) / sum(bottom) with its bootstrap interval; ends are NaN for a single item."""
    a, b = np.array(top, dtype=np.float64), np.array(bottom, dtype=np.float64)
    value = float(a.sum() / b.sum())
    if len(a) < 2 or np.ptp(a / b) == 0:
        return value, math.nan, math.nan
    low, high, _ = bootstrap((a, b), lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis), level, seed)
    return value, low, high


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
