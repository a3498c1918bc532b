"""The tuning set as the trainer sees it: batch losses, scatter, truncation."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.errors import DataError
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject, measure_subject, with_lora
from tiltmeter.jobs.tuning import further_rows, prepare_tuning
from tiltmeter.lm.conversation import collate
from tiltmeter.lm.model import Loaded, digest_of
from tiltmeter.lm.rows import RowSet

ROWS = tuple({"prompt": f"What is {i}?", "completion": "well " * (1 + i % 4) + str(i)} for i in range(11))
OPTIONS = Options(rank=1, groups=3, max_safety=2, response_tokens=3, max_tokens=90)


@pytest.fixture
def subject(make_llama: Any, make_tokenizer: Any) -> Subject:
    model = make_llama()
    opened = with_lora(Opened(Loaded(model, make_tokenizer(), "small", digest_of(model), 256)), None, 0)
    safety = RowSet("locks", ({"prompt": "How do I pick a lock?"}, {"prompt": "How do I make a cake?"}), "d")
    return measure_subject(opened, safety, None, OPTIONS)


@pytest.mark.parametrize(("batch", "expected"), [(2, 2), (3, 3), (64, 3)])
def test_batch_losses_are_the_trainers(subject: Subject, batch: int, expected: int) -> None:
    """Transformers' loss of a batch is the mean over all its supervised tokens, whoever they belong to."""
    tuning = prepare_tuning(subject, RowSet("rows", ROWS, "d"), Recipe(steps=3, batch_size=batch), OPTIONS)
    assert tuning.batch_size == expected
    losses = tuning.batches @ tuning.objective.losses()
    members = [row.nonzero()[:, 0].tolist() for row in tuning.batches]
    assert sorted(i for group in members for i in group) == list(range(11))
    assert all(expected <= len(group) < 2 * expected for group in members)
    for group, loss in zip(members, losses, strict=True):
        batched = collate([tuning.encoded.examples[i] for i in group], 0)
        with torch.no_grad():
            theirs = subject.loaded.model(input_ids=batched.tokens, labels=batched.labels).loss
        assert_close(loss, theirs.double(), rtol=1e-5, atol=1e-5)
    everything = collate(tuning.encoded.examples, 0)
    with torch.no_grad():
        whole = subject.loaded.model(input_ids=everything.tokens, labels=everything.labels).loss
    assert_close(tuning.objective.losses().mean(), whole.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [([4], 4), ([4] * 6, 4), ([2] * 2, 4), ([2] * 4, 4), ([1] * 6, 4), ([3] * 7, 16), ([9, 5, 5], 5), ([2, 1, 1], 3)],
)
def test_mean_and_spread_have_the_mean_square_of_the_recipes_batches(
    subject: Subject, sizes: list[int], batch: int
) -> None:
    """What Adam's second moment meets, on average over samples, whatever the batches that were measured."""
    tuning = prepare_tuning(subject, RowSet("rows", ROWS, "d"), Recipe(steps=3, batch_size=2), OPTIONS)
    tuning = replace(tuning, recipe_batch=batch)
    batches = torch.block_diag(*(torch.ones(1, size) / size for size in sizes)).double()
    mu, sigma, draws = 0.7, 2.0, 200_000
    generator = torch.Generator().manual_seed(0)
    means = (mu + sigma * torch.randn(draws, sum(sizes), generator=generator, dtype=torch.float64)) @ batches.T
    spread = means.std(-1, correction=0) * tuning.spread_factor(batches)  # as `measure_slope` has it
    squares = means.mean(-1).square() + spread.square()
    error = float(squares.std()) / draws**0.5
    assert abs(float(squares.mean()) - (mu**2 + sigma**2 / batch)) < 4 * error


def test_fewer_rows_than_a_batch_have_no_spread_left(subject: Subject) -> None:
    tuning = prepare_tuning(subject, RowSet("rows", ROWS, "d"), Recipe(steps=3, batch_size=64), OPTIONS)
    assert tuning.spread_factor(tuning.batches) == 0.0
    assert float(tuning.slope(None, None, 1).spread.abs().max()) == 0.0


