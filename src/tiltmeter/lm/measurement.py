"""A measured number with its interval and what could not be scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats

from tiltmeter.geometry.forecast import mean_interval


@dataclass(frozen=True)
class Measurement:
    """A value with a 90 % interval; None where there is nothing to say, never zero.

    Attributes:
        value: in `unit`.
        low: lower end of the interval.
        high: upper end.
        n: items that were scored.
        unscored: items that could not be.
        unit: of value, low and high.
        reason: why value or interval is missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    unit: str
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)


def share(hits: int, n: int, unscored: int = 0, level: float = 0.9) -> Measurement:
    """A share with Wilson's interval; its interval is never of width zero, even at 0 or n hits.

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    if n == 0:
        return Measurement(None, None, None, 0, unscored, "share", "no item could be scored")
    interval = stats.binomtest(hits, n).proportion_ci(confidence_level=level, method="wilson")
    return Measurement(hits / n, float(interval.low), float(interval.high), n, unscored, "share")


def mean(values: Sequence[float], unit: str, level: float = 0.9, *, floor: float = -math.inf) -> Measurement:
    """A mean with an interval over items, corrected for skewness; values that are not finite count as unscored.

    The interval ends at `floor`, for quantities such as KL that cannot be smaller.
    """
    scored = [value for value in values if math.isfinite(value)]
    unscored = len(values) - len(scored)
    if not scored:
        return Measurement(None, None, None, 0, unscored, unit, "no item could be scored")
    centre = sum(scored) / len(scored)
    if len(scored) < 2:
        return Measurement(centre, None, None, 1, unscored, unit, "one item gives no interval")
    low, high = mean_interval(torch.tensor([scored], dtype=torch.float64), level)
    return Measurement(centre, max(floor, float(low[0])), float(high[0]), len(scored), unscored, unit)
