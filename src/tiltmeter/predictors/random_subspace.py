"""The gradient's norm inside a random subspace of the safety subspace's rank: what any subspace would say.

Source: the null asked for by the finding that no subspace governs safety alone, arXiv:2505.14185.
"""

from __future__ import annotations

import math

import torch

from tiltmeter.geometry.space import dot, norm
from tiltmeter.predictors.contract import Case, Risk, gradient_of, known, passes

#: Rank where there is no safety subspace to copy it from.
RANK = 8


def random_subspace(case: Case) -> Risk:
    """Root of the sum of squared products with random unit vectors, drawn alike for every tuning set.

    The vectors are not made orthogonal: in large spaces they nearly are, and the mean square, ||g||^2 rank / n, is the
    same. Cost: one gradient, no pass over the safety set.
    """
    price = passes(case, tuning={"forward_backward": 1})
    gradient = gradient_of(case)
    rank = RANK if case.sensitivity is None else case.sensitivity.rank
    generator = torch.Generator().manual_seed(case.seed)
    total = 0.0
    for _ in range(rank):
        vector = torch.randn(gradient.numel(), generator=generator, dtype=gradient.dtype).to(gradient.device)
        total += (dot(vector, gradient) / norm(vector)) ** 2
    return known(math.sqrt(total), "nats per parameter unit", price, "the gradient is not finite")