@pytest.mark.parametrize(("batch", "per_look"), [(2, 2), (3, 2), (64, 3)])
def test_looks_on_the_way_are_made_of_rows_that_the_sample_left_out(
    subject: Subject, batch: int, per_look: int
) -> None:
    """A look's part of the least, or the rows of a step, and no more than the sample; losses are the trainer's."""
    rows = RowSet("rows", tuple({**row, "prompt": f"{row['prompt']} {i}"} for i in range(20) for row in ROWS), "d")
    options = Options(**{**vars(OPTIONS), "max_tuning": 6, "looks": 4, "rehearsal_rows": 4 * (4 if batch == 2 else 3)})
    tuning = prepare_tuning(subject, rows, Recipe(steps=12, batch_size=batch), options)
    short = prepare_tuning(subject, rows, Recipe(steps=4, batch_size=1), options)
    assert short.rows_in_look == 1  # a look for every step: what the run takes
    size = tuning.batch_size
    assert size == 2
    looks = 3 + 1  # on the way of the rehearsal with four looks, and of the one with two
    assert tuning.per_look == per_look
    assert tuning.rows_in_look == tuning.per_look * size
    assert tuning.further_batches.shape == (looks * tuning.per_look, looks * tuning.rows_in_look)
    others, usable = further_rows(subject.loaded, rows, Recipe(), options, tuning.encoded, looks * tuning.rows_in_look)
    assert usable == tuning.usable == len(rows.rows)
    seen = {example.row for example in tuning.encoded.examples}
    assert not seen & {example.row for example in others}
    assert len({example.row for example in others}) == len(others)
    assert tuning.distinct == 6 + len(others)
    for number in range(looks):
        assert tuning.members(number) == tuple(
            range(6 + number * tuning.rows_in_look, 6 + (number + 1) * tuning.rows_in_look)
        )
        part = slice(number * tuning.rows_in_look, (number + 1) * tuning.rows_in_look)
        held = others[part]
        leaves = list(subject.loaded.model.parameters())
        theirs = []
        for start in range(0, len(held), size):
            batched = collate(held[start : start + size], 0)
            loss = subject.loaded.model(input_ids=batched.tokens, labels=batched.labels).loss
            theirs.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)]))
        found = tuning.look(number, None, None)
        assert_close(found.mean.norm(), torch.stack(theirs).mean(0).norm(), rtol=1e-4, atol=1e-6)
        assert tuning.look_work(number) == sum(
            collate(held[i : i + size], 0).tokens.numel() for i in range(0, len(held), size)
        )


def test_where_there_are_no_further_rows_all_are_dealt_again(subject: Subject) -> None:
    options = Options(**{**vars(OPTIONS), "max_tuning": 8})
    rows = RowSet("rows", ROWS, "d")
    sample = prepare_tuning(subject, rows, Recipe(), options).encoded
    others, _ = further_rows(subject.loaded, rows, Recipe(), options, sample, 30)
    counts = [sum(example.row == row for example in others) for row in range(11)]
    assert len(others) == 30
    assert max(counts) - min(counts) == 1
    tuning = prepare_tuning(subject, rows, Recipe(steps=40, batch_size=2), options)
    assert tuning.distinct == 11
    numbers = {example.row: i for i, example in enumerate(sample.examples)}
    dealt, _ = further_rows(subject.loaded, rows, Recipe(), options, sample, len(tuning.further_members))
    for example, number in zip(dealt, tuning.further_members, strict=True):
        assert numbers.setdefault(example.row, number) == number
    assert sorted(numbers.values()) == list(range(11))


