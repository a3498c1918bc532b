"""Claims about the safety loss itself: its Hessian, its lower bound, and how its sensitive directions turn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltmeter.geometry.objective import SoftmaxFunction
from tiltmeter.geometry.sensitivity import Sensitivity, measure_sensitivity
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, orthogonal_slope, score_objective
from tiltmeter.geometry.systems_saddle import TurningAxis
from tiltmeter.jobs.theory_claim import AIC, OURS, Claim, each, limit


def kl_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _hessian(seed),
        _fisher_form(seed),
        _flat(seed),
        _energy(seed),
        _lower_bound(seed),
        _turning(),
        _davis_kahan(seed),
    ]


def _direction(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n, dtype=DOUBLE, generator=generator)
    unit: Tensor = v / v.norm()
    return unit


def _hessian(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        model, v = CurvedSoftmax.random(3, 5, 8, seed, scale), _direction(8, seed + 1)
        return float(v @ model.fisher(torch.zeros_like(v)).mean(0) @ v), float(v @ model.safety.hvp(v))

    return Claim(
        "kl-hessian",
        "The Hessian of the safety KL at the anchor is the Fisher matrix E[s s'], curved logits or not.",
        f"{AIC}, section 3",
        "random curved softmax, 3 prompts; v'Fv from score products against the Hessian product; scale = sharpness",
        **each(pair),
        tolerance=1e-10,
    )


def _fisher_form(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        model, v, w = CurvedSoftmax.random(3, 5, 8, seed, scale), _direction(8, seed + 1), _direction(8, seed + 2)
        return float(v @ model.fisher(torch.zeros_like(v))[1] @ w), float(model.safety.fisher_form([v, w])[1, 0, 1])

    return Claim(
        "fisher-form",
        "One forward-mode pass per direction gives v'F w of every prompt, without sampling answers.",
        OURS,
        "random curved softmax, second prompt; scale = sharpness",
        **each(pair),
        tolerance=1e-10,
    )


def _flat(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(3, 5, 8, seed, scale)
        sharp = model.fisher(torch.zeros(8, dtype=DOUBLE)).mean(0).trace().sqrt()
        return 0.0, float(model.safety.gradient().norm() / sharp)

    return Claim(
        "kl-slope",
        "The safety KL has no slope at the anchor, so no first-order quantity of it can warn.",
        f"{AIC}, section 3",
        "random curved softmax; norm of the gradient over sqrt(tr F); scale = sharpness",
        **each(pair),
        tolerance=1e-12,
    )


def _energy(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(1, 5, 8, seed, scale)
        sensitivity = measure_sensitivity(score_objective(model.safety), 3)
        v = sensitivity.lift(torch.tensor([0.6, -0.5, 0.4], dtype=DOUBLE))
        start = 1e-3 / math.sqrt(scale)
        exact = limit(lambda r: float(model.kl(r * v).mean()) / r**2, start)
        return exact, float(sensitivity.energy(sensitivity.coordinates(v)))

    return Claim(
        "energy",
        "Inside the sensitive subspace M the safety KL starts as 1/2 z' Lambda z.",
        f"{AIC}, theorem 6.1",
        "random curved softmax, rank 3 of 4; exact KL over squared length; scale = sharpness",
        **each(pair),
        tolerance=1e-5,
    )


def _lower_bound(seed: int) -> Claim:
    """Largest violation of u >= energy - C r^3, in units of C r^3, must not exceed zero."""

    def pair(scale: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(1, 5, 8, seed)
        flat = CurvedSoftmax(model.bias, model.slopes, torch.zeros_like(model.bends))
        sensitivity = measure_sensitivity(score_objective(flat.safety), 2)
        worst = -math.inf
        for index in range(40):
            v = scale * _direction(8, seed + 100 + index)
            reach = flat.slopes @ v
            third = float(reach.max() - reach.min()) ** 3 / (36 * math.sqrt(3))
            energy = float(sensitivity.energy(sensitivity.coordinates(v)))
            worst = max(worst, (energy - float(flat.kl(v).mean())) / third)
        return 1.0, worst

    return Claim(
        "lower-bound",
        "u >= 1/2 ||F^(1/2) P x||^2 - C ||x||^3; for flat logits C ||x||^3 = (range of a_y'x)^3 / (36 sqrt 3).",
        f"{AIC}, theorem 6.1; the constant: {OURS}",
        "random flat softmax, rank 2 of 4, worst of 40 directions of (bound - u) / C r^3; scale = length r",
        **each(pair, (1e-3, 1e-1, 10.0)),
        tolerance=1e-9,
        relation="<=",
    )


def _top(model: SoftmaxFunction, rank: int) -> tuple[Sensitivity, Tensor]:
    """The measured subspace and its columns V [n, rank]."""
    sensitivity = measure_sensitivity(score_objective(model), rank)
    return sensitivity, torch.stack([sensitivity.lift(e) for e in torch.eye(rank, dtype=DOUBLE)], 1)


def _turning() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = TurningAxis(sharpness=4.0, turning=scale)
        before = _top(SoftmaxFunction(system.logits, torch.zeros(3, dtype=DOUBLE)), 1)[0]
        after = _top(SoftmaxFunction(system.logits, system.displacement(0.3)), 1)[1][:, 0]
        return system.sine(0.3), float((after - before.lift(before.coordinates(after))).norm())

    return Claim(
        "subspace-turns",
        "Sensitive directions turn along the path (here by arctan(q t)) even while the KL is still exactly zero.",
        OURS,
        "fair coin with log-odds x + q y z, flow time 0.3; sine of the angle; scale = q",
        **each(pair),
        tolerance=1e-9,
    )


def _davis_kahan(seed: int) -> Claim:
    """Sine of the largest angle between the top-2 subspaces, against ||F(t) - F(0)|| / gap."""
    scales = (1e-3, 1e-2, 3e-2, 1e-1)

    def pair(flow_time: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(2, 4, 8, seed)
        slope = orthogonal_slope(model, seed + 3)
        eigenvalues = [2.0, 1.0, -0.5, 0.3, 0.0, 1.5, -1.0, 0.7]
        x = Quadratic.with_spectrum(slope, eigenvalues, seed + 4).displacement(flow_time)
        zero = torch.zeros_like(x)
        first, after = model.fisher(zero).mean(0), model.fisher(x).mean(0)
        gap = float(torch.linalg.eigvalsh(first)[-2] - torch.linalg.eigvalsh(after)[-3])
        bound = float(torch.linalg.matrix_norm(after - first, 2)) / gap if gap > 0 else 1.0
        left = _top(SoftmaxFunction(model.safety.logits, zero), 2)[1]
        right = _top(SoftmaxFunction(model.safety.logits, x), 2)[1]
        sine = torch.linalg.matrix_norm(right - left @ (left.T @ right), 2)
        return min(1.0, bound), float(sine)

    return Claim(
        "davis-kahan",
        "Along the path the sensitive subspace turns by at most ||F(t) - F(0)|| / (lambda_d(0) - lambda_(d+1)(t)).",
        "Davis and Kahan 1970, sin-theta theorem",
        "random curved softmax on an exact gradient flow, d = 2; scale = flow time",
        **each(pair, scales),
        tolerance=1e-9,
        relation="<=",
    )
