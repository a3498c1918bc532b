"""Draw a record: forecasts with interval and horizon, the spectrum, and where in the model the sensitivity sits."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tiltmeter.report import svg
from tiltmeter.report.fields import Curve
from tiltmeter.report.numbers import setting_text
from tiltmeter.report.scale import Scale, scale_of

_NAN = float("nan")  # matplotlib's word for "leave a gap"; it never reaches the page
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tiltmeter",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlecolor": svg.INK,
    "axes.labelcolor": svg.MUTED,
    "axes.edgecolor": svg.MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": svg.GRID,
    "grid.linewidth": 0.8,
    "xtick.color": svg.MUTED,
    "ytick.color": svg.MUTED,
    "text.color": svg.INK,
    "hatch.color": svg.MUTED,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "figure.constrained_layout.use": True,
}


@contextmanager
def canvas(width: int, height: int) -> Iterator[tuple[Figure, Callable[[str, str], Markup]]]:
    """Give a figure of width x height page pixels and the function that turns it into a page fragment."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts the measuring font lacks; the browser has its own fonts
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)

        def finish(name: str, label: str) -> Markup:
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            return svg.fragment(text.getvalue(), name, label)

        yield figure, finish


def draw_forecast(curve: Curve, colours: Sequence[str], name: str) -> Markup:
    """Draw one forecast with its band, its single paths, the budget and the horizon.

    Args:
        curve: what to draw.
        colours: the names of the single forecasts; a path's place in it decides its colour.
        name: prefix of the ids inside the drawing, unique on the page.
    """
    with canvas(350, 262) as (figure, finish):
        axes = figure.subplots()
        scale = scale_of([curve])
        _draw_curve(axes, curve, scale, colours)
        axes.set_title(_title(curve), pad=18)
        axes.set_xlabel("optimiser step" + (" (both axes logarithmic)" if scale.log else ""))
        if not curve.claimed_to_the_end:
            known = curve.horizon is not None
            note = f"not claimed beyond step {setting_text(curve.horizon or 0)}" if known else "horizon not measured"
            axes.annotate(note, (1, 1.02), xycoords="axes fraction", ha="right", va="bottom", size=10, color=svg.MUTED)
        return finish(
            name, f"{curve.name} forecast over optimiser steps; the numbers are in the table of the forecast."
        )


def draw_small(curves: Sequence[Curve | None], scales: Sequence[Scale], colours: Sequence[str], name: str) -> Markup:
    """Draw several quantities of one assessment under each other, on scales shared with its neighbours."""
    with canvas(250, 130 * len(curves)) as (figure, finish):
        panels = figure.subplots(len(curves), squeeze=False)[:, 0]
        for axes, curve, scale in zip(panels, curves, scales, strict=True):
            if curve is None:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=svg.MUTED)
                continue
            _draw_curve(axes, curve, scale, colours, notes=False)
            axes.set_title(_title(curve), size=10.5)
        return finish(name, "Small forecasts on common scales; the numbers are in the comparison table.")


