"""Data-parallel products: every process measures its own micro-batches, and all get the sums.

Each process holds the whole model; only the examples are divided. Products of m examples have zeros where another
process measured, so that one sum over processes puts them together. Where the weights are divided instead
(`lm.sharding`), all processes must gather the same layers at the same time: each then does all the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tiltmeter.errors import TiltmeterError
from tiltmeter.geometry.forecast import Separate, Standing
from tiltmeter.geometry.objective import FORWARD_BACKWARD, Objective, Passes
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.divergence import DivergenceObjective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.kl_and_margin import KlAndMargin
from tiltmeter.lm.objective import LanguageObjective
from tiltmeter.lm.processes import largest_of_all, least_of_all, processes, summed
from tiltmeter.lm.sharding import is_divided


@dataclass(frozen=True)
class Sharded:
    """An objective whose micro-batches are divided among the processes of the default process group.

    All processes must ask for the same products in the same order, and get the same numbers as one process would, up to
    the order of summation. If a product fails in one process it fails in all, so that none waits for ever.

    Attributes:
        mine: the objective with the micro-batches of this process; it still counts all m examples.
        whole: size of a pass over all micro-batches, tokens.
    """

    mine: LanguageObjective | DivergenceObjective
    whole: int

    @property
    def space(self) -> ParameterSpace:
        """The trainable parameters."""
        return self.mine.space

    @property
    def m(self) -> int:
        """Number of examples of all processes."""
        return self.mine.m

    @property
    def work(self) -> int:
        """Tokens of one pass of all processes together."""
        return self.whole

    @property
    def largest(self) -> int:
        """Tokens of this process's largest micro-batch."""
        return self.mine.largest

    @property
    def trial(self) -> int:
        """Tokens that this process's first Hessian product takes besides those of every other."""
        return self.mine.trial

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Losses [m]. Cost: a forward pass over this process's share."""
        return summed(lambda: self.mine.losses(displacement), (self.m,))

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """G v [m]. Cost: a JVP over this process's share."""
        return summed(lambda: self.mine.directional(v, displacement), (self.m,))

    def losses_and_slopes(self, v: Tensor, displacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses [m] and G v [m], of a `LanguageObjective`. Cost: a JVP over this process's share."""
        if not isinstance(self.mine, LanguageObjective):
            raise TypeError("a safety KL has slopes, and no losses at the anchor worth having")
        held = self.mine
        both = summed(lambda: torch.stack(held.losses_and_slopes(v, displacement)), (2, self.m))
        return both[0], both[1]

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """G' w [n]. Cost: a forward and backward pass over this process's share, and a sum of n numbers."""
        return summed(lambda: self.mine.gradient(weights, displacement), (self.space.size,))

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """H v [n]. Cost: a Hessian product over this process's share, and a sum of n numbers."""
        return summed(lambda: self.mine.hvp(v, weights, displacement), (self.space.size,))

    def fisher_form(self, directions: Sequence[Tensor]) -> Tensor:
        """v_i' F_e v_j [m, k, k], of a `DivergenceObjective`."""
        held, k = self._divergence(), len(directions)
        return summed(lambda: held.fisher_form(directions), (self.m, k, k))

    def path_form(self, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """Covariance of path derivatives [m, 2, 2], of a `DivergenceObjective`."""
        held = self._divergence()
        return summed(lambda: held.path_form(velocity, acceleration), (self.m, 2, 2))

    def _divergence(self) -> DivergenceObjective:
        if not isinstance(self.mine, DivergenceObjective):
            raise TypeError("only a safety KL has Fisher and path forms")
        return self.mine


@dataclass(frozen=True)
class ShardedStanding:
    """Safety KL and margin of m prompts, each read by one process.

    Attributes:
        mine: the prompts of this process; the others' are zero.
        whole: tokens of one pass of all processes.
    """

    mine: KlAndMargin
    whole: int

    @property
    def work(self) -> int:
        """Tokens of one pass of all processes together."""
        return self.whole

    def __call__(self, displacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Safety KL [m], nats per token, and margin [m], nats. Cost: a forward pass over this process's share."""
        m = self.mine.inner.m // 2
        both = summed(lambda: torch.stack(self.mine(displacement)), (2, m))
        return both[0], both[1]


def divides(forward: Forward) -> bool:
    """Whether several processes work together and share the examples out."""
    return processes() > 1 and not is_divided(forward.model)


def summed_passes(passes: Passes, forward: Forward) -> Passes:
    """The passes of all processes that share the work."""
    if not divides(forward):
        return passes
    kinds = list(FORWARD_BACKWARD)
    own = torch.tensor([[counts[kind] for kind in kinds] for counts in (passes.calls, passes.tokens)])
    calls, tokens = summed(lambda: own, tuple(own.shape)).tolist()
    return Passes(
        +Counter(dict(zip(kinds, calls, strict=True))),
        +Counter(dict(zip(kinds, tokens, strict=True))),
    )


def shared_objective(
    objective: LanguageObjective,
) -> LanguageObjective | Sharded:
    """The objective itself, or its share where several processes work together."""
    return sharded(objective) if divides(objective.forward) else objective


def shared_divergence(divergence: DivergenceObjective) -> DivergenceObjective | Sharded:
    """The safety KL itself, or its share where several processes work together."""
    return sharded(divergence) if divides(divergence.inner.forward) else divergence


def shared_standing(standing: Standing, forward: Forward) -> Standing:
    """What reads KL and margin, or its share where several processes work together."""
    if not divides(forward):
        return standing
    if isinstance(standing, Separate):
        return Separate(_share_of(standing.safety_kl), _share_of(standing.negative_margin))
    if not isinstance(standing, KlAndMargin):
        raise TypeError(f"a {type(standing).__name__} has no shares")
    numbers = _share([batch.tokens.numel() for _, batch in standing.inner.chunks])
    return ShardedStanding(standing.only(numbers), standing.work)


def _share_of(objective: Objective) -> Objective:
    if not isinstance(objective, (LanguageObjective, DivergenceObjective)):
        raise TypeError(f"a {type(objective).__name__} has no shares")
    return sharded(objective)


def sharded(objective: LanguageObjective | DivergenceObjective) -> Sharded:
    """Divide an objective's micro-batches among all processes, the longest first, each to the one with least to do.

    Every process must hold the same objective.
    """
    sizes = [batch.tokens.numel() for _, batch in _chunks(objective)]
    if least_of_all(len(sizes)) < largest_of_all(len(sizes)):
        raise TiltmeterError(
            "the processes cut the data into different micro-batches, since memory ran out in one of them. Give all "
            "the same limit (--memory), or fewer rows."
        )
    numbers = _share(sizes)
    if isinstance(objective, DivergenceObjective):
        return Sharded(objective.only(numbers), objective.work)
    return Sharded(replace(objective, chunks=tuple(objective.chunks[i] for i in numbers)), objective.work)


def _chunks(objective: LanguageObjective | DivergenceObjective) -> Sequence[tuple[Tensor, Batch]]:
    return objective.inner.chunks if isinstance(objective, DivergenceObjective) else objective.chunks


def _share(sizes: Sequence[int]) -> list[int]:
    """Numbers of the micro-batches of this process."""
    load, mine = [0] * dist.get_world_size(), []
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = load.index(min(load))
        load[least] += sizes[number]
        if least == dist.get_rank():
            mine.append(number)
    return sorted(mine)
