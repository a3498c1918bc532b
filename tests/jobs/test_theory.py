"""`run_theory`: every claim holds, the record is whole, and a claim that is wrong is said to be wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tiltmeter.jobs.theory import SCHEMA, TheoryCheck, run_theory
from tiltmeter.jobs.theory_claim import Claim, each, limit
from tiltmeter.store import check_values


@pytest.fixture(scope="module")
def check():
    return run_theory(seed=0)


def claim(**changed):
    base = Claim("a", "b", "c", "d", (1.0, 2.0), (10.0, 0.0), (10.0, 0.0), 1e-3)
    return replace(base, **changed)


def test_every_claim_holds(check):
    assert [c.line() for c in check.claims if not c.holds] == []
    assert check.holds
    assert len(check.claims) >= 21


def test_ids_are_distinct_and_nearly_every_claim_is_tried_at_three_scales(check):
    assert len({c.id for c in check.claims}) == len(check.claims)
    assert [c.id for c in check.claims if len(set(c.scales)) < 3] == ["projection-adamw"]


def test_claims_with_other_random_systems():
    assert [c.line() for c in run_theory(seed=1).claims if not c.holds] == []


def test_the_documentation_derives_exactly_the_claims_that_are_tried(check):
    text = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    ids = {c.id for c in check.claims}
    assert [i for i in sorted(ids) if f"`{i}`" not in text] == []


def test_record_is_what_the_store_takes(check):
    record = check.record()
    check_values(record)
    assert record["schema"] == SCHEMA
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record["claims"][0]) >= {
        "id",
        "statement",
        "source",
        "system",
        "expected",
        "found",
        "tolerance",
        "holds",
    }


def test_lines_name_every_claim_and_count_them(check):
    lines = check.lines()
    assert len(lines) == len(check.claims) + 1
    assert all(line.startswith(c.id) for line, c in zip(lines, check.claims, strict=False))
    assert lines[-1] == f"{len(check.claims)} of {len(check.claims)} claims hold"


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"found": (10.009, 0.0)}, True),
        ({"found": (10.011, 0.0)}, False),
        ({"found": (10.0, 9e-4)}, True),
        ({"found": (10.0, 2e-3)}, False),
        ({"found": (10.0, float("nan"))}, False),
        ({"found": (float("nan"), 0.0), "relation": "<="}, False),
        ({"found": (10.0,)}, False),
        ({"found": (3.0, -1.0), "relation": "<="}, True),
        ({"found": (3.0, -1.0), "relation": ">="}, False),
        ({"found": (30.0, 1.0), "relation": ">="}, True),
        ({"found": (30.0, 1.0), "relation": "<="}, False),
    ],
)
def test_when_a_claim_holds(changed, holds):
    assert claim(**changed).holds is holds


def test_a_failure_shows_in_line_and_record():
    check = TheoryCheck(0, (claim(), claim(id="bad", found=(10.0, float("nan")))))
    assert not check.holds
    assert "FAILS" in check.lines()[1]
    assert check.lines()[-1] == "1 of 2 claims hold"
    record = check.record()
    check_values(record)
    assert record["claims"][1]["found"] == [10.0, None]


def test_limit_removes_two_orders():
    assert limit(lambda h: 3.0 + 5 * h - 7 * h**2, 0.5) == pytest.approx(3.0, abs=1e-12)


def test_each_keeps_scales_in_order():
    assert each(lambda s: (s, 2 * s), (1.0, 3.0)) == {"scales": (1.0, 3.0), "expected": (1.0, 3.0), "found": (2.0, 6.0)}