def draw_spectrum(eigenvalues: Sequence[float], gaps: Sequence[int], name: str) -> Markup:
    """Draw positive eigenvalues on a logarithmic scale; `gaps` holds the places (1 = after the first) of wide gaps."""
    with canvas(530, 250) as (figure, finish):
        axes = figure.subplots()
        places = range(1, len(eigenvalues) + 1)
        bottom, top = min(eigenvalues) / 2, max(eigenvalues) * 2.2
        axes.vlines(places, bottom, eigenvalues, color=svg.VALUE, linewidth=1.2, alpha=0.5)
        axes.plot(places, eigenvalues, "o", color=svg.VALUE, markersize=5)
        for gap in gaps:
            axes.axvline(gap + 0.5, color=svg.BUDGET, linewidth=1, linestyle=(0, (4, 2)))
            ratio = f"×{setting_text(float(f'{eigenvalues[gap - 1] / eigenvalues[gap]:.2g}'))}"
            axes.annotate(ratio, (gap + 0.5, 1.02), xycoords=("data", "axes fraction"), ha="center", color=svg.BUDGET)
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.set_xlim(0.3, len(eigenvalues) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        log_ticks(axes.yaxis, bottom, top)
        axes.grid(axis="y")
        axes.set_title("Eigenvalue, nats per parameter unit squared", pad=20 if gaps else 8)
        axes.set_xlabel("direction, most sensitive first")
        return finish(name, f"Spectrum of {len(eigenvalues)} eigenvalues on a logarithmic scale.")


def draw_overlap(split_half: Sequence[float | None], random: float | None, name: str) -> Markup:
    """Draw the split-half overlap (value, low, high) of the subspace beside the level of a random one."""
    with canvas(530, 110) as (figure, finish):
        axes = figure.subplots()
        value, low, high = split_half
        if value is not None:
            if low is not None and high is not None:
                axes.plot([low, high], [0, 0], color=svg.VALUE, linewidth=7, alpha=0.3, solid_capstyle="round")
            axes.plot([value], [0], "o", color=svg.VALUE, markersize=7)
        if random is not None:
            axes.axvline(random, color=svg.BUDGET, linewidth=1.4, linestyle=(0, (4, 2)))
            right = random < 0.75
            axes.annotate("random", (random, 1), xycoords=("data", "axes fraction"), xytext=(5 if right else -5, -11),
                          textcoords="offset points", ha="left" if right else "right", color=svg.BUDGET)  # fmt: skip
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: setting_text(round(x, 6))))
        axes.set_title("Overlap of two half samples (1: the same directions)")
        return finish(name, "Split-half overlap of the sensitive directions beside the level of random directions.")


def draw_layers(rows: Sequence[tuple[str, Sequence[float | None]]], layers: Sequence[str], name: str) -> Markup:
    """Draw shares as depth of colour, one row per quantity and one column per layer; crossed out: not measured."""
    top = max((share for _, shares in rows for share in shares if share is not None), default=0.0) or 1.0
    with canvas(1080, 62 + 30 * len(rows) + (0 if _short(layers) else 70)) as (figure, finish):
        axes = figure.subplots()
        for row, (_, shares) in enumerate(rows):
            for column, share in enumerate(shares):
                face = "none" if share is None else (*to_rgb(svg.VALUE), share / top)
                edge, hatch = (svg.MUTED, "xxx") if share is None else (svg.GRID, None)
                place = (column + 0.04, row + 0.06)
                axes.add_patch(Rectangle(place, 0.92, 0.88, facecolor=face, linewidth=0.6, edgecolor=edge, hatch=hatch))
        axes.set_xlim(0, len(layers))
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], [label for label, _ in rows])
        shown = range(0, len(layers), max(1, math.ceil(len(layers) / 45)))
        axes.set_xticks([column + 0.5 for column in shown], [_plain(layers[column]) for column in shown])
        axes.tick_params(axis="x", rotation=0 if _short(layers) else 90)
        axes.tick_params(length=0, labelcolor=svg.INK)
        axes.spines[:].set_visible(False)
        return finish(name, "Heat map of shares by layer; the numbers are in the table of layers.")


def _title(curve: Curve) -> str:
    return _plain(f"{curve.name}, {curve.unit}" if curve.unit else curve.name)


