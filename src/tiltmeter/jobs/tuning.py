"""The tuning set as the recipe's trainer will see it: rows in tokens, in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltmeter.errors import DataError
from tiltmeter.geometry.motion import LARGE, Slope, measure_slope
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject
from tiltmeter.lm.conversation import Encoded, Example, encode
from tiltmeter.lm.distributed import Sharded, shared_objective
from tiltmeter.lm.model import Loaded
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import spread

#: Rows that are tokenised at most to find enough that can be used.
MOST_LOOKED_AT = 4096


@dataclass(frozen=True)
class Tuning:
    """A sample of the tuning set.

    Attributes:
        rows: the whole set.
        usable: rows of it that a run trains on, judging by those that were looked at; all of them where rows are cut
            shorter here than in the run.
        encoded: the sample in tokens.
        objective: loss of every example, so scaled that their mean is the mean per supervised token.
        batches: [B, m] weights that make a trainer's batch loss (mean over its supervised tokens).
        batch_size: rows in each of these batches, at least: what is left over is dealt out among them.
        recipe_batch: rows in a batch of the recipe.
        further: loss of further rows, for gradients on the way: what was fitted there should not be rows seen before.
        further_batches: their batches, likewise.
        further_members: the number of each further row: that of the example of the sample that it is, or a new one; the
            same row has the same number everywhere.
        per_look: how many of these batches each gradient on the way is made of: rows of a step of the recipe, or
            its part of `Options.rehearsal_rows` where the run takes as many until the next; and no more than the
            sample has.
    """

    rows: RowSet
    usable: int
    encoded: Encoded
    objective: LanguageObjective | Sharded
    batches: Tensor
    batch_size: int
    recipe_batch: int
    further: LanguageObjective | Sharded
    further_batches: Tensor
    further_members: tuple[int, ...]
    per_look: int

    def slope(self, clip: float | None, displacement: Tensor | None, groups: int) -> Slope:
        """Mini-batch gradients of the sample; with the mean, the spread gives the mean square of the recipe's batches.

        Args:
            clip: largest norm of a batch's gradient; None for no clipping.
            displacement: where, [n].
            groups: disjoint groups of batches to keep apart.

        Cost: one forward+backward over the sample.
        """
        return self._slope(self.objective, self.batches, clip, displacement, groups)

    def look(self, number: int, clip: float | None, displacement: Tensor | None) -> Slope:
        """The same from the further rows of one look. Cost: one forward+backward over `rows_in_look` rows."""
        part = slice(number * self.per_look, (number + 1) * self.per_look)
        return self._slope(self.further, self.further_batches[part], clip, displacement, 1)

    def spread_factor(self, batches: Tensor) -> float:
        """Turns the spread of batches [B, m] into that which belongs to the recipe's.

        A batch of the recipe, of b rows, has a mean square of mu^2 + sigma^2 / b where rows scatter by sigma. The mean
        of B batches of s rows (the harmonic mean where they differ) has mu^2 + sigma^2 / (B s), and their spread
        (divided by B) squared is sigma^2 (B - 1) / (B s) on average. With this factor the squares of mean and spread
        add up to the former; where B s < b the mean's own square is more than that already.
        """
        count = len(batches)
        if count < 2:
            return 1.0  # there is no spread
        size = count / float((batches != 0).sum(1).double().reciprocal().sum())
        kept = (count * size - self.recipe_batch) / (self.recipe_batch * (count - 1))
        return math.sqrt(max(0.0, kept))

    @property
    def rows_in_look(self) -> int:
        """Further rows of a look."""
        return self.per_look * self.further.m // max(1, len(self.further_batches))

    @property
    def distinct(self) -> int:
        """Rows that are looked at, each counted once."""
        return max(len(self.encoded.examples), 1 + max(self.further_members, default=0))

    def members(self, number: int) -> tuple[int, ...]:
        """Numbers of the rows in a look."""
        return self.further_members[number * self.rows_in_look : (number + 1) * self.rows_in_look]

    def look_work(self, number: int) -> int:
        """Tokens of a look; where several processes share the micro-batches, about so many."""
        if isinstance(self.further, Sharded):
            return round(self.further.work * self.per_look / len(self.further_batches))
        part = slice(number * self.per_look, (number + 1) * self.per_look)
        asked = (self.further_batches[part] != 0).any(0)
        return sum(batch.tokens.numel() for members, batch in self.further.chunks if bool(asked[members].any()))

    def _slope(
        self,
        objective: LanguageObjective | Sharded,
        batches: Tensor,
        clip: float | None,
        displacement: Tensor | None,
        groups: int,
    ) -> Slope:
        found = measure_slope(objective, batches, clip=clip, displacement=displacement, groups=groups)
        return replace(found, spread=found.spread.mul_(self.spread_factor(batches)))


def sample_tuning(loaded: Loaded, rows: RowSet, recipe: Recipe, options: Options) -> Encoded:
    """Tokenise a sample of the tuning set, evenly spread over its rows; cheap, so that bad data end a job at once.

    Where rows cannot be used (a prompt that leaves no room for its answer), others take their place: what a forecast is
    worth depends on the number of rows more than on anything else.

    Returns: the sample; `row` of an example is its place in the whole set.

    Raises:
        DataError: fewer than two rows can be used.
    """
    length = min(recipe.max_length, options.max_length, loaded.context)
    looked = options.max_tuning
    while True:
        chosen = spread(len(rows.rows), looked)
        encoded = encode([rows.rows[i] for i in chosen], loaded.tokenizer, length)
        if len(encoded.examples) >= options.max_tuning or looked >= min(len(rows.rows), MOST_LOOKED_AT):
            break
        looked = min(2 * looked, MOST_LOOKED_AT)
    if len(encoded.examples) > options.max_tuning:
        usable = [chosen[example.row] for example in encoded.examples]
        chosen = [usable[i] for i in spread(len(usable), options.max_tuning)]
        again = encode([rows.rows[i] for i in chosen], loaded.tokenizer, length)
        encoded = replace(again, rows_read=encoded.rows_read, skipped=encoded.skipped)
    encoded = replace(encoded, examples=tuple(replace(each, row=chosen[each.row]) for each in encoded.examples))
    if len(encoded.examples) < 2:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in encoded.skipped.items()) or "there are no more"
        raise DataError(
            f"{rows.name}: expected at least 2 usable tuning rows, got {len(encoded.examples)} at {length} tokens: "
            f"{reasons}. One row cannot tell a direction from noise; raise --max-length or --max-tuning."
        )
    return encoded


def prepare_tuning(subject: Subject, rows: RowSet, recipe: Recipe, options: Options) -> Tuning:
    """Tokenise a sample of the tuning set and put it into batches.

    Batches have the recipe's size unless that leaves fewer than `options.groups` of them; then they are smaller and
    their scatter is rescaled (`Tuning.spread_factor`), since the variance of a mean falls with the number of rows. A
    screening has one batch in each look.

    Raises:
        DataError: fewer than two rows can be used.
    """
    if options.screen:  # every look takes the rows of one step, the first too
        most = min(options.max_tuning, max(2, recipe.batch_size))
        options = replace(options, max_tuning=most, rehearsal_rows=1, groups=1)
    encoded = sample_tuning(subject.loaded, rows, recipe, options)
    m = len(encoded.examples)
    size = min(recipe.batch_size, max(1, m // options.groups))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(options.seed)).tolist()
    members = [order[start : start + size] for start in range(0, m - size + 1, size)]
    for leftover, index in enumerate(order[len(members) * size :]):
        members[leftover % len(members)].append(index)
    objective, batches = _in_batches(subject, encoded.examples, members)
    fewer, most = options.both_looks(recipe.steps)
    stretch = math.ceil(recipe.steps / most) * recipe.batch_size  # rows that the run itself takes meanwhile
    least = min(math.ceil(options.rehearsal_rows / most), stretch)
    per_look = min(len(members), math.ceil(max(recipe.batch_size, least) / size))
    count = most - 1 + (fewer - 1 if fewer < most else 0)  # looks on the way
    others, usable = further_rows(subject.loaded, rows, recipe, options, encoded, per_look * count * size)
    held = [list(range(start, start + size)) for start in range(0, len(others), size)]
    further, further_batches = _in_batches(subject, others, held)
    return Tuning(
        rows,
        usable,
        encoded,
        shared_objective(objective),
        batches,
        size,
        recipe.batch_size,
        shared_objective(further),
        further_batches,
        tuple(_numbers(encoded.examples, others)),
        per_look,
    )


def _numbers(sample: Sequence[Example], others: Sequence[Example]) -> list[int]:
    """Numbers of further examples, by the row that they are; the sample's are their places in it."""
    known = {example.row: number for number, example in enumerate(sample)}
    return [known.setdefault(example.row, len(known)) for example in others]


