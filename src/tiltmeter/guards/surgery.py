"""Gradient surgery: what a task's gradient would do against safety is taken out of it.

Source: SafeGrad (arXiv:2508.07172), after PCGrad (Yu et al. 2020, arXiv:2001.06782).
"""

from __future__ import annotations

from torch import Tensor

from tiltmeter.geometry.space import blocks, products


def remove_conflict(task: Tensor, safety: Tensor, strength: float = 1.0, d: Tensor | None = None) -> bool:
    """Take out of the task's gradient, in place, what would raise the safety loss to first order.

    A step along -D g changes the safety loss by -s'D g. Where that is a rise, s is added to g until it is none:
    g - s (s'D g) / (s'D s).

    Args:
        task: gradient g of the task [n], changed.
        safety: gradient s of the safety loss [n].
        strength: share of the conflict that is removed.
        d: diagonal D [n] of the metric in which steps are taken; None for plain descent.

    Returns: whether there was a conflict.

    Cost: two inner products; no vector of length n is made.
    """
    square, conflict = products((safety,), (safety, task), d)[0].tolist()
    if square <= 0 or conflict >= 0:
        return False
    for mine, theirs in blocks(task, safety):
        mine.add_(theirs, alpha=-strength * conflict / square)
    return True
