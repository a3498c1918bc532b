"""The page of the guard comparison: means by hand, one seed said so, refusals shown."""

from __future__ import annotations

import pytest
from page_reader import Page, numbers_in

from tiltmeter.errors import DataError
from tiltmeter.report.guards_page import guard_name, mean_over_seeds, render_guards_page, with_strength


def run(guard, strength, seed, kl, loss):
    """SYNTHETIC numbers."""
    return {"plan": "tiny", "guard": guard, "strength": strength, "set": "demo:a<b", "regime": "full", "seed": seed,
            "task_loss": loss, "heldout_kl": kl, "margin": 1.5, "refusal_rate": None, "over_refusal_rate": 0.0,
            "step_time_ratio": 1.25, "extra_memory_gb": 0.5}  # fmt: skip


HELD = {
    "runs": [run("none", 0.0, 0, 2.0, 1.0), run("budget", 0.05, 0, 0.02, 1.25), run("budget", 0.05, 1, 0.04, 1.75),
             {"guard": "lox", "set": "s", "regime": "full", "refused": "needs a <base>"}],
    "plans": {"tiny": {"model": "demo:tiny"}},
}  # fmt: skip


def test_means_and_ends_over_seeds():
    two = HELD["runs"][1:3]
    value, low, high = mean_over_seeds(two, "heldout_kl")
    assert (value, low, high) == (pytest.approx(0.03), 0.02, 0.04)
    assert mean_over_seeds(two[:1], "heldout_kl") == (0.02, None, None)
    assert mean_over_seeds(two, "refusal_rate") == (None, None, None)


def test_the_page_shows_every_figure_and_says_where_one_seed_is_all():
    source = render_guards_page(HELD, "Guards")
    page = Page(source)
    assert render_guards_page(HELD, "Guards") == source
    header = page.rows()[0]
    rows = {row[0]: row for row in page.rows()}
    free, ours = rows["none 0"], rows["budget 0.05, whole answers"]
    assert free[1] == "1"
    assert ours[1] == "2"
    loss, kl = header.index("Task loss, nats per token"), header.index("Held-out safety KL, nats per token")
    assert numbers_in(ours[loss])[0][0] == pytest.approx(1.5)
    assert [value for value, _ in numbers_in(ours[kl])] == pytest.approx([0.03, 0.02, 0.04])
    assert len(numbers_in(free[kl])) == 1
    assert ours[header.index("Refusal rate")].startswith("not measured")
    assert "1 of the points rest on one seed" in page.text
    assert "needs a <base>" in page.text
    assert "unguarded" in page.text
    assert not [1 for tag, given in page.tags if tag == "script" or "http" in str(given.get("href", ""))]


def test_guards_are_named_with_what_they_saw_of_answers():
    def named(guard, **more):
        return guard_name({**run(guard, 0.05, 0, 1.0, 1.0), **more})

    assert [named(guard) for guard in ("none", "ema", "budget")] == ["none", "ema", "budget, whole answers"]
    assert named("none", answer_tokens=10, opening_tokens=0) == "none"
    assert named("budget", answer_tokens=24, opening_tokens=3) == "budget, first 3 too"
    assert named("budget", answer_tokens=6, opening_tokens=0) == "budget, 6 tokens"
    assert named("replay", answer_tokens=6, opening_tokens=2) == "replay, 6 tokens, first 2 too"
    assert with_strength("budget, 6 tokens, first 2 too", "0.05") == "budget 0.05, 6 tokens, first 2 too"


def test_a_comparison_without_runs_is_refused():
    with pytest.raises(DataError, match="at least one finished run"):
        render_guards_page({"runs": []}, "Guards")
