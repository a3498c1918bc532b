"""The page shows every number with its unit, says why where there is none, and runs or loads nothing."""

import copy
import os
import random
import re

import pytest
from page_reader import Page, shows

from tiltmeter.errors import DataError
from tiltmeter.report import plots, write_page
from tiltmeter.report.page import render_page
from tiltmeter.report.values import WITHHELD

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $x_{1}$ &amp; url(#a) \ud83d"
BAD_WORDS = re.compile(r"\b(nan|NaN|inf|Infinity|None|undefined)\b")


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from leaves(part, (*path, place))
    else:
        yield path, value


def replaced(record, change):
    """A copy of the record with every leaf but schema and reasons replaced by change(path, value)."""
    held = copy.deepcopy(record)
    for path, value in leaves(record):
        if path[0] not in ("schema", "reasons"):
            target = held
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = change(path, value)
    return held


@pytest.fixture
def without_plots(monkeypatch):
    for name in ("draw_forecast", "draw_spectrum", "draw_overlap", "draw_layers", "draw_small"):
        monkeypatch.setattr(plots, name, lambda *args: "(a picture)")


def test_every_number_is_shown_with_its_unit(sample, without_plots):
    page = Page(render_page([sample], "Title"))
    by_key = {row[-1]: row[-2] for row in page.rows() if len(row) == 3}
    numbers = [(path, v) for path, v in leaves(sample) if type(v) in (int, float) and path[0] != "reasons"]
    assert len(numbers) > 250
    for path, value in numbers:
        keys = [".".join(map(str, path[:depth])) for depth in range(len(path), 0, -1)]
        cell = next((by_key[key] for key in keys if key in by_key), None)
        if cell is None:  # curves and layers have tables of their own
            assert path[0] in ("forecast", "layers"), path
            assert any(shows(cell, value) for row in page.rows() for cell in row), path
        else:
            assert shows(cell, value), (path, value, cell)
    for section in ("aic", "baselines"):
        for name, held in sample[section].items():
            if isinstance(held, dict) and held["value"] is not None:
                assert f" {held['unit']}" in by_key[f"{section}.{name}"]
    units = {"model.parameters": "parameters", "tuning.loss": "nats per token", "cost.seconds": "s",
             "cost.peak_memory_gb": "GB", "spectrum.trace": "nats per parameter unit squared",
             "forecast.horizon_steps": "optimiser steps", "forecast.margin.anchor": "nats",
             "aic.projected_gradient.random": "nats per parameter unit"}  # fmt: skip
    for key, unit in units.items():
        assert by_key[key].endswith(f" {unit}"), key
    [forecast] = [table for table in page.tables if "Flow time" in table[0]]
    assert forecast[0][2:] == ["Refusal margin, nats", "Change of the refusal margin, nats",
                               "Safety KL, nats per token", "Refusal rate, share"]  # fmt: skip
    for place, row in enumerate(forecast[1:]):
        for column, quantity in enumerate(("margin", "margin_change", "safety_kl", "refusal_rate"), 2):
            for part in ("value", "low", "high"):
                assert shows(row[column], sample["forecast"][quantity][part][place])


def test_every_text_is_shown(sample, without_plots):
    page = Page(render_page([sample], "A title"))
    for path, value in leaves(sample):
        if isinstance(value, str) and path[0] not in ("schema", "reasons") and path[-1] not in ("kind", "unit"):
            assert " ".join(value.split()) in page.text, path
    assert "Wears the model down" in page.text
    assert "not measured: no harmful demonstrations were given" in page.text
    assert "1 (no prompt)" in page.text


def test_steps_beyond_the_horizon_are_not_claimed(sample, without_plots):
    rows = Page(render_page([sample], "t")).rows()
    marked = {row[0] for row in rows if "(not claimed)" in row[0]}
    assert marked == {"32 (not claimed)", "40 (not claimed)"}
    page = Page(render_page([sample], "t"))
    assert "at step 24, last step claimed; aligned model 4.2, change −1.370 (−1.408 to −1.332)" in page.text
    assert (
        "Steps to the safety KL budget 31 90 % interval 25 to 39 budget 0.05; beyond the horizon, not claimed"
        in page.text
    )


def test_a_budget_that_is_not_used_up_is_no_missing_number(sample, without_plots):
    text = Page(render_page([sample], "t")).text
    assert "Steps to the refusal margin budget — budget 1: not within the recipe" in text
    sample["forecast"]["steps_to_budget"]["margin"]["low"] = 37
    assert "not within the recipe; at the earliest step 37" in Page(render_page([sample], "t")).text
    sample["forecast"]["steps_to_budget"]["safety_kl"]["high"] = None
    assert "budget 31 from step 25; no latest step budget 0.05" in Page(render_page([sample], "t")).text


def test_intervals_carry_the_level_they_were_made_for(sample, without_plots):
    sample["level"] = 0.8
    text = Page(render_page([sample], "t")).text
    assert "80 % interval" in text
    assert "90 %" not in text.replace("directions for 90 %", "").replace("Directions for 90 %", "")


def test_an_interval_without_an_end_says_why(sample, without_plots):
    rows = {row[-1]: row[-2] for row in Page(render_page([sample], "t")).rows() if len(row) == 3}
    assert rows["baselines.random_direction_margin"] == (
        "−0.0021 nats of change, equal displacement; low end not measured: one direction was drawn; "
        "high end not measured: one direction was drawn"
    )
    sample["forecast"]["margin"]["low"][2] = None
    sample["reasons"]["forecast.margin.low.2"] = "three batches only"
    rows = {row[-1]: row[-2] for row in Page(render_page([sample], "t")).rows() if len(row) == 3}
    assert "not measured: three batches only" in rows["forecast.margin.low"]


def test_nothing_hostile_comes_through(sample):
    record = replaced(sample, lambda path, value: HOSTILE if isinstance(value, str) else value)
    record["verdict"]["kind"] = HOSTILE
    record["forecast"]["paths"] = {HOSTILE: record["forecast"]["paths"]["linear"]}
    record["safety"]["skipped"] = {HOSTILE: 2}
    record["versions"] = {HOSTILE: "1", "dotted.key": "2.5.1"}
    record[HOSTILE] = {HOSTILE: 1.5}
    record["reasons"] = {"baselines.gradient_cosine": HOSTILE}
    source = render_page([record, record], HOSTILE)
    page = Page(source)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "image", "foreignobject", "a:script"}
    assert not [name for _, attrs in page.tags for name in attrs if name.lower().startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 40
    assert "2.5.1" in page.text  # a dot inside a key is not a level


def test_nothing_is_loaded_and_everything_referred_to_exists(whole_page):
    source, page = whole_page, Page(whole_page)
    assert "script" not in source.lower()
    assert not re.search(r"https?:|//[a-z]|@import|data:|<image|base64", source)
    assert ("meta", {"http-equiv": "Content-Security-Policy",
                     "content": "default-src 'none'; style-src 'unsafe-inline'"}) in page.tags  # fmt: skip
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    referred = {attrs["href"] for _, attrs in page.tags if "href" in attrs}
    referred |= {attrs["aria-labelledby"].join(("#", "")) for _, attrs in page.tags if "aria-labelledby" in attrs}
    referred |= set(re.findall(r"url\((#[^)]+)\)", source))
    assert len(referred) > 10
    assert referred <= {f"#{name}" for name in ids}
    assert page.open == []


def test_it_can_be_read_without_seeing_it(whole_page):
    page = Page(whole_page)
    assert dict(page.tags)["html"] == {"lang": "en"}
    small = 0
    for tag, attrs in page.tags:
        if tag == "svg":
            small += attrs.get("aria-label", "").startswith("Small forecasts")
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])
        if tag == "th":
            assert attrs["scope"] in ("col", "row", "rowgroup")
    names = [tag for tag, _ in page.tags]
    assert small == 2
    assert names.count("caption") == names.count("table") > 10


