"""How long a finite-difference step should be: told by how much it changes what is differentiated.

A central difference of gradients g is wrong by their rounding, over the change it sees, and by the next term of the
expansion, about the square of that change relative to |g|. Neither the parameters' norm nor the direction's says where
the two meet: a length that serves a flat direction is far too long for a sharp one. The change itself says it, so a
step whose change lies outside a window is taken again, longer or shorter. docs/performance.md has the error on a 135 M
model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: First step length for a gradient and for the slope of log-probabilities, as a share of the parameters' norm.
FIRST, FIRST_SLOPE = 3e-7, 4e-8

#: Steps are never shorter or longer than this, as a share of the parameters' norm: a loss without curvature would drive
#: them up until the model is another one.
SHORTEST, LONGEST = 1e-10, 3e-4

#: A first step length is sought on one example in so many, where their change is about that of all.
PILOT = 16

#: A length is well told by a change so many times below the window, or the root of it above.
NEAR = 10.0

#: Differences that are made at most before the last is taken as it is.
ATTEMPTS = 3


@dataclass(frozen=True)
class Window:
    """Relative changes |g(+h) - g(-h)| / (|g(+h)| + |g(-h)|) of a good step.

    Attributes:
        low: below, rounding shows.
        high: above, the next order shows.
        target: what a new step aims at.
    """

    low: float
    high: float
    target: float


#: Chosen on a 135 M model in float32, where rounding shows below the window and the next order above it.
WINDOWS = {torch.float32: Window(2e-3, 2e-2, 8e-3), torch.float64: Window(1e-7, 1e-4, 3e-6)}


def tells(change: float, dtype: torch.dtype) -> bool:
    """Whether `next_length` may be relied on without another try: the change is near enough to the window.

    A change goes with the length where neither rounding nor the next order shows much.
    """
    window = WINDOWS[dtype]
    return window.low / NEAR <= change <= window.high * math.sqrt(NEAR)


def next_length(length: float, change: float, anchor: float, dtype: torch.dtype) -> float:
    """A better step length; the same if this one is good, or cannot be bettered.

    Args:
        length: of the step just tried, parameter units.
        change: the relative change it made.
        anchor: norm of the parameters.
        dtype: of the parameters while they are differentiated.
    """
    window = WINDOWS[dtype]
    if window.low <= change <= window.high:
        return length
    wanted = length * min(1e4, window.target / max(change, 1e-30))
    wanted = min(max(wanted, SHORTEST * anchor), LONGEST * anchor)
    return length if abs(wanted / length - 1) < 0.5 else wanted
