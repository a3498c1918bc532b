"""Guards by name, and through `finetune`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from typer.testing import CliRunner

from tiltmeter import cli, commands_finetune
from tiltmeter.errors import InputError, UnsupportedModel
from tiltmeter.guards.names import GUARDS
from tiltmeter.jobs import guarding
from tiltmeter.jobs.finetune import finetune
from tiltmeter.jobs.guarding import (
    ANSWER_TOKENS,
    OPENING_TOKENS,
    GuardOptions,
    alignment_of,
    guard_callback,
    guard_named,
    prompts_for_guard,
)
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import with_lora
from tiltmeter.lm.conversation import encode
from tiltmeter.report import guards_page
from tiltmeter.tracking.anchor import TrackerOptions

HARD = Recipe(learning_rate=1e-3, schedule="constant", steps=12, batch_size=4, max_length=64)


def run(out, guard, **more):
    options = TrackerOptions(max_safety=12, rank=0, every=12)
    given = ("demo:tiny", "demo:tiny-safety", "demo:tiny-copy", HARD, out)
    return finetune(*given, options=options, guard=guard, **more).record


def test_a_guarded_finetune_stays_inside_where_the_free_one_does_not(tmp_path):
    free = run(tmp_path / "free", None)
    kept = run(tmp_path / "kept", GuardOptions("budget", budget_kl=0.05))
    off = run(tmp_path / "off", GuardOptions("budget", strength=0.0))
    kl = {name: record["curves"]["safety_kl"]["value"][-1] for name, record in (("free", free), ("kept", kept))}
    assert kl["kept"] <= 0.06 < 0.2 < kl["free"]
    assert free["guard"] is None
    assert free["reasons"]["guard"]
    assert kept["guard"]["name"] == "budget"
    assert kept["guard"]["log"]
    assert kept["guard"]["prompts_shared"] is False
    assert (kept["guard"]["answer_tokens"], kept["guard"]["opening_tokens"]) == (24, 3)
    assert off["curves"]["safety_kl"]["value"] == free["curves"]["safety_kl"]["value"]


def test_the_command_line_hands_on_what_is_asked_of_a_guard(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(commands_finetune, "run_finetune", lambda *args, guard, **more: asked.append(guard))
    rest = [
        "demo:tiny",
        "--safety",
        "demo:tiny-safety",
        "--tuning",
        "demo:tiny-copy",
        "--lr",
        "1e-3",
        "-o",
        str(tmp_path),
    ]
    given = ["--guard", "budget", "--guard-strength", "0.5", "--budget-kl", "0.02", "--guard-tokens", "6"]
    for more in ([], ["--guard-opening", "2"]):
        CliRunner().invoke(cli.app, ["finetune", *rest, *given, *more])
    usual = GuardOptions("budget", 0.5, 0.02, None, 6)
    assert asked == [usual, replace(usual, opening_tokens=2)]


def test_the_token_loss_reaches_the_trainer(tmp_path):
    free = run(tmp_path / "free", None)
    held = run(tmp_path / "held", GuardOptions("token_loss"))
    assert held["curves"]["safety_kl"]["value"][-1] < free["curves"]["safety_kl"]["value"][-1]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_guard_looks_at_so_many_tokens_of_an_answer(tokens):
    opened = with_lora(open_model("demo:tiny"), Lora(2, 4.0), 0)
    callback = guard_callback("budget", opened, open_rows("demo:tiny-safety").rows, answer_tokens=tokens)
    labels = torch.cat([batch.labels.reshape(-1, batch.labels.shape[-1]) for _, batch in callback.source._score.chunks])
    assert (labels[:, 1:] != -100).sum(-1).max() == tokens
    with pytest.raises(InputError, match="one token of an answer at least, got 0"):
        guard_callback("budget", opened, open_rows("demo:tiny-safety").rows, answer_tokens=0)


@pytest.mark.parametrize("large", [False, True])
def test_in_large_spaces_few_examples_span_the_directions_and_all_others_serve_as_before(large, monkeypatch):
    """There each projection takes a JVP of them; the KL's gradients and the held-out look are of all."""
    monkeypatch.setattr(guarding, "DENSE", 0 if large else guarding.DENSE)
    opened = with_lora(open_model("demo:tiny"), Lora(2, 4.0), 0)
    rows = open_rows("demo:tiny-safety").rows
    callback = guard_callback("budget", opened, rows)
    source, own = callback.source, 32
    assert callback.guard.every == (guarding.EVERY_IN_LARGE_SPACES if large else 1)
    assert (source.divergence.m, source.replay.m, source._heldout.m) == (own, own, 16)
    assert source.scores.m == (guarding.SCORED_IN_LARGE_SPACES if large else own)
    assert callback.guard.rank <= guarding.SCORED_IN_LARGE_SPACES
    assert source.shift().shape == (source.scores.m,)
    assert source.sensitivity(4).basis.coefficients.shape[0] == source.scores.m
    assert guard_callback("gradient", opened, rows).source.scores.m == own


