"""Draw an audit: what scaling the change does, what each layer gives back, and how far hidden states drift."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tiltmeter.report import svg
from tiltmeter.report.plots import canvas

_NAN = float("nan")
Points = Sequence[float | None]


def draw_scaling(title: str, alpha: Sequence[float], value: Points, low: Points, high: Points, name: str) -> Markup:
    """Draw a quantity from the base (0) over the tuned model (1) and beyond; the band is the interval."""
    with canvas(350, 262) as (figure, finish):
        axes = figure.subplots()
        known = [a is not None and b is not None for a, b in zip(low, high, strict=True)]
        axes.fill_between(alpha, _gaps(low), _gaps(high), where=known, color=svg.VALUE, alpha=0.18, linewidth=0)
        axes.plot(alpha, _gaps(value), "o-", color=svg.VALUE, linewidth=1.9, markersize=3.4)
        axes.axvline(1.0, color=svg.MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.grid(axis="y")
        axes.set_title(title)
        axes.set_xlabel("base 0, tuned 1")
        return finish(name, f"{title} between the base and the tuned model; the numbers are in the scaling table.")


def draw_bars(title: str, layers: Sequence[str], values: Points, name: str) -> Markup:
    """Draw one bar a layer; a gap is a layer that was not measured."""
    with canvas(350, 262) as (figure, finish):
        axes = figure.subplots()
        places = range(len(layers))
        axes.bar(places, _gaps(values), color=svg.VALUE, width=0.8)
        axes.axhline(0, color=svg.MUTED, linewidth=1)
        shown = range(0, len(layers), max(1, len(layers) // 12))
        axes.set_xticks(list(shown), [layers[place] for place in shown])
        axes.tick_params(axis="x", rotation=90)
        axes.grid(axis="y")
        axes.set_title(title)
        return finish(name, f"{title}, by layer; the numbers are in the table of layers.")


def draw_depth(title: str, lines: Sequence[tuple[str, Points]], name: str) -> Markup:
    """Draw quantities over depth, from the embeddings (0) to the last layer."""
    with canvas(350, 262) as (figure, finish):
        axes = figure.subplots()
        for (label, values), colour, dash in zip(lines, (svg.VALUE, svg.PATHS[0]), ("-", (0, (5, 2))), strict=False):
            axes.plot(range(len(values)), _gaps(values), color=colour, linewidth=1.8, linestyle=dash, label=label)
        axes.legend(frameon=False, labelcolor=svg.INK)
        axes.grid(axis="y")
        axes.set_title(title)
        axes.set_xlabel("layer (0: embeddings)")
        return finish(name, f"{title} by depth; the numbers are in the list of every value.")


def _gaps(values: Points) -> list[float]:
    return [_NAN if value is None else value for value in values]
