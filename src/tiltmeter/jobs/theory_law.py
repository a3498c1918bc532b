"""Claims about gradient flow near the anchor: the drift and the quartic law with its constants."""

from __future__ import annotations

import math

import torch

from tiltmeter.geometry.forecast import local_exponent
from tiltmeter.geometry.motion import measure_acceleration, measure_slope
from tiltmeter.geometry.sensitivity import measure_sensitivity
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, batches, orthogonal_slope, score_objective
from tiltmeter.geometry.systems_saddle import Saddle
from tiltmeter.jobs.theory_claim import AIC, OURS, Claim, each, limit, measure, measure_saddle

EIGENVALUES = (2.0, 1.0, -0.5, 0.3, 0.0, 1.5, -1.0, 0.7)


def law_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _velocity(seed),
        _acceleration(seed),
        _drift(),
        _quartic_bent(),
        _quartic_random(seed),
        _quartic_flat(),
        _ratio(),
        _counterexample_coupling(),
        _counterexample_full(),
        _counterexample_exponent(),
        _counterexample_constant(),
        _once_weighted(),
        _rival(),
    ]


def _probe(seed: int) -> tuple[Quadratic, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slope, test = torch.randn(2, len(EIGENVALUES), dtype=DOUBLE, generator=generator)
    return Quadratic.with_spectrum(slope, EIGENVALUES, seed + 1), test


def _velocity(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system, test = _probe(seed)
        system = Quadratic.quiet(system.slope, scale * system.hessian)
        start = 1e-3 / scale
        exact = limit(lambda t: float(test @ (system.displacement(t) - system.displacement(-t))) / (2 * t), start)
        return exact, float(test @ -measure_slope(system.objective, batches(4)).mean)

    return Claim(
        "path-velocity",
        "Gradient flow leaves the anchor with velocity -g.",
        f"{AIC}, theorem 6.2",
        "quadratic with positive, zero and negative curvature; exact flow along a random direction; scale = curvature",
        **each(pair),
        tolerance=1e-8,
    )


def _acceleration(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system, test = _probe(seed)
        system = Quadratic.quiet(system.slope, scale * system.hessian)
        start = 1e-2 / scale
        exact = limit(lambda t: float(test @ (system.displacement(t) + system.displacement(-t))) / t**2, start)
        slope = measure_slope(system.objective, batches(4))
        return exact, float(test @ measure_acceleration(system.objective, slope).value)

    return Claim(
        "path-acceleration",
        "Gradient flow accelerates by +H g: theta(t) - anchor = -t g + t^2/2 H g + O(t^3).",
        f"{AIC}, theorem 6.2",
        "quadratic with positive, zero and negative curvature; exact flow along a random direction; scale = curvature",
        **each(pair),
        tolerance=1e-6,
    )


def _drift() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=3.0, sharpness=scale, own=0.5)
        sensitivity = measure_sensitivity(score_objective(system.safety), 1)
        drift = limit(lambda t: math.sqrt(scale) * abs(system.position(t)[0]) / t**2, 1e-3)
        motion = measure_saddle(system)
        weighted = sensitivity.energy(sensitivity.coordinates(motion.acceleration.value))
        return drift, math.sqrt(2 * float(weighted)) / 2

    return Claim(
        "drift",
        "From an orthogonal start the weighted drift ||F^(1/2) P (theta(t) - anchor)|| is gamma t^2 / 2.",
        f"{AIC}, theorem 6.2",
        "saddle y + 3xy + y^2/4, exact drift over t^2 against gamma / 2; scale = sharpness lambda",
        **each(pair),
        tolerance=1e-6,
    )


def _quartic_bent() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=2.0, sharpness=scale, own=0.5, bend=1.5)
        exact = limit(lambda t: system.kl(t) / t**4, 0.02 / math.sqrt(max(1.0, scale)))
        return exact, measure_saddle(system).law(1.0)

    return Claim(
        "quartic-onset",
        "From an orthogonal start u = t^4/8 Gamma^2 + O(t^5), Gamma^2 = E[(s'Hg + g'Ag)^2].",
        OURS,
        "saddle with curved log-probabilities (bend 1.5), exact KL over t^4; scale = sharpness lambda",
        **each(pair),
        tolerance=1e-4,
    )


def _quartic_random(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(3, 3, 8, seed)
        slope = orthogonal_slope(model, seed + 1)
        tuning = Quadratic.with_spectrum(slope, [scale * e for e in EIGENVALUES], seed + 2)
        model = CurvedSoftmax(model.bias, model.slopes, scale * model.bends)
        exact = limit(lambda t: float(model.kl(tuning.displacement(t)).mean()) / t**4, 1e-2 / max(1.0, scale))
        return exact, measure(tuning.objective, model.safety).law(1.0)

    return Claim(
        "quartic-onset-dense",
        "The same constant on models without any symmetry, averaged over prompts.",
        OURS,
        "random curved softmax, 3 prompts, random quadratic loss with F g = 0; scale = curvature of both",
        **each(pair),
        tolerance=1e-4,
    )


def _quartic_flat() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=scale, sharpness=5.0)
        exact = limit(lambda t: system.kl(t) / t**4, 0.02 / scale)
        coupling = measure_saddle(system).coupling
        return exact, float(coupling.coupling.mean()) / 8

    return Claim(
        "quartic-flat",
        "Where the log-probabilities are flat the constant is gamma^2 / 8 (lambda c^2 / 8 for the saddle).",
        f"{AIC}, corollary 6.3, with its constant: {OURS}",
        "saddle y + cxy with lambda = 5, x(t) = (cosh ct - 1)/c; scale = c",
        **each(pair),
        tolerance=1e-4,
    )


def _ratio() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=2.0, sharpness=scale, own=0.3, bend=1.5)
        coupling = measure_saddle(system).coupling
        return system.full / system.coupling, float(coupling.full / coupling.coupling)

    return Claim(
        "gamma-is-not-all",
        "Curved log-probabilities can make Gamma^2 more than six times gamma^2 (here (1 + 1.5)^2).",
        OURS,
        "saddle with bend 1.5; measured Gamma^2 / gamma^2; scale = sharpness lambda",
        **each(pair),
        tolerance=1e-9,
    )