def test_the_examples_that_span_the_directions_are_spread_evenly():
    opened = with_lora(open_model("demo:tiny"), Lora(2, 4.0), 0)
    rows = open_rows("demo:tiny-safety").rows
    every, some = (guarding.safety_source(opened, rows, scored=scored) for scored in (None, 8))
    torch.testing.assert_close(some.scores.losses(), every.scores.losses()[::4], rtol=1e-5, atol=1e-6)


def test_what_guards_look_at_by_default_is_one_number():
    """The command line and the page say it without importing what loads models."""
    assert inspect.signature(cli.finetune).parameters["guard_tokens"].default == ANSWER_TOKENS
    assert guards_page.ANSWER_TOKENS == ANSWER_TOKENS
    assert GuardOptions("budget").answer_tokens == ANSWER_TOKENS
    opening = get_args(get_type_hints(cli.finetune, include_extras=True)["guard_opening"])[1]
    assert f"by default {OPENING_TOKENS} for budget, else 0" in opening.help
    assert inspect.signature(cli.finetune).parameters["guard_opening"].default is None
    assert [GuardOptions(name).opening for name in ("budget", "replay")] == [OPENING_TOKENS, 0]
    assert GuardOptions("budget", opening_tokens=0).opening == 0


@pytest.mark.parametrize(("guard", "opening"), [("budget", 3), ("safegrad", 0)])
def test_what_a_guard_takes_the_kl_over_where_nothing_is_asked(guard, opening):
    opened = with_lora(open_model("demo:tiny"), Lora(2, 4.0), 0)
    rows = open_rows("demo:tiny-safety").rows
    asked = [{}, {"opening_tokens": 0}, {"opening_tokens": 0, "answer_tokens": 3}]
    usual, whole, first = (guard_callback(guard, opened, rows, **each).source for each in asked)
    move = usual._score.forward.random(0) * 0.1
    told, mean, start = (source.divergence.losses(move) for source in (usual, whole, first))
    assert torch.allclose(told, torch.maximum(mean, start) if opening else mean, rtol=1e-4)
    assert bool((told > 1.1 * mean).any()) is bool(opening)
    assert bool((told < 0.9 * start).any()) is not bool(opening)
    apart = [source._heldout.losses(move) for source in (usual, whole, first)]
    torch.testing.assert_close(apart[0], torch.maximum(*apart[1:]) if opening else apart[1], rtol=1e-4, atol=0.0)
    assert bool((apart[0] > 1.1 * apart[1]).any()) is bool(opening)
    with pytest.raises(InputError, match="must have 0 tokens \\(none\\) or more, got -1"):
        guard_callback(guard, opened, rows, opening_tokens=-1)


def test_the_answers_length_is_in_the_record_and_changes_the_run(tmp_path):
    kept, short = (
        run(tmp_path / str(tokens), GuardOptions("budget", budget_kl=0.05, answer_tokens=tokens)) for tokens in (24, 2)
    )
    assert (kept["guard"]["answer_tokens"], short["guard"]["answer_tokens"]) == (24, 2)
    ends = [record["curves"]["safety_kl"]["value"][-1] for record in (kept, short)]
    assert ends[0] != ends[1]


def test_every_name_gives_its_guard_or_says_what_it_lacks():
    opened = with_lora(open_model("demo:tiny"), Lora(2, 4.0), 0)
    tuning = encode(open_rows("demo:tiny-copy").rows[:4], opened.loaded.tokenizer, 64).examples
    for name, kind in GUARDS.items():
        if name in ("safe_lora", "lox"):
            with pytest.raises(InputError, match="base"):
                guard_named(name, opened, tuning=tuning)
        else:
            assert type(guard_named(name, opened, tuning=tuning)) is kind
    with pytest.raises(InputError, match="tuning examples"):
        guard_named("token_loss", opened)
    with pytest.raises(InputError, match=r"unknown guard 'shield'.*budget"):
        guard_named("shield", opened)
    assert guard_named("replay", opened, strength=0.25).strength == 0.25
    assert guard_named("budget", opened, budget_kl=0.5).budget_kl == 0.5


def test_the_alignment_is_the_difference_of_the_weights_under_their_plain_names():
    base, aligned = (open_model("demo:tiny").loaded.model for _ in range(2))
    with pytest.raises(UnsupportedModel, match="does not differ"):
        alignment_of(aligned, base)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.sub_(0.25)
    opened = with_lora(open_model("demo:tiny"), Lora(2, 4.0, ("q_proj",)), 0)
    found = alignment_of(opened.loaded.model, base)
    v = found["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(v, torch.full_like(v, 0.25), rtol=1e-5, atol=1e-6)
    guard = guard_named("safe_lora", opened, base=base)
    assert set(guard.alignment) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_the_guard_learns_from_prompts_that_are_not_measured():
    rows = [{"prompt": str(i)} for i in range(40)]
    left, shared = prompts_for_guard(rows, 20)
    assert len(left) == 20
    assert not shared
    assert prompts_for_guard(rows, 30) == (rows, True)
