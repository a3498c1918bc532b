"""Plots mark horizon and budget, keep runaway paths from flattening the rest, and follow the page's colours."""

import dataclasses
import re

import pytest

from tiltmeter.report import plots, svg
from tiltmeter.report.fields import Curve
from tiltmeter.report.scale import scale_of


@pytest.fixture
def curve():
    return Curve(
        quantity="margin",
        unit="nats",
        places=[0, 1, 2],
        steps=[1.0, 10.0, 40.0],
        value=[4.1, 3.5, 2.0],
        low=[4.0, 3.2, 1.0],
        high=[4.2, 3.8, 3.0],
        paths={"linear": [4.1, 3.6, 2.4], "curved": [4.1, 3.3, -90.0]},
        anchor=4.2,
        horizon=20.0,
        budget=None,
        crossing=(None, None, None),
    )


def drawn(curve):
    return str(plots.draw_forecast(curve, ["linear", "curved"], "p"))


def test_the_horizon_is_marked_unless_it_covers_the_run(curve):
    picture = drawn(curve)
    assert "not claimed beyond step 20" in picture
    assert "var(--beyond)" in picture
    picture = drawn(dataclasses.replace(curve, horizon=40.0))
    assert "not claimed" not in picture
    assert "var(--beyond)" not in picture
    assert "horizon not measured" in drawn(dataclasses.replace(curve, horizon=None))


def test_the_budget_is_marked_where_there_is_one(curve):
    assert "budget" not in drawn(curve)
    assert ">budget 2.5<" in drawn(dataclasses.replace(curve, budget=2.5, crossing=(25.0, 20.0, 31.0)))
    assert ">budget −99, off the scale<" in drawn(dataclasses.replace(curve, budget=-99.0))


def test_a_gap_stays_a_gap(curve):
    picture = drawn(dataclasses.replace(curve, value=[4.1, None, 2.0], low=[None, 3.2, 1.0]))
    assert "nan" not in picture.lower()


def test_every_colour_follows_the_theme(curve):
    pictures = [
        drawn(dataclasses.replace(curve, budget=2.5)),
        plots.draw_small([curve, None], [scale_of([curve])] * 2, ["linear", "curved"], "s"),
        plots.draw_spectrum([3.0, 1.0, 0.1], [2], "e"),
        plots.draw_overlap([0.5, 0.4, 0.6], 0.9, "o"),
        plots.draw_layers([("Share", [0.2, None, 0.8])], ["a", "b", "c"], "l"),
    ]
    for picture in map(str, pictures):
        assert not re.search(r"#[0-9a-fA-F]{6}\b", picture)
        assert "xmlns" not in picture
        assert "<metadata" not in picture
        assert "<text" in picture  # text as text, not as outlines
        assert "font-family: inherit" in picture


def test_names_are_not_read_as_formulas_or_markup():
    picture = str(plots.draw_layers([("Share", [1.0, 2.0])], ["$\\frac{$", "<b>&"], "l"))
    assert "$\\frac{$" in picture
    assert "&lt;b&gt;&amp;" in picture


def test_ids_are_set_apart_by_the_name(curve):
    first, second = (
        re.findall(r'\bid="([^"]+)"', str(plots.draw_forecast(curve, ["linear", "curved"], n))) for n in "ab"
    )
    assert len(first) > 10
    assert not set(first) & set(second)


def test_a_runaway_path_does_not_flatten_the_forecast(curve):
    scale = scale_of([curve])
    assert not scale.log
    assert -5 < scale.bottom < 1.0
    assert 4.2 < scale.top < 6
    wild = dataclasses.replace(curve, low=[4.0, 3.2, -500.0], high=[4.2, 3.8, 500.0])  # beyond the horizon
    assert scale_of([wild]).top < 10


def test_logarithmic_axes_only_where_all_is_positive_and_wide(curve):
    kl = dataclasses.replace(curve, quantity="safety_kl", unit="nats per token", anchor=None, paths={},
                             value=[1e-9, 1e-7, 2e-6], low=[0.0, 5e-8, 1e-6], high=[2e-9, 2e-7, 3e-6])  # fmt: skip
    scale = scale_of([kl])
    assert scale.log
    assert 1e-11 < scale.bottom < 1e-9
    assert scale.top > 3e-6
    assert "both axes logarithmic" in drawn(kl)
    for value in ([0.0, 1e-7, 2e-6], [1e-7, 2e-7, 3e-7]):
        assert not scale_of([dataclasses.replace(kl, value=value)]).log
    assert not scale_of([dataclasses.replace(kl, steps=[0.0, 1.0, 2.0])]).log


def test_shares_are_drawn_from_nothing_to_all(curve):
    scale = scale_of([dataclasses.replace(curve, unit="share", value=[0.9, 0.9, 0.9])])
    assert (scale.bottom, scale.top) == (-0.03, 1.03)


def test_labels_of_a_fragment_are_escaped():
    picture = svg.fragment('<svg viewBox="0 0 2 1"><g id="x"/></svg>', "n", '"><script>')
    assert picture == '<svg viewBox="0 0 2 1" role="img" aria-label="&#34;&gt;&lt;script&gt;"><g id="n-x"/></svg>'
