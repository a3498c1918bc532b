"""How far the weights have moved, and how much of that lies in the directions the refusals are sensitive to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiltmeter.geometry.sensitivity import Basis, DenseBasis, SampleBasis, Sensitivity
from tiltmeter.geometry.space import dot, norm
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.gathered import as_part, own_part
from tiltmeter.lm.objective import likelihood_objective
from tiltmeter.lm.sharding import whole
from tiltmeter.tracking.anchor import Anchor, TrackerOptions
from tiltmeter.tracking.path import Sketch


@dataclass(frozen=True)
class Drift:
    """Where the weights are, seen from the anchor.

    Attributes:
        weight_change: norm of the displacement, parameter units.
        coordinates: V' displacement, [k], parameter units; None where it was not measured.
        energy: 1/2 z' Lambda z, nats: the second-order safety loss inside the subspace.
        outside: norm of the displacement outside the subspace.
        reason: why there are no coordinates.
        sketch: of the displacement, [d]; None on another kind of device than the anchor's.
    """

    weight_change: float | None
    coordinates: Tensor | None
    energy: float | None
    outside: float | None
    reason: str | None
    sketch: Tensor | None


def subspace(anchor: Anchor, forward: Forward, pad: int, options: TrackerOptions) -> Sensitivity | None:
    """The anchor's safety subspace as a basis at the anchor, whatever the model's weights are now; None without one."""
    if anchor.eigenvalues is None or anchor.coefficients is None:
        return None
    basis: Basis
    if anchor.columns:
        basis = DenseBasis(forward.space, anchor.columns)
    elif anchor.weights:
        frozen = {
            name: nn.Parameter(as_part(anchor.weights[name], p), requires_grad=False)
            for name, p in forward.parameters.items()
        }
        there = Forward(forward.model, frozen)
        score = likelihood_objective(there, anchor.safety.responses, pad, options.max_tokens, per="root")
        basis = SampleBasis(score, anchor.coefficients)
    else:
        return None
    return Sensitivity(anchor.eigenvalues, anchor.eigenvalues, None, basis)


def measure_drift(
    anchor: Anchor, forward: Forward, sensitivity: Sensitivity | None, options: TrackerOptions, *, dear: bool
) -> Drift:
    """Measure the displacement of the trained parameters from the anchor.

    Args:
        anchor: where the run began.
        forward: the model as it is now.
        sensitivity: the anchor's safety subspace.
        options: seed of the sketch.
        dear: also measure coordinates that cost a JVP over the answers.

    Cost: one read of the weights, the sketch, and k inner products (or one JVP where directions are not kept).
    Error: exact in float32 where the weights are held; else the sketch's, 1.6 % of the norm (one standard deviation).
    """
    sketch = Sketch(seed=options.seed)
    same = anchor.device == forward.device.type
    if not anchor.weights:
        moved = sketch.of(whole(p.detach()) for p in forward.parameters.values()) - anchor.sketch if same else None
        reason = anchor.no_subspace or (
            f"the trained space has {forward.whole.size:,} parameters; above the limit only a sketch is kept"
        )
        return Drift(None if moved is None else float(moved.norm()), None, None, None, reason, moved)
    parts = {name: _wide(own_part(p)) - _wide(anchor.weights[name]) for name, p in forward.parameters.items()}
    moved = sketch.of(whole(as_part(parts[name], p)) for name, p in forward.parameters.items()) if same else None
    if sensitivity is None or not (dear or isinstance(sensitivity.basis, DenseBasis)):
        size = math.sqrt(sum(dot(part.reshape(-1), part.reshape(-1)) for part in parts.values()))
        reason = anchor.no_subspace or "costs a JVP in this space; measured at steps 1, 2, 4, 8, ... and at the end"
        return Drift(size, None, None, None, reason, moved)
    displacement = forward.space.flatten(parts)
    del parts
    size = norm(displacement)
    z = sensitivity.coordinates(displacement).double() if size else torch.zeros(sensitivity.rank, dtype=torch.float64)
    outside = math.sqrt(max(0.0, size**2 - float(z.square().sum())))
    return Drift(size, z, float(sensitivity.energy(z)), outside, None, moved)


def subspace_overlap(before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> float:
    """Mean squared cosine between two subspaces given by orthonormal vectors [n]: 1 the same, k/n unrelated."""
    k = min(len(before), len(now))
    return sum(dot(a, b) ** 2 for a in before[:k] for b in now[:k]) / k


def _wide(p: Tensor) -> Tensor:
    return p if p.dtype in (torch.float32, torch.float64) else p.float()
