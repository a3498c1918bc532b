"""Claims about starts that overlap with the sensitive directions: crossover, dip, and what the law leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tiltmeter.geometry.forecast import local_exponent
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, orthogonal_slope
from tiltmeter.geometry.systems_saddle import LopsidedCoin, Saddle
from tiltmeter.jobs.theory_claim import OURS, Claim, each, limit, measure, measure_saddle
from tiltmeter.jobs.theory_law import EIGENVALUES

#: Positions on the way from the quadratic to the quartic regime, in units of the crossover t_x.
POSITIONS = (0.01, 0.1, 1.0, 10.0, 100.0)


def overlap_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _overlap(),
        _crossover_time(),
        _crossover_exponent(),
        _crossover_value(),
        _cross("overlap-slows", 0.4, "c > 0: the t^3 term is -c/2, the rise slows down"),
        _cross("overlap-speeds-up", math.pi - 0.4, "c < 0: the t^3 term is +|c|/2, the rise speeds up"),
        _dip_depth(),
        _dip_threshold(),
        _cubic_of_the_kl(),
        _cubic_absent(),
        _uniform(seed),
    ]


def _tilted(curvature: float = 1.0, angle: float = 0.4, overlap: float = 1e-6) -> Saddle:
    return Saddle(curvature=curvature, sharpness=3.0, overlap=overlap, angle=angle)


def _overlap() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=2.0, sharpness=3.0, own=0.4, overlap=scale, angle=1.0)
        exact = limit(lambda t: 2 * system.kl(t) / t**2, 1e-3 / max(1.0, scale))
        return exact, float(measure_saddle(system).coupling.overlap.mean())

    return Claim(
        "overlap",
        "With initial overlap the KL starts as t^2/2 e0^2, e0^2 = g'Fg.",
        OURS,
        "saddle watched by two coins; twice the exact KL over t^2; scale = e0",
        **each(pair),
        tolerance=1e-5,
    )


def _crossover_time() -> Claim:
    """The time at which the t^2 and t^4 terms of the measured law are equal."""

    def pair(scale: float) -> tuple[float, float]:
        system = _tilted(scale)
        coupling = measure_saddle(system).coupling
        return system.crossover, 2 * math.sqrt(float(coupling.overlap / coupling.full))

    return Claim(
        "crossover-time",
        "The quadratic and the quartic term are equal at t_x = 2 e0 / gamma.",
        OURS,
        "saddle watched by two coins, e0 = 1e-6; scale = curvature c",
        **each(pair),
        tolerance=1e-5,
    )


def _exponent(values: Callable[[float], float], t: float) -> float:
    times = torch.tensor([t / 1.0001, t * 1.0001], dtype=DOUBLE)
    return float(local_exponent(times, torch.tensor([values(float(x)) for x in times], dtype=DOUBLE)))


def _crossover_exponent() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _tilted()
        rho = math.cos(system.angle)
        expected = 2 + (2 * scale**2 - 2 * rho * scale) / (1 - 2 * rho * scale + scale**2)
        return expected, _exponent(system.kl, scale * system.crossover)

    return Claim(
        "crossover-exponent",
        "The local exponent goes from 2 to 4 through t_x, where it is exactly 3 whatever the sign of c.",
        OURS,
        "saddle, angle 0.4 between overlap and coupling; exponent of the exact KL; scale = t / t_x",
        **each(pair, POSITIONS),
        tolerance=1e-3,
    )


def _crossover_value() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _tilted()
        t = scale * system.crossover
        return system.kl(t), measure_saddle(system).law(t)

    return Claim(
        "low-order-law",
        "u = 1/2 (e0^2 t^2 - c t^3 + gamma^2 t^4 / 4) holds on both sides of the crossover.",
        OURS,
        "the same saddle; polynomial against exact KL; scale = t / t_x",
        **each(pair, POSITIONS),
        tolerance=1e-3,
    )


def _cross(name: str, angle: float, statement: str) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Saddle(curvature=scale, sharpness=3.0, overlap=0.1, angle=angle)
        exact = limit(lambda t: (2 * system.kl(t) / t**2 - 0.1**2) / t, 1e-2 / scale)
        return exact, float(measure_saddle(system).coupling.cross.mean())

    return Claim(
        name,
        statement + ".",
        OURS,
        f"saddle, e0 = 0.1, angle {angle:.2f}; t^3 coefficient of twice the exact KL; scale = curvature",
        **each(pair),
        tolerance=1e-4,
    )


def _dip_depth() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = _tilted(scale, angle=0.2)
        t = system.crossover
        exact = system.kl(t) / (system.overlap**2 * t**2 / 2)
        law = measure_saddle(system).law(t)
        return exact, law / (system.overlap**2 * t**2 / 2)

    return Claim(
        "dip-depth",
        "At t_x the KL is 2 - 2 rho times its quadratic term, rho = c / (e0 gamma): almost nothing for rho near 1.",
        OURS,
        "saddle, angle 0.2 (rho = 0.98); law over e0^2 t^2 / 2 against the exact KL over it; scale = curvature",
        **each(pair),
        tolerance=1e-3,
    )


def _dip_threshold() -> Claim:
    def dips(rho: float, curvature: float) -> bool:
        system = _tilted(curvature, angle=math.acos(rho))
        coupling = measure_saddle(system).coupling
        times = torch.linspace(0.3, 1.5, 4000, dtype=DOUBLE) * system.crossover
        return bool((coupling.polynomial(times)[:, 0].diff() < 0).any())

    def pair(scale: float) -> tuple[float, float]:
        low, high = 0.93, 0.955
        for _ in range(6):
            middle = (low + high) / 2
            low, high = (low, middle) if dips(middle, scale) else (middle, high)
        return 2 * math.sqrt(2) / 3, high

    return Claim(
        "dip-threshold",
        "c > 0 alone gives no dip: the KL falls back only where rho > 2 sqrt(2) / 3 = 0.943.",
        OURS,
        "saddle; smallest rho at which the measured law is not monotone; scale = curvature",
        **each(pair),
        tolerance=1e-3,
    )


def _cubic_of_the_kl() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        coin = LopsidedCoin(0.9, scale)
        motion = measure(coin.tuning.objective, coin.safety)
        return coin.cubic, limit(lambda t: (coin.kl(t) - motion.law(t)) / t**3, 0.02 / scale)

    return Claim(
        "cubic-of-the-kl",
        "The law leaves out a cubic term of the KL itself, t^3/6 E[phi_1^3], where answers are lopsided.",
        OURS,
        "coin with p = 0.9 and a linear loss; (exact KL - law) / t^3; scale = e0 up to sqrt(p(1-p))",
        **each(pair),
        tolerance=1e-4,
    )


def _cubic_absent() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        coin = LopsidedCoin(0.5, scale)
        motion = measure(coin.tuning.objective, coin.safety)
        return 0.0, limit(lambda t: (coin.kl(t) - motion.law(t)) / t**3, 0.02 / scale) / scale**3

    return Claim(
        "cubic-absent",
        "It vanishes where answers are symmetric, so nothing else is missing at this order.",
        OURS,
        "fair coin; (exact KL - law) / (e^3 t^3); scale = e",
        **each(pair),
        tolerance=1e-5,
    )


def _uniform(seed: int) -> Claim:
    """Relative error of the law at t_x over e0, against the same at half the overlap."""

    def pair(scale: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(2, 3, 8, seed)
        flat = orthogonal_slope(model, seed + 5)
        along = model.scores(torch.zeros_like(flat))[0, 0]

        def error(overlap: float) -> float:
            tuning = Quadratic.with_spectrum(flat + overlap * along / along.norm(), EIGENVALUES, seed + 6)
            motion = measure(tuning.objective, model.safety)
            c = motion.coupling
            t = scale * 2 * math.sqrt(float(c.overlap.mean() / c.full.mean()))
            return motion.law(t) / float(model.kl(tuning.displacement(t)).mean()) - 1

        return 2.0, error(2e-5) / error(1e-5)

    return Claim(
        "law-is-uniform",
        "With small overlap the law's relative error at a fixed t / t_x shrinks in proportion to e0.",
        OURS,
        "random curved softmax; error at overlap 2e-5 over error at 1e-5; scale = t / t_x",
        **each(pair, (0.3, 1.0, 3.0)),
        tolerance=0.03,
    )