def contrast(first, second):
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_told_from_the_ground_in_light_and_dark(sample, without_plots):
    source = render_page([sample], "Title")
    themes = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in source.split(":root")[1:3]]
    assert len(themes[0]) == len(themes[1]) > 20
    for theme in themes:
        for name in ("ink", "muted", "value", "budget"):  # text
            assert contrast(theme[name], theme["surface"]) >= 4.5, name
            assert contrast(theme[name], theme["page"]) >= 4.5, name
        assert contrast(theme["muted"], theme["beyond"]) >= 4.5
        for tone in ("bad", "good", "unsure", "plain"):
            assert contrast(theme[tone], theme[f"{tone}-soft"]) >= 4.5, tone
        for place in range(6):  # lines
            assert contrast(theme[f"path-{place}"], theme["surface"]) >= 3.0, place


def test_the_same_record_gives_the_same_page(sample, whole_page):
    assert render_page([sample, sample], "Title") == whole_page


def test_all_null_says_why_everywhere(sample):
    record = replaced(sample, lambda path, value: None)
    record["reasons"] = {".".join(map(str, path)): f"because {'/'.join(map(str, path))}" for path, _ in leaves(sample)}
    page = Page(render_page([record], "Title"))
    assert not BAD_WORDS.search(page.text)
    for path in ("model/name", "tuning/skipped/x", "verdict/kind", "aic/crossover/value", "forecast/steps/0",
                 "layers/3/sensitivity", "cost/seconds", "seed", "spectrum/eigenvalues/0", "recipe/steps"):  # fmt: skip
        if path != "tuning/skipped/x":
            assert f"not measured: because {path}" in page.text, path


