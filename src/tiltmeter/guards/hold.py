"""Moving the weights back until the safety energy is allowed: exactly where directions are dense, else step by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltmeter.geometry.sensitivity import Basis, DenseBasis
from tiltmeter.geometry.space import products
from tiltmeter.guards.ellipsoid import onto_ellipsoid

#: Steps downhill in a space too large for dense directions; what they leave over is taken up at the next projection.
STEPS_DOWNHILL = 3


def hold(basis: Basis, z: Tensor, eigenvalues: Tensor, d: Tensor | None, allowed: float) -> tuple[Tensor, Tensor]:
    """A small move after which the energy 1/2 z' Lambda z is allowed.

    Args:
        basis: the directions V [n, k].
        z: coordinates [k] of the weights.
        eigenvalues: Lambda [k].
        d: diagonal [n] of the optimiser's metric; None for the plain one.
        allowed: energy, nats.

    Returns: the move [n], and the change of the coordinates [k] that comes of it.

    Cost: k^2 / 2 inner products for dense directions. Else a backward pass over the examples under plain descent, and
        at most `STEPS_DOWNHILL` times a backward pass and a JVP in another metric, whose V'DV would take 2 k passes.
    """
    if d is not None and not isinstance(basis, DenseBasis):
        return downhill(basis, z, eigenvalues, d, allowed)
    metric = torch.eye(z.numel(), dtype=torch.float64)
    if d is not None and isinstance(basis, DenseBasis):
        metric = products(basis.columns, basis.columns, d)
    wanted = onto_ellipsoid(z, metric, eigenvalues, allowed) - z
    move = basis.lift(torch.linalg.solve(metric, wanted))
    return (move if d is None else move.mul_(d)), wanted


def downhill(basis: Basis, z: Tensor, eigenvalues: Tensor, d: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """Steepest descent of the energy in the optimiser's metric, to where it is allowed; arguments as for `hold`.

    Along u = D V Lambda z the coordinates change by q = V'u, so that the energy is a parabola in the length t of the
    step: e - t b + t^2 c / 2 with b = z' Lambda q and c = q' Lambda q. The step ends where it meets the allowed energy,
    or at its lowest point.
    """
    start, z = z, z.double()
    move = torch.zeros_like(d)
    for _ in range(STEPS_DOWNHILL):
        excess = float((eigenvalues * z.square()).sum()) / 2 - allowed
        if excess <= 0:
            break
        u = basis.lift(eigenvalues * z).mul_(d)
        q = basis.coordinates(u).double().cpu()
        b, c = float((eigenvalues * z * q).sum()), float((eigenvalues * q.square()).sum())
        if b <= 0 or c <= 0:
            break
        root = b * b - 2 * c * excess
        t = (b - math.sqrt(root)) / c if root > 0 else b / c
        move.add_(u.to(move), alpha=-t)
        z = z - t * q
    return move, z - start
