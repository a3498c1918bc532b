"""The tuning set as the recipe's trainer will see it: rows in tokens, in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltmeter.errors import DataError
from tiltmeter.geometry.motion import Slope, measure_slope
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject
from tiltmeter.lm.conversation import Encoded, encode
from tiltmeter.lm.distributed import Sharded, shared_objective
from tiltmeter.lm.model import Loaded
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import spread

#: Rows that are tokenised at most to find enough that can be used.
MOST_LOOKED_AT = 4096

#: Rows in a look at the gradient, where a step of the recipe has fewer: their noise is part of the forecast's.
LEAST_ROWS = 8


@dataclass(frozen=True)
class Tuning:
    """A sample of the tuning set.

    Attributes:
        rows: the whole set.
        encoded: the sample in tokens.
        objective: loss of every example, so scaled that their mean is the mean per supervised token.
        batches: [B, m] weights that make a trainer's batch loss (mean over its supervised tokens).
        batch_size: rows in each of these batches.
        spread_factor: turns the scatter of these batches into that of batches of the recipe's size.
    """

    rows: RowSet
    encoded: Encoded
    objective: LanguageObjective | Sharded
    batches: Tensor
    batch_size: int
    spread_factor: float

    def slope(
        self, clip: float | None, displacement: Tensor | None, groups: int, part: Sequence[int] | None = None
    ) -> Slope:
        """Mini-batch gradients at a displacement, their scatter that of batches of the recipe's size.

        Args:
            clip: largest norm of a batch's gradient; None for no clipping.
            displacement: where, [n].
            groups: disjoint groups of batches to keep apart.
            part: batches to take; None for all.

        Cost: one forward+backward over the rows of these batches.
        """
        batches = self.batches if part is None else self.batches[list(part)]
        found = measure_slope(self.objective, batches, clip=clip, displacement=displacement, groups=groups)
        return replace(found, spread=found.spread.mul_(self.spread_factor))

    def rows_in(self, part: Sequence[int]) -> int:
        """Rows of some batches."""
        return int((self.batches[list(part)] != 0).any(0).sum())

    def work_of(self, part: Sequence[int]) -> int:
        """Tokens of some batches; where several processes share the micro-batches, about so many."""
        if isinstance(self.objective, Sharded):
            return round(self.objective.work * len(part) / len(self.batches))
        asked = (self.batches[list(part)] != 0).any(0)
        return sum(batch.tokens.numel() for members, batch in self.objective.chunks if bool(asked[members].any()))

    def taken(self, looks: int, before: int, recipe_batch: int) -> list[list[int]]:
        """Batches of each of so many looks at the gradient, in turn: rows of a step of the recipe, or a few more.

        Args:
            looks: how many.
            before: looks that have had their batches already.
            recipe_batch: rows in a step.
        """
        count = len(self.batches)
        each = min(count, math.ceil(max(recipe_batch, LEAST_ROWS) / self.batch_size))
        return [[((before + look) * each + i) % count for i in range(each)] for look in range(looks)]


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
    their scatter is rescaled, since the variance of a mean falls with the number of rows.

    Raises:
        DataError: fewer than two rows can be used.
    """
    encoded = sample_tuning(subject.loaded, rows, recipe, options)
    m = len(encoded.examples)
    size = min(recipe.batch_size, max(1, m // options.groups))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(options.seed)).tolist()
    members = [order[start : start + size] for start in range(0, m - size + 1, size)]
    for leftover, index in enumerate(order[len(members) * size :]):
        members[leftover % len(members)].append(index)
    objective = likelihood_objective(
        subject.forward,
        encoded.examples,
        subject.loaded.tokenizer.pad_token_id,
        subject.max_tokens,
        per="token",
        hessian=subject.hessian,
        groups=members,
    )
    supervised = torch.tensor([example.supervised for example in encoded.examples], dtype=torch.float64)
    batches = torch.zeros(len(members), m, dtype=torch.float64)
    for row, batch in enumerate(members):
        # losses are sums over tokens divided by the sample's mean count; a trainer divides by the batch's own count
        batches[row, batch] = supervised.mean() / supervised[batch].sum()
    return Tuning(rows, encoded, shared_objective(objective), batches, size, (size / recipe.batch_size) ** 0.5)