@pytest.mark.parametrize("group", [1, 2, 3])
def test_any_section_may_be_null(sample, group, request):
    sections = [key for key in sample if key not in ("schema", "reasons")]
    drawn = {"forecast", "spectrum", "layers"}
    if group > 1:
        request.getfixturevalue("without_plots")
    chosen = sorted(drawn) if group == 1 else [key for key in sections if key not in drawn][group - 2 :: 2]
    for section in chosen:
        record = {**sample, section: None, "reasons": {section: "lost at sea", **sample["reasons"]}}
        page = Page(render_page([record], "Title"))
        assert "not measured: lost at sea" in page.text, section
        assert not BAD_WORDS.search(page.text), section


@pytest.mark.parametrize("seed", range(3))
def test_any_half_of_the_values_may_be_null(sample, seed):
    chance = random.Random(seed)
    record = replaced(sample, lambda path, value: value if chance.random() < 0.5 else None)
    record["reasons"] = {"forecast": "half of it", "layers": "half of them"}
    source = render_page([record, record] if seed == 0 else [record], "Title")
    assert not BAD_WORDS.search(Page(source).text)
    assert not re.search(r"[\"\s]nan\b", source)


def test_short_small_and_negative_forecasts(sample):
    record = copy.deepcopy(sample)
    record["forecast"] |= {"steps": [1], "flow_time": [1e-9], "paths": {}, "horizon_steps": 0}
    record["forecast"]["margin"] |= {"value": [-3.5], "low": [-4.0], "high": [-3.0], "anchor": -1.0}
    record["forecast"]["margin_change"] |= {"value": [-2.5], "low": [-2.75], "high": [-2.25]}
    record["forecast"]["safety_kl"] |= {"value": [1e-9], "low": [0.9e-9], "high": [1.2e-9]}
    record["forecast"]["refusal_rate"] |= {"value": [0.0], "low": [0.0], "high": [0.0], "anchor": 0.0}
    zero = copy.deepcopy(record)
    zero["forecast"] |= {"steps": [0, 1], "horizon_steps": 1}
    zero["forecast"]["safety_kl"] |= {"value": [0.0, 0.0], "low": [0.0, 0.0], "high": [0.0, 0.0]}
    text = Page(render_page([record, zero], "Title")).text
    assert "−3.50 (−4.00 to −3.00)" in text
    assert "1.00 (0.90 to 1.20) ×10⁻⁹" in text
    assert "−2.50 (−2.75 to −2.25) nats from −1 to −3.50 (−4.00 to −3.00)" in text
    assert "no point was measured within the horizon" in text
    assert not BAD_WORDS.search(text)


@pytest.mark.parametrize("key", sorted(WITHHELD))
def test_prompts_and_generations_are_never_shown(sample, key, without_plots):
    sample["safety"][key] = ["how to SECRET", {"content": "SECRET"}]
    sample[key] = "SECRET"
    source = render_page([sample], "Title")
    assert "SECRET" not in source
    assert "withheld" in source


def test_several_records_are_compared(sample, without_plots):
    other = copy.deepcopy(sample)
    other["tuning"]["name"] = "other-set"
    other["forecast"] |= {"horizon_steps": 40}
    other["verdict"]["kind"] = "cannot_tell"
    page = Page(render_page([sample, other], "Title"))
    header, first, second = page.tables[0]
    assert header == ["Tuning set", "Margin change at the end", "Safety KL at the end", "Refusal rate at the end",
                      "Horizon", "Verdict"]  # fmt: skip
    assert first[0] == "demo:gsm8k"
    assert first[1].startswith("−1.980 (−2.045 to −1.915) nats")
    assert "beyond the horizon: not claimed" in first[1]
    assert first[-1] == "Wears the model down"
    assert second[0] == "other-set"
    assert "not claimed" not in " ".join(second)
    assert second[-2:] == ["step 40", "Cannot tell"]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == ["#a1", "#a2"]
    other["model"]["name"] = "another model"
    other["recipe"]["optimizer"] = "sgd"
    page = Page(render_page([sample, other], "Title"))
    assert page.tables[0][0][:3] == ["Tuning set", "Model", "Recipe"]
    assert "other-set another model lora, sgd" in page.text  # over the small plot


def test_the_file_is_written_whole_or_not_at_all(sample, tmp_path, without_plots, monkeypatch):
    path = tmp_path / "page.html"
    write_page([sample], path, "First")
    assert "<h1>First</h1>" in path.read_text(encoding="utf-8")
    with pytest.raises(DataError, match="at least one"):
        write_page([], path, "t")
    with pytest.raises(DataError, match="tiltmeter/audit/1"):
        write_page([{"schema": "tiltmeter/audit/1"}], path, "t")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page([sample], path, "Second")
    assert "<h1>First</h1>" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["page.html"]
