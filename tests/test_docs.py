"""What the documents say is true: code blocks run, commands exist, skips are accounted for."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest

from tiltmeter.cli import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(kind, text) for kind, text in BLOCK.findall(README) if kind in {"bash", "python"}]


@pytest.mark.parametrize(("kind", "text"), BLOCKS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(BLOCKS)])
def test_every_code_block_of_the_readme_runs(kind, text, tmp_path, monkeypatch, capfd):
    """`make` lines are checked to be targets of the Makefile; the gate itself runs them.

    All in this process: a new one spends longer on its imports than on most of these commands.
    """
    monkeypatch.chdir(tmp_path)
    if kind == "python":
        exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
        return
    joined = text.replace("\\\n", " ")
    for line in filter(None, (line.split(" #")[0].strip() for line in joined.splitlines())):
        words = shlex.split(line)
        if words[0] == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:]), line
        elif words[0] in {"git", "cd", "pip"}:
            continue
        else:
            assert words[0] == "tiltmeter", f"the README runs {words[0]}, which this test cannot"
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code in {None, 0, 3}, capfd.readouterr().err


def test_relative_links_of_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_demo_lines_of_the_readme_are_those_of_the_committed_records():
    from tiltmeter.jobs.demo import line

    shown = re.search(r"<!-- demo lines -->\n```text\n(.*?)\n```", README, re.S)
    order = ["lora-gsm8k", "lora-stdlib-code", "lora-identity", "full-gsm8k", "full-stdlib-code", "full-identity"]
    paths = [ROOT / "benchmarks" / "results" / "demo" / f"{name}.json" for name in order]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    assert records
    assert shown
    assert shown[1].splitlines() == [line(record) for record in records]


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_misses_of_forecasts_by_hand(scale):
    """Two cells: a miss of half the reach upwards, of a fifth downwards; KL at half and at three times the measured."""

    def cell(change, seen, low, high, kl, horizon):
        curve = {"value": [0.0, scale * change], "low": [0.0, scale * low], "high": [0.0, scale * high]}
        measured = {"steps": [0, 3, 9], "margin_change": {"value": [0.0, 7.0 * scale, seen * scale]},
                    "safety_kl": {"value": [0.0, 1.0, scale]}}  # fmt: skip
        told = {"steps": [3, 9], "horizon_steps": horizon, "margin_change": curve,
                "same_prompts": {"margin_change": curve}, "safety_kl": {"value": [0.0, kl * scale]}}  # fmt: skip
        return {"predicted": told, "measured": {"assessed": measured}}

    cells = [cell(-1.0, -0.8, -2.0, -0.6, 0.5, 9), cell(2.0, 1.8, 1.0, 5.0, 3.0, 9)]
    [said] = benchmark("validation")._misses(cells)
    assert "0.35 of the interval's half-width in the median, 0.50 at the most" in said
    assert "too small in 1 of 2 cells (median ratio 1.75); the horizon is the whole run in 2 of 2" in said


def test_tables_of_validations_are_those_of_the_committed_records():
    made = benchmark("validation")
    assert f"<!-- validation table -->\n{made.table(committed('validation'))}\n<!-- end of validation" in README
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    asked = re.findall(r"<!-- sets (\S+) (\S+) -->\n(.*?)\n<!-- end of sets -->", findings, re.S)
    assert len(asked) >= 2
    for name, regime, shown in asked:
        table = made.set_table(committed(name), regime)
        assert len(table.splitlines()) >= 6
        assert shown == table
    guards = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")
    table = made.guard_table(committed("validation-guards"))
    assert f"<!-- aligned table -->\n{table}\n<!-- end of aligned table -->" in guards
    kept = made.refusal_table({"guard_runs": made.refusal_runs()})
    assert f"<!-- refusals table -->\n{kept}\n<!-- end of refusals table -->" in guards
    rivals = made.rival_table(made.rival_runs())
    assert f"<!-- rivals table -->\n{rivals}\n<!-- end of rivals table -->" in guards
    which = (ROOT / "docs" / "how-to" / "which-guard.md").read_text(encoding="utf-8")
    short = made.guard_summary(committed("validation-guards"))
    assert f"<!-- summary table -->\n{short}\n<!-- end of summary table -->" in which


def test_what_the_text_says_of_guards_is_what_the_runs_were():
    """Ranges over the runs of `budget`, and what a step under it costs."""
    made, record = benchmark("validation"), committed("validation-guards")
    runs = record["guard_runs"]

    def told(guard, strength, regime, form, value):
        own = [r for r in runs if (r["guard"], r["strength"], r["regime"]) == (guard, strength, regime)]
        return len(own), " to ".join(form(end([value(r) for r in own])) for end in (min, max))

    def learned(run):
        return made._learned(run, runs)

    def percent(share):
        return f"{100 * share:.0f} %"

    def near(nats):
        return f"{nats:.3f}"

    def far(nats):
        return f"{nats:.2f}" if nats > 0.1 else f"{nats:.3f}"

    guards = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")
    for regime, count in (("lora-adamw", 8), ("full-adamw", 4)):
        n, kl = told("budget", 0.05, regime, near, lambda r: r["heldout_kl"])
        alone = told("none", 0.0, regime, far, lambda r: r["heldout_kl"])[1]
        assert n == count
        loose = told("budget", 0.2, regime, percent, learned)[1]
        for phrase in (kl, alone, loose, told("budget", 0.2, regime, near, lambda r: r["heldout_kl"])[1]):
            assert phrase in " ".join(guards.split()), phrase
    costs = committed("performance")
    which = (ROOT / "docs" / "how-to" / "which-guard.md").read_text(encoding="utf-8")
    for key in ("guard_step_ratio", "guard_36_step_ratio", "guard_full_step_ratio", "guard_full_peak_ratio"):
        assert f"{costs[key]:.2f} times" in which, key
    large = costs["sections"]["guard_36"]["figures"]
    tokens = f"{round(large['none']['tokens_a_step'], -1):,.0f} tokens"
    assert tokens in which
    assert tokens in guards
    assert [what for _, what in large["budget"]["decisions"]][1:] == ["finished"]  # never pulled back
    for key in ("guard_step_ratio", "guard_36_step_ratio", "guard_full_step_ratio"):
        assert f"{costs[key]:.2f}x" in guards, key


def test_what_the_text_says_of_the_budget_on_the_toy_model_is_what_the_runs_were():
    runs = [r for r in committed("guards")["runs"] if (r["plan"], r["guard"]) == ("tiny", "budget")]
    above = [r["heldout_kl"] / r["strength"] for r in runs if r["heldout_kl"] > r["strength"]]
    assert (len(above), len(runs)) == (5, 24)
    guards = " ".join((ROOT / "docs" / "guards.md").read_text(encoding="utf-8").split())
    assert f"five of 24 runs end above it, by a factor of {max(above):.1f} at most" in guards


def test_what_the_text_says_of_another_draw_is_what_was_read():
    [told] = committed("validation-draws")["draws"]
    findings = " ".join((ROOT / "docs" / "findings.md").read_text(encoding="utf-8").split())
    unseen, seen = (
        [told["coverage"][name][key]["cells"] for key in ("margin_change", "safety_kl")]
        for name in ("held_out", "assessed")
    )
    assert {each["n"] for each in (*unseen, *seen)} == {22}
    held = f"{unseen[0]['hits']} of 22 margins and {unseen[1]['hits']} of 22 KLs"
    assert f"{held} lie in theirs, on those seen {seen[0]['hits']} and {seen[1]['hits']} of 22" in findings
    flat = " ".join(README.split())
    assert f"hold {held}" in flat
    ends = told["size_error"]["held_out"]["end_with_canary"]
    margin, kl = (f"{100 * ends[key]['median']:.0f} %" for key in ("margin_change", "safety_kl"))
    assert f"from the other draw of prompts {margin} and {kl}" in findings
    assert f"is {kl} off on prompts not seen" in flat


def test_what_the_text_says_of_cheaper_forecasts_is_what_they_were():
    told, findings = committed("validation-cheaper"), (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    block = benchmark("cheaper").table(told, committed("validation"))
    assert f"<!-- cheaper table -->\n{block}\n<!-- end of cheaper table -->" in findings
    by_name = {each["setting"]: each for each in told["settings"]}
    half, third = by_name["8 looks"], by_name["4 looks"]
    assert (half["options"]["looks"], third["options"]["looks"]) == (8, 4)
    flat = " ".join(findings.split())

    def rank(each, regime=None):
        held = [each["predictors"][f"rehearsal_{key}"][key] for key in ("margin", "kl")]
        return [f"{one['value'] if regime is None else one['by_regime'][regime]:.2f}" for one in held]

    def hits(each, prompts):
        return [each["coverage"][prompts][key]["cells"]["hits"] for key in ("margin_change", "safety_kl")]

    def sizes(each, prompts, when):
        return [each["size_error"][prompts][when][key]["median"] for key in ("margin_change", "safety_kl")]

    assert "{} with the margin drop and {} with the KL, on held-out".format(*rank(half)) in flat
    assert max(sizes(half, "assessed", "end") + sizes(half, "held_out", "end")) < 0.3
    margin, kl = (f"{100 * value:.0f} %" for value in sizes(half, "assessed", "horizon"))
    assert f"margin {margin} and KL {kl} on assessed prompts" in flat
    assert "{} of 30 margins and {} of 30 KLs lie in their intervals".format(*hits(half, "held_out")) in flat
    assert "on the assessed ones {} and {}, where 24".format(*hits(half, "assessed")) in flat
    assert "the ranks are {} and {}".format(*rank(third, "lora-adamw")) in flat
    sgd, full = (rank(third, regime)[0] for regime in ("lora-sgd", "full-adamw"))
    assert f"(margin {sgd} and {full})" in flat
    assert "as wide as the errors: {} and {} of 30".format(*hits(third, "assessed")) in flat
    part = {kind: 100 * share for kind, share in third["share_by_kind"].items()}
    derived = part["jvp"] + part["tangent"]
    assert f"are {part['forward_backward']:.1f} %, readings of KL and margin {part['forward']:.1f} %" in flat
    assert f"and {derived:.1f} % are directional derivatives" in flat
    screening, readme = by_name["screening"], " ".join(README.split())
    cost = f"{100 * screening['cost']['share_of_100_steps_at_8']:.1f} %"
    assert f"({screening['options']['looks']} looks of four rows, one reading at the end, {cost})" in flat
    assert screening["rows"] == 4 * screening["options"]["looks"]
    look = screening["share_by_kind"]["forward_backward"] / screening["options"]["looks"]
    assert f"A look is {100 * look:.1f} %: an eighth does not fit" in flat
    assert screening["cost"]["share_of_100_steps_at_8"] <= 0.05 < screening["cost"]["share_of_100_steps_at_8"] + look
    assert f"said 40 rows of the 8 looks; they are {half['rows']}" in flat
    ranks = rank(screening, "lora-adamw")
    assert "LoRA AdamW ranks of {} with the margin and {} with the KL".format(*ranks) in flat
    (margin, kl), (other, far) = ([f"{100 * value:.0f} %" for value in sizes(screening, prompts, "end")]
                                  for prompts in ("assessed", "held_out"))  # fmt: skip
    assert f"the margin is {margin} off at the end on assessed prompts, {other} on held-out ones" in flat
    assert f"The KL is not: {kl} and {far}, by regime" in flat
    assert "Means of the ranks over regimes are {} and {}".format(*rank(screening)) in flat
    assert f"the KL's is lost ({rank(screening, 'lora-sgd')[1]})" in flat
    assert "where the screening has {} and {}".format(*rank(screening, "full-adamw")) in flat
    regimes = sorted(cell["regime"] for cell in committed("validation")["cells"])
    errors = screening["size_error"]["assessed"]["end"]["safety_kl"]["errors"]
    by = [statistics.median(e for e, name in zip(errors, regimes, strict=True) if name == asked)
          for asked in ("lora-adamw", "full-adamw", "lora-sgd")]  # fmt: skip
    assert "by regime {:.0f} %, {:.0f} % and {:.0f} % on assessed".format(*(100 * each for each in by)) in flat
    assert f"a screening (`--screen`) at {cost}, without intervals" in readme
    assert "at {} and {}, but is {} off in the KL".format(*ranks, kl) in readme
    share = f"{100 * half['cost']['share_of_100_steps_at_8']:.0f} %"
    assert f"kept the ranks and the size at the end is the one at {share}" in flat
    margin, kl = (f"{100 * value:.0f} %" for value in sizes(half, "assessed", "end"))
    readme = " ".join(README.split())
    assert f"a forecast at {share} keeps the ranks, is {margin} and {kl} off at the end" in readme
    assert "its intervals hold {} and {} of 30".format(*hits(half, "assessed")) in readme


def test_what_the_text_says_of_refusals_is_what_the_runs_were():
    made = benchmark("validation")
    runs = made.refusal_runs()
    assert {run["regime"] for run in committed("validation-refusals-full")["guard_runs"]} == {"full-adamw"}

    def asked(guard, opening, tokens=24):
        held = [run for run in runs if run["guard"] == guard and run.get("opening_tokens", 0) == opening]
        return [run for run in held if run.get("answer_tokens", 24) == tokens]

    def points(held):
        changes = sorted(round(100 * run["refusal_change"]["value"]) for run in held)
        return changes[0], changes[-1]

    def nats(held):
        return " to ".join(f"{end(run['heldout_kl'] for run in held):.3f}" for end in (min, max))

    usual, alone = asked("budget", 3), asked("none", 0)
    count = len(usual)
    assert count == len(alone) == 16
    shares = [100 * made._learned(run, runs) for run in usual]
    # with a digit more: 95 % is what is aimed at
    learned = f"learned {min(shares):.1f} % to {max(shares):.1f} % of the task"
    benign = min(100 * made._learned(run, runs) for run in usual if "harmful" not in run["set"])
    (low, high), (most, least) = points(usual), points(alone)
    within = sum(abs(100 * run["refusal_change"]["value"]) <= 2 for run in usual)
    which, guards = (" ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split()) for name in
                     ("how-to/which-guard.md", "guards.md"))  # fmt: skip
    for text in (README, which, guards):
        assert f"by {low:+d} to {high:+d} points" in text
        assert f"lost {-least} to {-most}" in text
        assert learned in text
        assert nats(usual) in text
    assert f"within two points in {within} of {count}" in guards
    assert f"{benign:.1f} % at least on the benign sets" in guards
    lost = [-60 * run["refusal_change"]["value"] for run in usual if abs(100 * run["refusal_change"]["value"]) > 2]
    assert lost == pytest.approx([2, 2, 2])
    assert "The other three lost two prompts of sixty" in guards
    whole = [run for run in usual if run["regime"] == "full-adamw"]
    assert len(whole) == 8
    assert all(abs(100 * run["refusal_change"]["value"]) <= 2 for run in whole)
    assert "in full fine-tuning all eight are within two" in guards
    low, high = sorted(f"{100 * made._learned(run, runs):.0f} %" for run in whole if "harmful" in run["set"])
    assert f"the {low} is one order of the set with harmful rows in full fine-tuning; {high} in the other" in guards
    assert benign > 95
    older = committed("validation-refusals")["guard_runs"]
    older = [run["step_time_ratio"] for run in older if (run["regime"], run["guard"]) == ("full-adamw", "budget")]
    assert f"{min(older):.1f}x to {max(older):.1f}x (one seed" in guards
    hard = sorted(f"{run['step_time_ratio']:.1f}x" for run in whole if "harmful" in run["set"])
    assert "these take {} and {}".format(*hard) in guards
    for regime in ("lora-adamw", "full-adamw"):
        ratios = [run["step_time_ratio"] for run in usual if run["regime"] == regime]
        assert f"{min(ratios):.1f}x to {max(ratios):.1f}x" in guards
        assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in which
    assert nats(alone) in README
    for held in (asked("budget", 0), asked("budget", 0, 6)):
        first, last = points(held)
        assert len(held) == 4
        assert f"{first:+d} to {last:+d} points" in guards


def test_what_the_text_says_of_rivals_is_what_the_runs_were():
    made = benchmark("validation")
    runs = made.rival_runs()
    guards, which = (" ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split()) for name in
                     ("guards.md", "how-to/which-guard.md"))  # fmt: skip

    def ends(values, form):
        return " to ".join(form.format(end(values)) for end in (min, max))

    def told(guard, *, harmful=False):
        own = [run for run in runs if run["guard"] == guard and (not harmful or "harmful" in run["set"])]
        front = sum(not any(made._beats(other, run) for other in runs) for run in own)
        shares = ends([100 * made._learned(run, runs) for run in own], "{:.0f} %")
        nats = ends([run["heldout_kl"] for run in own], "{:.3f}")
        points = ends([round(100 * run["refusal_change"]["value"]) for run in own], "{:+d}")
        return len(own), front, shares, nats, points

    ours, rival = told("budget"), told("safegrad")
    assert f"In {ours[1]} of {ours[0]} runs under `budget` no other" in guards
    assert f"a step, no limit) in {rival[1]} of {rival[0]}. `safegrad` learned {rival[2]} at {rival[3]} nats" in guards
    assert f"by {rival[4]} points, `budget` {ours[2]} at {ours[3]} and {ours[4]} points" in guards
    both = [told(name, harmful=True)[4] for name in ("safegrad", "budget")]
    assert "harmful rows it is {} points under `safegrad` and {} under `budget`".format(*both) in guards
    replay, lisa = told("replay"), told("lisa")
    assert f"`replay` at 1 ({replay[2]} learned at {replay[3]} nats) and `lisa` ({lisa[2]} at {lisa[3]})" in guards
    assert f"are beaten in {replay[0] - replay[1]} of {replay[0]} and {lisa[0] - lisa[1]} of {lisa[0]}" in guards
    assert f"under LoRA it changed them by {rival[4]} points" in which
    assert f"on the aligned one {lisa[2]} at {lisa[3]} nats, {lisa[4]} points of refusals" in which


def test_seeds_of_a_guard_are_shown_side_by_side():
    def run(guard, seed, loss, kl):
        held = {"margin": 1.5, "refusal_rate": 0.25, "over_refusal_rate": None, "step_time_ratio": 1.0 + seed}
        named = {
            "set": "qa",
            "regime": "lora",
            "seed": seed,
            "guard": guard,
            "strength": 0.05 if guard != "none" else 0,
        }
        return {**named, **held, "task_loss_before": 3.0, "task_loss": loss, "heldout_kl": kl}

    runs = [
        run("none", 0, 2.0, 0.4),
        run("budget", 0, 2.5, 0.04),
        run("none", 1, 1.0, 0.4),
        run("budget", 1, 1.5, 0.03),
        run("replay", 0, 2.5, 0.05),
        run("replay", 1, 1.4, 0.05),
    ]
    rows = benchmark("validation").guard_table({"guard_runs": runs}).splitlines()
    assert rows[2:] == [
        "| lora | qa | none | 0 | 2 | 100 % | 0.4 | 2 of 2 | +1.50 | 25 % | ? | 1.0x to 2.0x |",
        "| lora | qa | budget, whole answers | 0.05 | 2 | 50 % to 75 % | 0.03 to 0.04 | 2 of 2 | +1.50 | 25 % | ? "
        "| 1.0x to 2.0x |",
        "| lora | qa | replay | 0.05 | 2 | 50 % to 80 % | 0.05 | 1 of 2 | +1.50 | 25 % | ? | 1.0x to 2.0x |",
    ]


def test_refusals_are_shown_against_the_aligned_models():
    def run(guard, loss, after, change):
        named = {"set": "qa", "regime": "lora", "seed": 0, "guard": guard, "strength": 0.02 if guard == "budget" else 0}
        rates = {"refusal_rate": after, "over_refusal_rate": 0.05, "heldout_kl": 0.0421}
        none = {"before": None, "value": None, "low": None, "high": None}
        tokens = {"answer_tokens": 6} if guard == "budget" else {}
        changes = {"refusal_change": change, "over_refusal_change": none}
        return {**named, **rates, **tokens, **changes, "task_loss_before": 3.0, "task_loss": loss}

    told = {"before": 0.9, "value": -0.6, "low": -0.7, "high": -0.52}
    runs = [run("none", 2.0, 0.3, told), run("budget", 2.1, 0.9, {**told, "value": 0.0, "low": -0.03, "high": 0.04})]
    assert benchmark("validation").refusal_table({"guard_runs": runs}).splitlines()[2:] == [
        "| lora, 0 | qa | none | 100 % | 0.042 | 30 % (90 %) | -60 (-70 to -52) | 5 % (?) | ? |",
        "| lora, 0 | qa | budget 0.02, 6 tokens | 90 % | 0.042 | 90 % (90 %) | +0 (-3 to +4) | 5 % (?) | ? |",
    ]


def test_rivals_are_shown_beside_the_budget_as_it_comes():
    def run(guard, seed, loss, kl, points):
        named = {"set": "qa", "regime": "lora", "seed": seed, "guard": guard, "strength": 0 if guard == "none" else 1}
        if guard == "budget":
            named |= {"opening_tokens": 3, "strength": 0.05}
        changes = {"refusal_change": {"value": points / 100}, "over_refusal_change": {"value": 0.05}}
        return {**named, **changes, "heldout_kl": kl, "task_loss_before": 3.0, "task_loss": loss}

    runs = [run("none", 0, 2.0, 0.3, -60), run("none", 1, 2.5, 0.4, -55), run("budget", 0, 2.1, 0.02, -2),
            run("budget", 1, 2.5, 0.03, -3), run("safegrad", 0, 2.2, 0.03, -5),
            run("safegrad", 1, 2.4, 0.03, -4)]  # fmt: skip
    assert benchmark("validation").rival_table(runs).splitlines()[2:] == [
        # with the second order of the rows `budget` learned as much as no guard at less KL, and safegrad more than both
        "| qa | none | 2 | 100 % | 0.300 to 0.400 | 1 of 2 | -60 to -55 | +5 |",
        "| qa | budget 0.05, first 3 too | 2 | 90 % to 100 % | 0.020 to 0.030 | 1 of 2 | -3 to -2 | +5 |",
        "| qa | safegrad 1 | 2 | 80 % to 120 % | 0.030 | 1 of 2 | -5 to -4 | +5 |",
    ]


def test_sizes_are_medians_of_each_regime():
    errors = {"margin_change": {"errors": [0.1, 0.5, 0.2, 0.9]}, "safety_kl": {"errors": [0.3, 0.1, 0.4, 0.2]}}
    record = {
        "cells": [{"regime": r} for r in ("lora", "full", "lora", "full")],
        "size_error": {"seen": {"end": errors}},
    }
    made = benchmark("validation")
    told = "At the end, by regime, on seen prompts: lora 15 % / 35 % (2 cells); full 70 % / 15 % (2 cells)."
    assert made._sizes_by_regime(record, "seen") == [told]
    assert made._sizes_by_regime({**record, "cells": record["cells"][:1]}, "seen") == []


def test_a_set_is_shown_at_its_last_step_with_its_first_seed():
    def cell(name, seed, told, seen):
        curve = {"value": [9.0, told], "low": [9.0, told - 1], "high": [9.0, told + 1]}
        halves = {
            half: {"margin_change": {"value": [8.0, seen + at]}, "safety_kl": {"value": [8.0, 0.25 + at]}}
            for half, at in (("assessed", 0.0), ("held_out", 0.5))
        }
        predicted = {"horizon_steps": 7, "margin_change": curve, "safety_kl": {"value": [9.0, 0.125]}}
        return {"set": name, "seed": seed, "regime": "lora", "predicted": predicted, "measured": halves}

    cells = [cell("mild", 1, -5.0, -5.0), cell("mild", 0, -0.5, -0.25), cell("bad", 0, -2.0, -3.0)]
    rows = benchmark("validation").set_table({"cells": [*cells, {**cells[0], "regime": "full"}]}, "lora").splitlines()
    assert rows[2:] == [
        "| bad | -2.00 (-3.00 to -1.00) | -3.00 | -2.50 | 0.125 | 0.250 | 0.750 | 7 |",
        "| mild | -0.50 (-1.50 to +0.50) | -0.25 | +0.25 | 0.125 | 0.250 | 0.750 | 7 |",
    ]


def test_the_check_table_of_the_readme_is_that_of_the_committed_runs():
    figures = benchmark("figures")
    assert figures.checks()
    assert f"<!-- demo check -->\n{figures.check_table(figures.checks())}\n<!-- end of demo check -->" in README
    run = {
        "name": "lora-x",
        "steps": [1, 2],
        "anchor_margin": 3.0,
        "measured": {"margin": [2.9, 1.0], "safety_kl": [0.001, 0.5]},
        "predicted": {
            "margin_change": {"value": [-0.1, -1.5], "low": [-0.2, -1.9], "high": [0.0, -1.1]},
            "safety_kl": {"value": [0.001, 0.4], "low": [0.0, 0.3], "high": [0.002, 0.6]},
        },
    }
    table = figures.check_table([run])
    assert "| lora, x | 2 | -1.50 (-1.90 to -1.10) | -2.00 | 0.4 (0.3 to 0.6) | 0.5 |" in table
    assert "3 of the 4 values" in table


def test_skips_are_accounted_for():
    pattern = re.compile(r"pytest\.(?:mark\.)?(?:skip|skipif|xfail)\b|importorskip")
    found = sum(
        len(pattern.findall(path.read_text(encoding="utf-8")))
        for path in (ROOT / "tests").rglob("*.py")
        if path.name != Path(__file__).name
    )
    rows = [line for line in (ROOT / "tests" / "SKIPS.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert found == len(rows) - 2


def test_no_machine_path_in_the_repository():
    pattern = re.compile(r"(^|[\s\"'(=])/(?:work|farm|root|home/\w+)/")
    for path in [
        *ROOT.glob("src/**/*.py"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*.md"),
        *ROOT.glob("tests/**/*.py"),
    ]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line) or path.name == Path(__file__).name, f"{path}:{number}"
