"""Which part of a forecast a plot shows, and whether on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiltmeter.report.fields import Curve

_LOG_FROM = 30.0  # a curve that spans more than this ratio hides its beginning on a linear axis


@dataclass(frozen=True)
class Scale:
    """Limits of one plot; `log` means both axes are logarithmic, so that a power law is a straight line."""

    log: bool
    left: float
    right: float
    bottom: float
    top: float


def scale_of(curves: Sequence[Curve]) -> Scale:
    """Find limits that hold all curves and keep a single path that runs away from flattening the rest."""
    values = [value for curve in curves for value in curve.value if value is not None]
    steps = [step for curve in curves for step in curve.steps]
    hard = values + [bound for curve in curves for bound in _claimed_band(curve)]
    hard += [curve.anchor for curve in curves if curve.anchor is not None]
    soft = [
        point for curve in curves for line in (*curve.paths.values(), curve.low, curve.high) for point in line if point
    ]
    if not hard:  # only paths were measured
        hard = soft or [0.0]
    log = (
        min(values, default=0.0) > 0
        and max(values) / min(values) > _LOG_FROM
        and all(curve.anchor is None for curve in curves)
        and min(steps) > 0
    )
    budgets = [curve.budget for curve in curves if curve.budget is not None]
    if log:
        bottom, top = _log_limits(values, hard, soft, budgets)
        return Scale(True, min(steps) * 0.85, max(steps) * 1.18, bottom, top)
    bottom, top = _limits(hard, soft, budgets)
    if all(curve.unit == "share" for curve in curves):
        bottom, top = -0.03, 1.03
    right = max(steps) * (1.03 if len(steps) > 1 else 2.0)
    return Scale(False, 0.0, right if right > 0 else 1.0, bottom, top)


def _claimed_band(curve: Curve) -> list[float]:
    horizon = curve.horizon if curve.horizon is not None else float("inf")
    points = zip(curve.steps, curve.low, curve.high, strict=True)
    return [bound for step, *band in points if step <= horizon for bound in band if bound is not None]


def _limits(hard: list[float], soft: list[float], budgets: list[float]) -> tuple[float, float]:
    bottom, top = min(hard), max(hard)
    height = (top - bottom) or abs(top) or 1.0
    near = [budget for budget in budgets if bottom - height / 2 <= budget <= top + height / 2]
    # As much of the paths and of the band beyond the horizon as leaves a quarter of the plot to what is claimed.
    bottom = min([bottom, *near, max(bottom - 1.5 * height, min(soft, default=bottom))])
    top = max([top, *near, min(top + 1.5 * height, max(soft, default=top))])
    height = (top - bottom) or abs(top) or 1.0
    below = 0.0 if bottom == 0 else 0.08
    return bottom - below * height, top + 0.12 * height


def _log_limits(values: list[float], hard: list[float], soft: list[float], budgets: list[float]) -> tuple[float, float]:
    floor, ceiling = min(values) / 10, max(values) * 10
    near = [point for point in hard + soft if floor <= point <= ceiling] + [
        b for b in budgets if 0 < b <= 100 * max(values)
    ]
    return max(min(near), floor) / 1.5, max(near) * 1.8
