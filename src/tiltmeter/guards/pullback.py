"""Bringing a model back inside its safety budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tiltmeter.geometry.space import dot, multiply
from tiltmeter.guards.safety import draw
from tiltmeter.guards.trainee import Trainee

#: Corrections along fresh safety gradients before the last resort. More bring little: by then the guard's own examples
#: are as good as at the anchor, and only the held-out ones are not.
TRIES = 2

#: Keeps what is drawn here apart from what a guard draws for its steps: the same seed would draw the same examples
#: again, whose KL has just been lowered.
STREAM = 1_000_003

#: A step aims for this share of the target: one that aims for it exactly comes to rest a little above, again and again.
AIM = 0.85

#: A step that leaves less than this share of what it aimed for has gone too far.
FAR = 0.8


@dataclass(frozen=True)
class PulledBack:
    """What became of it.

    Attributes:
        kl: held-out KL afterwards, nats.
        how: in words.
        retreated: the safety gradient did not suffice, and the model went back along its way.
    """

    kl: float
    how: str
    retreated: bool = False


def pull_back(
    model: Trainee,
    kl: float,
    target: float,
    budget: float,
    inside: Tensor | None,
    known: Tensor | None = None,
    most: int | None = None,
) -> PulledBack:
    """Lower the held-out KL to `target` if that is cheap, and below `budget` in any case.

    First along the safety gradient in the optimiser's metric: along one that is known already, which costs no backward
    pass, then along fresh ones. If that does not suffice, back along the way since `inside`, halving it.

    Args:
        model: what is trained.
        kl: held-out KL as it stands, nats.
        target: held-out KL to aim for, nats.
        budget: held-out KL that must not be exceeded.
        inside: weights [n] that were within the budget; None if none are known, and then there is no way back.
        known: a recent gradient of the safety KL [n], if there is one.
        most: examples that a fresh gradient is taken of, drawn anew each time; None for all.

    Cost: at most three forward passes over the held-out examples along the known gradient; for each of at most `TRIES`
        fresh ones besides a forward pass over the guard's own and a forward and a backward one over `most` of them; at
        most seven more held-out passes on the way back.
    """
    tries = 0
    if known is not None:  # of examples whose KL is not known now: the held-out one stands for it
        kl, tries = _correct(model, kl, target, known, kl), 1
    divergence = model.safety.divergence
    for i in range(TRIES):
        if kl <= target:
            break
        losses = divergence.losses().double().cpu()
        drawn = None
        if most is not None and most < divergence.m:
            drawn = draw(divergence.m, most, STREAM * (model.seed + 1) + TRIES * model.step + i)
        own = float(losses.mean() if drawn is None else losses @ drawn)  # of the examples that the gradient is of
        now = _correct(model, kl, target, divergence.gradient(drawn), own)
        tries += 1
        if now == kl:
            break
        kl = now
    how = f"along the safety gradient in {tries} steps"
    if kl <= budget or inside is None:
        return PulledBack(kl, how)
    share, way = 1.0, model.vector().sub_(inside)
    while kl > budget and share > 2**-6:
        share /= 2
        model.go(inside, way, share)
        kl = model.safety.heldout()
    if kl > budget:
        model.write(inside)
        kl, share = model.safety.heldout(), 0.0
    return PulledBack(kl, f"{how}, then to {share:g} of the way since the last weights inside", True)


def _correct(model: Trainee, kl: float, target: float, gradient: Tensor, own: float) -> float:
    """One step down a gradient [n] of examples with the KL `own`; a quarter of it if that is too long, else none.

    The step is that after which their KL has fallen in the proportion that is wanted of the held-out one, if it were a
    square in that direction: from u to r u takes 2 (1 - sqrt r) u over the slope. Where the held-out KL falls much
    further, which the task would pay for, the step is shortened to where its root, even along the line, meets the aim.

    Returns: held-out KL afterwards, nats; as it was if neither step lowers it.
    """
    d = model.preconditioner()
    direction = gradient if d is None else multiply(d, gradient)
    slope = dot(gradient, direction)
    if slope <= 0 or own <= 0:
        return kl
    held = model.vector()
    scale = 2 * own * (1 - math.sqrt(AIM * target / kl)) / slope
    for part in (1.0, 0.25):  # the two sets may disagree, or curvature be stronger than the line knows
        model.go(held, direction, -part * scale)
        now = model.safety.heldout()
        if now >= kl:
            continue
        aim = AIM * target
        if now < FAR * aim:
            shorter = part * (math.sqrt(kl) - math.sqrt(aim)) / (math.sqrt(kl) - math.sqrt(max(0.0, now)))
            model.go(held, direction, -shorter * scale)
            near = model.safety.heldout()
            if near <= target:
                return near
            model.go(held, direction, -part * scale)
        return now
    model.write(held)
    return kl