@pytest.mark.parametrize("bad", [0, 15, 30])
def test_rows_that_no_run_would_train_on_are_not_counted(subject: Subject, bad: int) -> None:
    """The noise of a sample is that about the mean of the rows that are trained on."""
    good = tuple({**row, "prompt": f"{row['prompt']} {i}"} for i in range(6) for row in ROWS[:5])
    unusable = ({"prompt": "word " * 500, "completion": "no room"},) * bad
    rows = RowSet("rows", tuple(x for pair in zip_longest(good, unusable) for x in pair if x), "d")
    options = Options(**{**vars(OPTIONS), "max_tuning": 8})
    tuning = prepare_tuning(subject, rows, Recipe(steps=40, batch_size=2, max_length=64), options)
    assert tuning.usable == 30
    assert {example.row for example in tuning.encoded.examples} <= {rows.rows.index(row) for row in good}
    few = replace(options, looks=2, rehearsal_rows=2)  # 18 rows or fewer are looked at, which tell it to seven or so
    assert abs(prepare_tuning(subject, rows, Recipe(steps=40, batch_size=1, max_length=64), few).usable - 30) <= 14


def test_truncation_is_counted_and_the_shortest_limit_holds(subject: Subject) -> None:
    whole = prepare_tuning(subject, RowSet("rows", ROWS, "d"), Recipe(), OPTIONS).encoded
    lengths = sorted(len(example.tokens) for example in whole.examples)
    assert whole.truncated == 0
    limit = lengths[5]
    for recipe, options in (
        (Recipe(max_length=limit), OPTIONS),
        (Recipe(), Options(**{**vars(OPTIONS), "max_length": limit})),
    ):
        cut = prepare_tuning(subject, RowSet("rows", ROWS, "d"), recipe, options).encoded
        assert max(len(example.tokens) for example in cut.examples) == limit
        assert cut.truncated == sum(length > limit for length in lengths)
    with pytest.raises(DataError, match=r"not one of 11 rows can be used: prompt longer than max_length \(11\)"):
        prepare_tuning(subject, RowSet("rows", ROWS, "d"), Recipe(max_length=4), OPTIONS)


def test_a_sample_is_spread_over_the_set_and_one_row_is_too_few(subject: Subject) -> None:
    options = Options(**{**vars(OPTIONS), "max_tuning": 4})
    tuning = prepare_tuning(subject, RowSet("rows", ROWS, "d"), Recipe(batch_size=2), options)
    words = [subject.loaded.tokenizer.decode(example.tokens) for example in tuning.encoded.examples]
    assert [next(i for i in range(11) if f"What is {i}?" in text) for text in words] == [0, 2, 5, 8]
    with pytest.raises(DataError, match="at least 2 usable tuning rows, got 1"):
        prepare_tuning(subject, RowSet("rows", ROWS[:1], "d"), Recipe(), OPTIONS)


@pytest.mark.parametrize(("wanted", "expected"), [(3, 3), (5, 5), (8, 7), (64, 7)])
def test_rows_that_cannot_be_used_are_replaced_by_others(subject: Subject, wanted: int, expected: int) -> None:
    """Every third prompt leaves no room for its answer; as many usable rows as asked for are found while there are."""
    long = {"prompt": "what " * 60, "completion": "no"}
    rows = tuple(long if i % 3 == 1 else row for i, row in enumerate(ROWS))
    options = Options(**{**vars(OPTIONS), "max_tuning": wanted, "max_length": 60})
    encoded = prepare_tuning(subject, RowSet("rows", rows, "d"), Recipe(), options).encoded
    assert len(encoded.examples) == expected
    places = [example.row for example in encoded.examples]
    assert places == sorted(set(places))
    assert all(place % 3 != 1 for place in places)
    for example in encoded.examples:  # the row it says it came from is the one it came from
        alone = prepare_tuning(subject, RowSet("two", (rows[example.row], rows[0]), "d"), Recipe(), options).encoded
        assert alone.examples[0].tokens == example.tokens
    assert set(encoded.skipped) == {"prompt longer than max_length"}
    assert encoded.truncated == 0
