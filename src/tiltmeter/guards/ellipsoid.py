"""The smallest move, in the optimiser's metric, after which the safety energy is within a budget."""

from __future__ import annotations

import torch
from torch import Tensor


def onto_ellipsoid(z: Tensor, metric: Tensor, eigenvalues: Tensor, budget: float) -> Tensor:
    r"""Closest coordinates z' with 1/2 z' Lambda z <= budget.

    Minimises (z' - z)' M^-1 (z' - z) with M = V'DV, the cost of a move D V M^-1 (z' - z) in the metric x'D^-1 x. The
    solution is z' = (1 + mu M Lambda)^-1 z, and the energy along mu is a sum of terms that fall: in the eigenvectors of
    M^(1/2) Lambda M^(1/2) it is 1/2 sum s_i w_i^2 / (1 + mu s_i)^2, so mu is found by bisection.

    Args:
        z: [k].
        metric: M [k, k], symmetric and positive.
        eigenvalues: Lambda [k], nats per parameter unit squared, positive.
        budget: nats, at least 0; at 0 the answer is 0.

    Returns: z' [k], float64; z itself where it is inside.

    Error: the energy meets the budget to 1e-10, relative.
    """
    z, metric, eigenvalues = z.double(), metric.double(), eigenvalues.double()
    if float((eigenvalues * z.square()).sum()) / 2 <= budget:
        return z
    if budget <= 0:
        return torch.zeros_like(z)
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-14 * float(values[-1]))
    root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
    s, q = torch.linalg.eigh(root @ torch.diag(eigenvalues) @ root)
    s = s.clamp_min(0)
    w = q.T @ (inverse @ z)

    def energy(mu: float) -> float:
        return float((s * w.square() / (1 + mu * s).square()).sum()) / 2

    low, high = 0.0, 1.0 / float(s[-1])
    while energy(high) > budget:
        low, high = high, 4 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if energy(middle) > budget else (low, middle)
        if high - low <= 1e-14 * high:
            break
    inside: Tensor = root @ (q @ (w / (1 + high * s)))
    return inside