def _plain(text: str) -> str:
    """Make any text fit to be measured and drawn: one line, not endless, and without the halves of characters."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= 48 else f"{text[:47]}…"


def _short(layers: Sequence[str]) -> bool:
    return max(map(len, layers), default=0) <= 5


def _draw_curve(axes: Any, curve: Curve, scale: Scale, colours: Sequence[str], notes: bool = True) -> None:
    if scale.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlim(scale.left, scale.right)
    axes.set_ylim(scale.bottom, scale.top)
    _draw_references(axes, curve, scale, notes)
    for path, line in curve.paths.items():
        place = colours.index(path)
        dash = tuple(map(float, svg.DASHES[place % len(svg.DASHES)].split()))
        colour = svg.PATHS[place % len(svg.PATHS)]
        mark = "_" if sum(point is not None for point in line) == 1 else ""
        axes.plot(curve.steps, _gaps(line), mark, color=colour, linewidth=1.1, linestyle=(0, dash), markersize=14)
    low, high = _gaps(curve.low), _gaps(curve.high)
    if scale.log:
        low = [max(bound, scale.bottom / 10) for bound in low]
    axes.fill_between(curve.steps, low, high, color=svg.VALUE, alpha=0.18, linewidth=0)
    if sum(value is not None for value in curve.value) == 1:
        axes.vlines(curve.steps, low, high, color=svg.VALUE, alpha=0.4, linewidth=4)
    size = 3.4 if notes else 2.2
    axes.plot(curve.steps, _gaps(curve.value), "o-", color=svg.VALUE, linewidth=1.9, markersize=size)
    axes.grid(axis="y")
    if scale.log:
        log_ticks(axes.yaxis, scale.bottom, scale.top)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if scale.right / scale.left < 200 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: setting_text(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    else:
        height = scale.top - scale.bottom
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5 if notes else 3, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: setting_text(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: setting_text(0.0 if abs(y) < 1e-6 * height else y)))


def _draw_references(axes: Any, curve: Curve, scale: Scale, notes: bool) -> None:
    """Draw what the curve is read against: the aligned model, the budget and the horizon."""
    if curve.horizon is not None and not curve.claimed_to_the_end:
        axes.axvspan(max(curve.horizon, scale.left), scale.right, color=svg.BEYOND, linewidth=0, zorder=0)
        axes.axvline(curve.horizon, color=svg.MUTED, linewidth=1)
    if curve.anchor is not None:
        axes.axhline(curve.anchor, color=svg.MUTED, linewidth=1, linestyle=(0, (1, 2)))
        falls = next((value for value in reversed(curve.value) if value is not None), 0.0) <= curve.anchor
        falls &= curve.anchor < scale.top - 0.08 * (scale.top - scale.bottom)  # else there is no room above the line
        if notes:
            axes.annotate("aligned model", (1, curve.anchor), xycoords=("axes fraction", "data"), size=10,
                          xytext=(-3, 3 if falls else -3), textcoords="offset points", ha="right",
                          va="bottom" if falls else "top", color=svg.MUTED)  # fmt: skip
    if curve.budget is None:
        return
    within = scale.bottom <= curve.budget <= scale.top
    if within:
        axes.axhline(curve.budget, color=svg.BUDGET, linewidth=1.2, linestyle=(0, (6, 2)))
        value, low, high = curve.crossing
        if value is not None:
            axes.plot([value], [curve.budget], "D", color=svg.BUDGET, markersize=5 if notes else 3.5)
        if low is not None and high is not None:
            axes.plot([low, high], [curve.budget] * 2, color=svg.BUDGET, linewidth=3, alpha=0.5)
    if notes:
        text = f"budget {setting_text(curve.budget)}" + ("" if within else ", off the scale")
        at = (0.0, curve.budget) if within else (0.0, 0.9 if curve.budget > scale.top else 0.01)
        axes.annotate(text, at, xycoords=("axes fraction", "data" if within else "axes fraction"), size=10,
                      xytext=(4, 3), textcoords="offset points", va="bottom", color=svg.BUDGET)  # fmt: skip


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [_NAN if value is None else value for value in values]


def log_ticks(axis: Any, bottom: float, top: float) -> None:
    """Put ticks on powers of ten, on fewer where there are many, and on 1, 2 and 5 where there are hardly any."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    factors = (1, 2, 5) if math.log10(top / bottom) < 2 else (1,)
    ticks = [factor * 10.0**power for power in powers[:: max(1, len(powers) // 6)] for factor in factors]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if bottom <= tick <= top]))
    axis.set_major_formatter(FuncFormatter(lambda y, _: setting_text(y)))
    axis.set_minor_locator(FixedLocator([]))
