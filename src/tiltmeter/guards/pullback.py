"""Bringing a model back inside its safety budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tiltmeter.geometry.space import dot
from tiltmeter.guards.trainee import Trainee

#: Corrections along the safety gradient before the last resort.
TRIES = 6

#: A step aims for this share of the target: one that aims for it exactly comes to rest a little above, again and again.
AIM = 0.7


@dataclass(frozen=True)
class PulledBack:
    """What became of it.

    Attributes:
        kl: held-out KL afterwards, nats.
        how: in words.
    """

    kl: float
    how: str


def pull_back(model: Trainee, target: float, budget: float, inside: Tensor) -> PulledBack:
    """Lower the held-out KL to `target`, at least below `budget`.

    First along the safety gradient in the optimiser's metric, by the step after which the KL of the guard's own
    examples has fallen in the same proportion, if it were a square in that direction: from u to r u takes
    2 (1 - sqrt r) u over the slope. If that does not suffice, back along the way since `inside`, halving it.

    Args:
        model: what is trained.
        target: held-out KL to aim for, nats.
        budget: held-out KL that must not be exceeded.
        inside: weights [n] that were within the budget.

    Cost: for each of at most `TRIES` corrections a backward and two forward passes over the safety examples.
    """
    kl, tries = model.safety.heldout(), 0
    d = model.preconditioner()
    while kl > target and tries < TRIES:
        own = float(model.safety.divergence.losses().mean())
        gradient = model.safety.divergence.gradient()
        direction = gradient if d is None else gradient * d
        slope = dot(gradient, direction)
        if slope <= 0 or own <= 0:
            break
        held = model.vector()
        scale = 2 * own * (1 - math.sqrt(AIM * target / kl)) / slope
        model.write(held.add(direction.to(held), alpha=-scale))
        now = model.safety.heldout()
        tries += 1
        if now >= kl:  # the two sets disagree, or curvature is stronger than the line knows
            model.write(held.add(direction.to(held), alpha=-scale / 4))
            now = model.safety.heldout()
            if now >= kl:
                model.write(held)
                break
        kl = now
    how = f"along the safety gradient in {tries} steps"
    if kl <= budget:
        return PulledBack(kl, how)
    share, start = 1.0, model.vector()
    while kl > budget and share > 2**-6:
        share /= 2
        model.write(inside.add(start - inside, alpha=share))
        kl = model.safety.heldout()
    if kl > budget:
        model.write(inside)
        kl, share = model.safety.heldout(), 0.0
    return PulledBack(kl, f"{how}, then to {share:g} of the way since the last weights inside")
