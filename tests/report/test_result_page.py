"""The page of evaluations and audits shows every number, says why where there is none, and loads nothing."""

import copy
import json
from pathlib import Path

import pytest
from page_reader import Page, shows

from tiltmeter.errors import DataError
from tiltmeter.report.result_page import render_result_page

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> &amp; url(#a)"
SAMPLES = {name: json.loads((Path(__file__).parent / f"sample_{name}.json").read_text(encoding="utf-8"))
           for name in ("audit", "evaluation")}  # fmt: skip


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from leaves(part, (*path, place))
    else:
        yield path, value


@pytest.fixture(params=SAMPLES)
def record(request):
    return copy.deepcopy(SAMPLES[request.param])


def test_every_number_is_shown(record):
    page = Page(render_result_page([record], "Title"))
    by_key = {row[-1]: row[-2] for row in page.rows() if len(row) == 3}
    cells = [cell for row in page.rows() for cell in row]
    numbers = [(path, v) for path, v in leaves(record) if type(v) in (int, float) and path[0] != "reasons"]
    assert len(numbers) > 60
    for path, value in numbers:
        if path[0] == "layers" and (path[2] == "parameters" or path[-1] in {"null_mean", "quantile", "directions"}):
            continue  # with the whole model's in the record; the table shows score and z
        keys = [".".join(map(str, path[:depth])) for depth in range(len(path), 0, -1)]
        cell = next((by_key[key] for key in keys if key in by_key), None)
        if cell is None:
            assert path[0] == "layers", path
            assert path[-1] == "parameters" or any(shows(cell, value) for cell in cells), path
        else:
            assert shows(cell, value), (path, value, cell)


def test_the_verdict_and_the_reasons_are_in_words(record):
    text = Page(render_result_page([record], "A title")).text
    assert " ".join(record["verdict"]["text"].split()) in text
    assert "not measured: " in text
    assert not {"nan", "None", "inf"} & set(text.split())


def test_nothing_hostile_comes_through_and_nothing_is_loaded(record):
    for path, value in list(leaves(record)):
        if isinstance(value, str) and path[0] not in ("schema", "reasons") and path[-1] != "unit":
            target = record
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = HOSTILE
    source = render_result_page([record], HOSTILE)
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "embed", "image"}
    assert not [name for _, attrs in page.tags for name in attrs if name.lower().startswith("on")]
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "https:" not in render_result_page([copy.deepcopy(SAMPLES["audit"])], "t")


def test_several_results_and_wrong_ones(record):
    page = Page(render_result_page([SAMPLES["audit"], SAMPLES["evaluation"]], "Both"))
    assert SAMPLES["audit"]["tuned"]["name"] in page.text
    with pytest.raises(DataError, match="at least one"):
        render_result_page([], "t")
    with pytest.raises(DataError, match="assessment"):
        render_result_page([{"schema": "tiltmeter/assessment/1"}], "t")
    assert render_result_page([record], "t") == render_result_page([record], "t")
