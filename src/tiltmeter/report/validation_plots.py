"""Draw a validation: predicted against measured, and rank agreements with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tiltmeter.report import svg
from tiltmeter.report.plots import canvas

_MARKS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Point:
    """One cell: predicted and measured value, the predicted interval, and its regime."""

    predicted: float
    measured: float
    low: float | None
    high: float | None
    regime: str


def draw_scatter(title: str, points: Sequence[Point], regimes: Sequence[str], name: str) -> Markup:
    """Draw measured over predicted, with the line on which they agree; a mark for each regime."""
    with canvas(350, 320) as (figure, finish):
        axes = figure.subplots()
        ends = [x for p in points for x in (p.predicted, p.measured)]
        low, high = min([*ends, 0.0]), max([*ends, 0.0])
        room = 0.06 * (high - low or 1.0)
        axes.plot([low, high], [low, high], color=svg.MUTED, linewidth=1, linestyle=(0, (4, 2)))
        for place, regime in enumerate(regimes):
            held = [p for p in points if p.regime == regime]
            colour = svg.PATHS[place % len(svg.PATHS)]
            for p in held:
                if p.low is not None and p.high is not None:
                    across = [max(p.low, low - room), min(p.high, high + room)]
                    axes.plot(across, [p.measured] * 2, color=colour, linewidth=1, alpha=0.5)
            mark = _MARKS[place % len(_MARKS)]
            axes.plot([p.predicted for p in held], [p.measured for p in held], mark, color=colour, markersize=4.5)
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(low - room, high + room)
        axes.set_title(title)
        axes.set_xlabel("foretold")
        axes.set_ylabel("measured")
        axes.grid()
        return finish(name, f"{title}: measured over foretold for {len(points)} cells; the numbers are in the table.")


def draw_ranks(rows: Sequence[tuple[str, float, float | None, float | None, bool]], title: str, name: str) -> Markup:
    """Draw rank agreements as dots with intervals, best first; ours in the colour of values."""
    with canvas(530, 60 + 17 * len(rows)) as (figure, finish):
        axes = figure.subplots()
        for place, (_, value, low, high, ours) in enumerate(rows):
            colour = svg.VALUE if ours else svg.MUTED
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.4)
            axes.plot([value], [place], "o", color=colour, markersize=5)
        axes.axvline(0, color=svg.MUTED, linewidth=1)
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row[0].replace("_", " ") for row in rows])
        axes.grid(axis="x")
        axes.set_title(title)
        return finish(name, f"{title}; the numbers are in the table of predictors.")
