"""How a fine-tune starts to move, and how fast that motion turns into the safety directions.

Gradient flow theta' = -g has theta'' = H g, so

    theta(t) - anchor = -t g + t^2/2 H g + O(t^3)

and the safety KL along it starts as u(t) = 1/2 (t^2 e0^2 + t^3 c + t^4 Gamma^2 / 4): half the variance over answers of
the first two path derivatives of log p. Squares of noisy means are too large by the noise, so every square here is a
product of different mini-batches. (The KL's own cubic term, t^3/6 E[phi_1^3], is left out: it is small where the
overlap is, and where it is not the forecast goes through the network.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.errors import DegenerateError, NumericalError
from tiltmeter.geometry.krylov import Krylov, lanczos
from tiltmeter.geometry.objective import Objective, SoftmaxObjective
from tiltmeter.geometry.space import norm

#: Above so many parameters, vectors that only tell a sampling error are kept in bfloat16.
LARGE = 2**25


@dataclass(frozen=True)
class Slope:
    """Mini-batch gradients of a fine-tuning loss at one point.

    Attributes:
        mean: [n], the mean over batches, each clipped as the recipe clips.
        spread: [n], standard deviation over batches (of one batch, not of their mean); zero for a single batch. In
            bfloat16 when n is large. Of a tuning set it is rescaled to the recipe's batches (`jobs.tuning`).
        groups: mean gradients of a few disjoint groups of batches, each [n]; their scatter is the sampling error.
        group_weights: weights [J, m] of the examples in each group.
        norms: [B], norm of every batch gradient before clipping.
    """

    mean: Tensor
    spread: Tensor
    groups: tuple[Tensor, ...]
    group_weights: Tensor
    norms: Tensor


def measure_slope(
    objective: Objective,
    batches: Tensor,
    *,
    clip: float | None = None,
    displacement: Tensor | None = None,
    groups: int = 4,
) -> Slope:
    """Gradient of every mini-batch, kept as mean, spread and a few group means.

    Args:
        objective: the fine-tuning loss over m examples.
        batches: [B, m], the weights with which a batch's loss is made of the examples' losses; rows with zeros for
            examples outside the batch.
        clip: largest gradient norm, as in the recipe; None for no clipping.
        displacement: where, relative to the anchor.
        groups: how many disjoint groups of batches to keep apart (fewer when there are fewer batches).

    Raises:
        NumericalError: a gradient is not finite.
        DegenerateError: there is no batch.

    Cost: one forward+backward over all examples; memory 3 + groups vectors (groups and spread in bfloat16 when n is
        large).
    """
    count = batches.shape[0]
    if count == 0:
        raise DegenerateError("expected at least one tuning batch, got none")
    parts = torch.tensor_split(torch.arange(count), min(groups, count))
    if count == 1:
        alone: list[float] = []
        only = _clipped(objective.gradient(batches[0], displacement), 0, clip, alone)
        return Slope(only, narrow(torch.zeros_like(only)), (only,), batches.clone(), torch.tensor(alone).double())
    mean = torch.zeros(())  # widened by the first gradient
    square = torch.zeros(())
    kept: list[Tensor] = []
    norms: list[float] = []
    for members in parts:
        total = torch.zeros(())
        for index in members.tolist():
            gradient = _clipped(objective.gradient(batches[index], displacement), index, clip, norms)
            if len(norms) == 2:  # the first square is made when the second gradient is there: two batches never hold it
                square = mean.square()
            if len(norms) > 1:
                square.addcmul_(gradient, gradient)
            mean = _add(mean, gradient)
            if len(parts) > 1:
                total = _add(total, gradient)
            del gradient  # before the next one is made
        if len(parts) > 1:
            kept.append(narrow(total.div_(len(members))))
        del total
    mean.div_(count)
    spread = square.div_(count).addcmul_(mean, mean, value=-1).clamp_min_(0).sqrt_()
    weights = torch.stack([batches[members].mean(0) for members in parts])
    return Slope(mean, narrow(spread), tuple(kept) or (mean,), weights, torch.tensor(norms, dtype=torch.float64))


def _add(total: Tensor, vector: Tensor) -> Tensor:
    """A running sum that starts as a scalar zero."""
    return vector.clone() if total.ndim == 0 else total.add_(vector)


def _clipped(gradient: Tensor, index: int, clip: float | None, norms: list[float]) -> Tensor:
    """The gradient of one batch as the recipe clips it; its norm before is appended to `norms`."""
    size = norm(gradient)
    if not size < float("inf"):
        raise NumericalError(f"the gradient of tuning batch {index} is not finite; check the data and the dtype")
    norms.append(size)
    return gradient.mul_(clip / size) if clip is not None and size > clip else gradient


@dataclass(frozen=True)
class Acceleration:
    """H g, with the Hessian and the gradient taken from different parts of the data.

    Attributes:
        value: [n], mean of two estimates.
        half_difference: [n], half their difference: its scatter is the sampling error.
    """

    value: Tensor
    half_difference: Tensor


def measure_acceleration(objective: Objective, slope: Slope) -> Acceleration:
    """H g by cross products of parts of the data, free of the bias that one batch has with itself.

    With four groups or more the two estimates are (H_1 g_2 + H_2 g_1) / 2 and (H_3 g_4 + H_4 g_3) / 2: each is free of
    bias, and so is any product of the two, since they share no data. With two or three groups they are H_1 g_2 and
    H_2 g_1: each is free of bias, but their product is not, because H_1 and g_1 come from the same examples.

    Raises:
        DegenerateError: the slope has a single group, so there are no two parts.

    Cost: four HVPs over a quarter of the data each (two over half of it each below four groups).
    Error: in a linear regression with 16 examples a part, the squared length of H g came out 53 % too large from two
        halves, and right within its error of 1 % from four quarters.
    """
    if len(slope.groups) < 2:
        raise DegenerateError("expected at least two tuning batches to tell curvature from noise, got one")
    parts = torch.tensor_split(torch.arange(len(slope.groups)), 4 if len(slope.groups) >= 4 else 2)

    def cross(here: Tensor, there: Tensor) -> Tensor:
        gradient = _mean([slope.groups[i] for i in there.tolist()])
        return objective.hvp(gradient, slope.group_weights[here].mean(0))

    if len(parts) == 2:
        first = narrow(cross(parts[0], parts[1]))
        second = cross(parts[1], parts[0])
    else:
        # what waits for the next product is kept narrow: this is where memory is fullest
        waiting = narrow(cross(parts[0], parts[1]))
        first = cross(parts[1], parts[0])
        _halve(first, waiting)
        first = narrow(first)
        waiting = narrow(cross(parts[2], parts[3]))
        second = cross(parts[3], parts[2])
        _halve(second, waiting)
        del waiting
    scatter = _halve(second, first)
    return Acceleration(second, scatter)


def _halve(one: Tensor, other: Tensor) -> Tensor:
    """Put the mean of two vectors [n] into the first; returns half of other - one, in the dtype of the second.

    Piece by piece: sums of vectors of two dtypes make whole copies on a CPU.
    """
    out = torch.empty_like(other)
    for start in range(0, one.numel(), 2**20):
        part = slice(start, start + 2**20)
        wide = other[part].to(one.dtype)
        out[part] = (wide - one[part]) / 2
        one[part] = (wide + one[part]) / 2
    return out


def narrow(vector: Tensor) -> Tensor:
    """A vector [n] in bfloat16 (three digits) where n is large."""
    return vector.to(torch.bfloat16) if vector.numel() > LARGE else vector


def _mean(vectors: Sequence[Tensor]) -> Tensor:
    """Mean of a few vectors [n] in their own dtype."""
    if len(vectors) == 1:
        return vectors[0]
    out = vectors[0].float() if vectors[0].dtype == torch.bfloat16 else vectors[0].clone()
    for vector in vectors[1:]:
        out.add_(vector)
    return out.div_(len(vectors)).to(vectors[0].dtype)


def measure_krylov(objective: Objective, slope: Slope, k: int) -> Krylov:
    """Krylov space of the Hessian from the mean gradient. Cost: k HVPs."""
    return lanczos(objective.hvp, slope.mean, k)


@dataclass(frozen=True)
class Coupling:
    """Per safety prompt, how the fine-tune's first motion moves its answer; all [m], nats per flow time to a power.

    Attributes:
        overlap: e0^2 = g' F g, nats per flow time squared, free of noise bias (it can come out below zero).
        overlap_groups: [m, J, J], g_i' F g_j for the groups of batches.
        cross: coefficient of t^3 in 2 u(t).
        coupling: gamma^2 = (H g)' F (H g), free of noise bias with four groups of batches or more.
        full: Gamma^2, the variance of the second path derivative; equal to gamma^2 where log p is flat.
    """

    overlap: Tensor
    overlap_groups: Tensor
    cross: Tensor
    coupling: Tensor
    full: Tensor

    def polynomial(self, flow_time: Tensor) -> Tensor:
        """u(t) = 1/2 (e0^2 t^2 + cross t^3 + Gamma^2 t^4 / 4) for flow times [s]: [s, m], nats."""
        t = flow_time[:, None].double()
        return (self.overlap * t**2 + self.cross * t**3 + self.full * t**4 / 4) / 2


def between_groups(forms: Tensor) -> Tensor:
    """Mean of v_i' F v_j over i != j, [m], from forms [m, J, J]: the square of the mean without the noise's own square.

    With a single group there is nothing to compare, and the plain square is returned.
    """
    j = forms.shape[-1]
    if j == 1:
        return forms[:, 0, 0]
    diagonal = torch.diagonal(forms, dim1=-2, dim2=-1).sum(-1)
    return (forms.sum((-2, -1)) - diagonal) / (j * (j - 1))


def measure_coupling(
    safety: SoftmaxObjective, slope: Slope, acceleration: Acceleration, overlap_groups: Tensor | None = None
) -> Coupling:
    """Measure initial overlap and curvature coupling with the exact softmax; no subspace is needed.

    Args:
        safety: KL of the aligned model's answers.
        slope: gradients of the fine-tuning loss at the same anchor.
        acceleration: its H g.
        overlap_groups: `safety.fisher_form(slope.groups)` if it is known already; the groups are then not needed.

    Cost: J + 2 JVPs and one second-order directional pass over the safety set.
    Error: exact for these prompts and batches, up to float32 rounding.
    Source: Springer et al. 2026, arXiv:2602.15799, definition 5.1; the constant Gamma is derived in docs/theory.md.
    """
    forms = safety.fisher_form(slope.groups) if overlap_groups is None else overlap_groups
    turn = safety.fisher_form([acceleration.value, acceleration.half_difference])
    # along +g the first derivative changes sign and the second does not: no negated copy of g is needed
    path = safety.path_form(slope.mean, acceleration.value)
    gamma = turn[:, 0, 0] - turn[:, 1, 1]
    # log p's own curvature rides on the mean gradient, whose noise it squares too; only the H g part is corrected.
    full = path[:, 1, 1] - turn[:, 1, 1]
    return Coupling(between_groups(forms), forms, -path[:, 0, 1], gamma, full)
