"""Weights as they were a few steps ago, in two bytes a number.

What is kept of a weight w is the integer nearest to w / u, modulo 2^16. Sixteen-bit integers subtract modulo 2^16 as
well, so that the difference of two such numbers is the way in units u, to half a unit at each end, as long as no weight
has moved by 2^15 units. Under Adam that can be promised: by the inequality of Cauchy and Schwarz the first moment over
the root of the second is at most

    sum_k (1-b1) b1^k |g_k| / sqrt(sum_k (1-b2) b2^k g_k^2)  <=  (1-b1) / sqrt((1-b2) (1 - b1^2/b2))

whatever the gradients, and with the corrections for the first steps it stays below the larger of this and one: 7.3
learning rates a step with the usual betas. A way that is longer says that something else has moved the weights, a
checkpoint that was loaded for instance; only one that is a multiple of 2^16 units in every number, nearly, would not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltmeter.geometry.space import BLOCK
from tiltmeter.guards.trainee import Trainee
from tiltmeter.lm.gathered import own_part
from tiltmeter.lm.processes import largest_of_all

#: A unit is chosen so that the longest way is this share of what two bytes can tell. Of ways beyond twice that share,
#: nothing is believed.
ROOM = 0.25


def longest_ways(model: Trainee, steps: int) -> Tensor | None:
    """How far one number of every parameter can move in so many steps of Adam at the highest learning rate known.

    Args:
        model: what is trained.
        steps: optimiser steps.

    Returns: [parameters], float64; None where there is no such bound: for other optimisers, or betas with b1^2 >= b2.

    Cost: the largest absolute value of the weights where there is weight decay.
    """
    optimizer = model.plain_optimizer
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):  # one made from them may go further
        return None
    found = {}
    for group in optimizer.param_groups:
        b1, b2 = (float(beta) for beta in group["betas"])
        if b1 * b1 >= b2:
            return None
        ratio = max(1.0, (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2)))
        rate = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
        for p in group["params"]:
            decay = float(group["weight_decay"])
            held = own_part(p)
            largest = float(held.abs().max()) if decay and held.numel() else 0.0
            found[id(p)] = steps * rate * (ratio + decay * largest)
    return torch.tensor([found[id(p)] for p in model.parameters.values()], dtype=torch.float64)


def place(model: Trainee, ways: Tensor) -> tuple[Tensor, Tensor]:
    """Remember the weights as they stand.

    Args:
        model: what is trained.
        ways: the longest way [parameters] that a number of each can go before `recall`; see `longest_ways`.

    Returns: the landmark [n] in sixteen bits, and its units [parameters], float64.
    """
    units = (ways / (ROOM * 2**15)).clamp_min(torch.finfo(torch.float32).tiny)
    return _rounded(model, model.vector(), units), units


def reaches(model: Trainee, units: Tensor, ways: Tensor | None) -> bool:
    """Whether a landmark in these units [parameters] can be told after ways of this length, in all processes."""
    short = ways is None or not bool((ways <= units.to(ways) * 2 * ROOM * 2**15).all())
    return not (largest_of_all(int(short)) if model.in_parts else short)


def recall(model: Trainee, landmark: Tensor, units: Tensor) -> Tensor | None:
    """The weights [n] as they were when the landmark was placed, to one unit.

    Returns: None if they cannot be told, because something else than the optimiser has moved some of them, in any of
        the processes that have a part.
    """
    now = model.vector()
    way = _rounded(model, now, units).sub_(landmark.to(now.device))
    least, most = way.aminmax() if len(way) else (torch.zeros(()), torch.zeros(()))
    lost = max(-int(least), int(most)) > 2 * ROOM * 2**15
    if largest_of_all(int(lost)) if model.in_parts else lost:
        return None
    for unit, (_, part, _) in zip(units.tolist(), model.space.slices(), strict=True):
        now[part].sub_(way[part], alpha=unit)
    return now


def _rounded(model: Trainee, weights: Tensor, units: Tensor) -> Tensor:
    """Weights over units, to the nearest integer, modulo 2^16."""
    out = torch.empty(len(weights), dtype=torch.int16, device=weights.device)
    for unit, (_, part, _) in zip(units.tolist(), model.space.slices(), strict=True):
        for kept, held in zip(torch.split(out[part], BLOCK), torch.split(weights[part], BLOCK), strict=True):
            kept.copy_((held.double() / unit).round_().remainder_(2**16).to(torch.int32))
    return out