def _cancelling(scale: float) -> Saddle:
    return Saddle(curvature=1.3 * scale, sharpness=2.0, own=0.8 * scale, bend=-1.0)


def _counterexample_coupling() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _cancelling(scale)
        coupling = measure_saddle(system).coupling
        return 2.0 * (1.3 * scale) ** 2, float(coupling.coupling.mean())

    return Claim(
        "counter-example-aic",
        "Counter-example, part 1: the instability condition holds, with gamma^2 = lambda c^2 > 0 and P g = 0.",
        OURS,
        "saddle whose log-probabilities bend against the coupling (bend -1); scale = curvature",
        **each(pair),
        tolerance=1e-9,
    )


def _counterexample_full() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _cancelling(scale)
        coupling = measure_saddle(system).coupling
        return 0.0, float(coupling.full.mean() / coupling.coupling.mean())

    return Claim(
        "counter-example-gamma",
        "Counter-example, part 2: and yet Gamma = 0, so there is no quartic term.",
        OURS,
        "the same saddle; measured Gamma^2 / gamma^2; scale = curvature",
        **each(pair),
        tolerance=1e-12,
    )


def _counterexample_exponent() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _cancelling(scale)

        def exponent(t: float) -> float:
            times = torch.tensor([t, t * 1.01], dtype=DOUBLE)
            return float(local_exponent(times, torch.tensor([system.kl(float(x)) for x in times], dtype=DOUBLE)))

        return 6.0, limit(exponent, 0.02 / scale)

    return Claim(
        "counter-example-sixth",
        "Counter-example, part 3: the exact KL rises like t^6, so the condition alone does not give t^4.",
        OURS,
        "the same saddle; local exponent of the exact KL; scale = curvature",
        **each(pair),
        tolerance=1e-4,
    )


def _counterexample_constant() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _cancelling(scale)
        c, k = system.curvature, system.own
        return system.sharpness * (c * k) ** 2 / 18, limit(lambda t: system.kl(t) / t**6, 0.02 / scale)

    return Claim(
        "counter-example-constant",
        "Counter-example, part 4: u = t^6 lambda c^2 k^2 / 18, from the third path derivative.",
        OURS,
        "the same saddle; exact KL over t^6; scale = curvature",
        **each(pair),
        tolerance=1e-4,
    )


def _once_weighted() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=1.5, sharpness=scale)
        t = 2e-3 / math.sqrt(max(1.0, scale))
        return 1.0, measure_saddle(system).law(t) / system.kl(t)

    return Claim(
        "lambda-once",
        "gamma is already weighted by the Fisher matrix: forecast over truth is 1 at every sharpness.",
        OURS,
        "saddle y + 1.5xy; polynomial forecast over exact KL; scale = sharpness lambda",
        **each(pair),
        tolerance=1e-4,
    )


def _rival() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=1.5, sharpness=scale)
        t = 2e-3 / math.sqrt(max(1.0, scale))
        sensitivity = measure_sensitivity(score_objective(system.safety), 1)
        gamma_squared = float(measure_saddle(system).coupling.coupling.mean())
        rival = float(sensitivity.eigenvalues[-1]) * gamma_squared * t**4 / 8
        return scale, rival / system.kl(t)

    return Claim(
        "lambda-twice",
        "The corollary as printed, lambda gamma^2 t^4 / 8 with the weighted gamma, is off by the factor lambda.",
        f"{AIC}, corollary 6.3",
        "the same saddle; that formula over the exact KL; scale = sharpness lambda",
        **each(pair),
        tolerance=1e-4,
    )
