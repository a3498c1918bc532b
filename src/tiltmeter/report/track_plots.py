"""Draw a run: measured curves over optimiser steps, with the forecast behind them, and the path of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tiltmeter.report import svg
from tiltmeter.report.numbers import setting_text
from tiltmeter.report.plots import canvas, log_ticks

_NAN = float("nan")
Points = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """Points over optimiser steps, with an interval or without; None leaves a gap."""

    steps: Sequence[float]
    value: Points
    low: Points = ()
    high: Points = ()


def draw_measured(
    title: str, measured: Line, predicted: Line | None, name: str, *, horizon: float | None = None, log: bool = False
) -> Markup:
    """Draw one measured quantity, its forecast and the forecast's horizon.

    Args:
        title: quantity and unit.
        measured: dots and line.
        predicted: dashed line with its band.
        name: prefix of the ids inside the drawing.
        horizon: last step the forecast claims.
        log: logarithmic height; values at or below zero are left out.
    """
    with canvas(350, 262) as (figure, finish):
        axes = figure.subplots()
        for line, colour, mark, dash in ((predicted, svg.PATHS[0], "D", (5.0, 2.0)), (measured, svg.VALUE, "o", None)):
            if line is None:
                continue
            if line.low and line.high:
                low = [floor if log and point is not None else point for point, floor in _floored(line)]
                axes.fill_between(
                    line.steps, _gaps(low, log), _gaps(line.high, log), color=colour, alpha=0.18, linewidth=0
                )
            style: Any = "-" if dash is None else (0, dash)
            axes.plot(
                line.steps, _gaps(line.value, log), marker=mark, color=colour, linewidth=1.8, markersize=3.4,
                linestyle=style,
            )  # fmt: skip
        last = max(measured.steps)
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(0, last * 1.15 or 1)
        ticks = [0, *(2**power for power in range(0, 24, 1 if last <= 64 else 2) if 2**power <= last)]
        axes.set_xticks(ticks, [setting_text(tick) for tick in ticks])
        axes.minorticks_off()
        if log:
            shown = [point for line in (measured, predicted) if line for point in line.value if point and point > 0]
            axes.set_yscale("log")
            axes.set_ylim(min(shown) / 2, max(shown) * 2)
            log_ticks(axes.yaxis, min(shown) / 2, max(shown) * 2)
        if horizon is not None and horizon < last:
            axes.axvspan(horizon, last * 1.15, color=svg.BEYOND, linewidth=0, zorder=0)
        axes.grid(axis="y")
        axes.set_title(title)
        axes.set_xlabel("optimiser step (logarithmic from 1)")
        return finish(name, f"{title} over optimiser steps; the numbers are in the table of the run.")


def draw_path(positions: Sequence[Sequence[float]], steps: Sequence[int], name: str) -> Markup:
    """Draw the weights' path in its first two principal components."""
    with canvas(350, 262) as (figure, finish):
        axes = figure.subplots()
        across, up = [point[0] for point in positions], [point[1] for point in positions]
        axes.plot(across, up, "o-", color=svg.VALUE, linewidth=1.5, markersize=3.4)
        for place in (0, len(steps) - 1):
            axes.annotate(f"step {steps[place]}", (across[place], up[place]), xytext=(4, 4),
                          textcoords="offset points", size=10, color=svg.MUTED)  # fmt: skip
        axes.set_title("Path of the weights, parameter units")
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")
        axes.margins(0.12)
        return finish(name, "Path of the weights in its first two principal components.")


def _floored(line: Line) -> list[tuple[float | None, float]]:
    """Lower ends, each with itself or, where a logarithmic axis has no place for it, a thousandth of the value."""
    out = []
    for low, value in zip(line.low, line.value, strict=True):
        out.append((low, low if low is not None and low > 0 else (value or 0.0) / 1000))
    return out


def _gaps(values: Points, log: bool) -> list[float]:
    return [_NAN if value is None or (log and value <= 0) else value for value in values]
