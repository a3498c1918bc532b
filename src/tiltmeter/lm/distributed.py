"""Data-parallel products: every process measures its own micro-batches, and all get the sums.

Each process holds the whole model; only the examples are divided. Products of m examples have zeros where another
process measured, so that one sum over processes puts them together. Models whose parameters are themselves divided are
refused by `model.trainable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from tiltmeter.errors import TiltmeterError
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.lm.divergence import DivergenceObjective
from tiltmeter.lm.objective import LanguageObjective


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

    def losses(self, displacement: Tensor | None = None) -> Tensor:
        """Losses [m]. Cost: a forward pass over this process's share."""
        return self._summed(lambda: self.mine.losses(displacement), (self.m,))

    def directional(self, v: Tensor, displacement: Tensor | None = None) -> Tensor:
        """G v [m]. Cost: a JVP over this process's share."""
        return self._summed(lambda: self.mine.directional(v, displacement), (self.m,))

    def gradient(self, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """G' w [n]. Cost: a forward and backward pass over this process's share, and a sum of n numbers."""
        return self._summed(lambda: self.mine.gradient(weights, displacement), (self.space.size,))

    def hvp(self, v: Tensor, weights: Tensor | None = None, displacement: Tensor | None = None) -> Tensor:
        """H v [n]. Cost: a Hessian product over this process's share, and a sum of n numbers."""
        return self._summed(lambda: self.mine.hvp(v, weights, displacement), (self.space.size,))

    def fisher_form(self, directions: Sequence[Tensor]) -> Tensor:
        """v_i' F_e v_j [m, k, k], of a `DivergenceObjective`."""
        held, k = self._divergence(), len(directions)
        return self._summed(lambda: held.fisher_form(directions), (self.m, k, k))

    def path_form(self, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """Covariance of path derivatives [m, 2, 2], of a `DivergenceObjective`."""
        held = self._divergence()
        return self._summed(lambda: held.path_form(velocity, acceleration), (self.m, 2, 2))

    def _divergence(self) -> DivergenceObjective:
        if not isinstance(self.mine, DivergenceObjective):
            raise TypeError("only a safety KL has Fisher and path forms")
        return self.mine

    def _summed(self, product: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        failure: Exception | None = None
        value = torch.zeros(shape)
        try:
            value = product()
        except Exception as error:  # the others must hear of it before it ends this process
            failure = error
        failed = torch.tensor(0 if failure is None else dist.get_rank() + 1)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failure is not None:
            raise failure
        if int(failed):
            raise TiltmeterError(
                f"process {int(failed) - 1} failed; its own message says why. Mend that and run again."
            )
        dist.all_reduce(value)
        return value


def sharded(objective: LanguageObjective | DivergenceObjective) -> Sharded:
    """Divide an objective's micro-batches among all processes, the longest first, each to the one with least to do.

    Every process must hold the same objective.
    """
    whole = objective.work
    if isinstance(objective, DivergenceObjective):
        numbers = _share([batch.tokens.numel() for _, batch in objective.inner.chunks])
        return Sharded(objective.only(numbers), whole)
    numbers = _share([batch.tokens.numel() for _, batch in objective.chunks])
    return Sharded(replace(objective, chunks=tuple(objective.chunks[i] for i in numbers)), whole)


def _share(sizes: Sequence[int]) -> list[int]:
    """Numbers of the micro-batches of this process."""
    load, mine = [0] * dist.get_world_size(), []
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = load.index(min(load))
        load[least] += sizes[number]
        if least == dist.get_rank():
            mine.append(number)
    return sorted(mine)