def further_rows(
    loaded: Loaded, rows: RowSet, recipe: Recipe, options: Options, sample: Encoded, count: int
) -> tuple[list[Example], int]:
    """So many further examples: rows that the sample left out, evenly spread; all over again where they do not do.

    Returns: the examples, in the order of a shuffled deck that is dealt again and again, as a trainer's; and how many
        rows of the set can be used, judging by those that were looked at.
    """
    wanted = replace(options, max_tuning=len(sample.examples) + count)
    seen = {example.row for example in sample.examples}
    every = sample_tuning(loaded, rows, recipe, wanted)
    usable = len(rows.rows) * (1 - sum(every.skipped.values()) / every.rows_read)
    if options.max_length < min(recipe.max_length, loaded.context):  # the run takes longer rows than are looked at
        usable = len(rows.rows)
    left = [example for example in every.examples if example.row not in seen]
    deck = [left[i] for i in spread(len(left), min(count, len(left)))]
    if len(deck) < count:
        deck += sample.examples
    order = torch.randperm(len(deck), generator=torch.Generator().manual_seed(options.seed + 1)).tolist()
    found = len(seen.union(example.row for example in every.examples))
    return [deck[order[i % len(deck)]] for i in range(count)], max(round(usable), found)


def _in_batches(
    subject: Subject, examples: Sequence[Example], members: Sequence[Sequence[int]]
) -> tuple[LanguageObjective, Tensor]:
    """The loss of these examples and the weights [B, m] of their batches."""
    objective = likelihood_objective(
        subject.forward,
        examples,
        subject.loaded.tokenizer.pad_token_id,
        # in a large space gradients are asked for while many vectors are alive: micro-batches are half as large
        subject.max_tokens // 2 if subject.forward.whole.size > LARGE else subject.max_tokens,
        per="token",
        hessian=subject.hessian,
        groups=members,
    )
    supervised = torch.tensor([example.supervised for example in examples], dtype=torch.float64)
    batches = torch.zeros(len(members), len(examples), dtype=torch.float64)
    for row, batch in enumerate(members):
        # losses are sums over tokens divided by the sample's mean count; a trainer divides by the batch's own count
        batches[row, list(batch)] = supervised.mean() / supervised[list(batch)].sum()
    return objective, batches
