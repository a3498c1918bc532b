"""Claims about paths beyond the Taylor range: Krylov, secant, rehearsal, and where each stops being right."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Sgd
from tiltmeter.geometry.motion import Slope, measure_krylov, measure_slope
from tiltmeter.geometry.path import CurvedPath, KrylovPath, LinearPath, TaylorPath
from tiltmeter.geometry.rehearsal import Rehearsal
from tiltmeter.geometry.systems import Quadratic, batches, rotation
from tiltmeter.jobs.theory_claim import OURS, Claim, each, limit

STEPS = 60


def path_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _krylov_exact("krylov-exact", seed, 0.0),
        _krylov_exact("krylov-momentum", seed, 0.8),
        _krylov_bound(seed),
        _taylor_fails(seed),
        _curved(seed),
        _curved_exact(seed),
        _rehearsed(seed),
    ]


def _stiff(seed: int, stiffness: float) -> Quadratic:
    """Twelve parameters, three distinct curvatures: stiffness, 1 and -1/10."""
    slope = math.sqrt(12) * rotation(12, seed + 1)[0]
    return Quadratic.with_spectrum(slope, [stiffness] * 4 + [1.0] * 4 + [-0.1] * 4, seed)


def _clock(stiffness: float) -> Clock:
    """Flow time 20 over the stiffest curvature, in 60 steps."""
    return Clock.constant(20 / stiffness / STEPS, STEPS)


def _krylov_exact(name: str, seed: int, momentum: float) -> Claim:
    def pair(stiffness: float) -> tuple[float, float]:
        system, clock = _stiff(seed, stiffness), _clock(stiffness)
        krylov = measure_krylov(system.objective, measure_slope(system.objective, batches(4)), 3)
        moved = KrylovPath(Sgd(momentum=momentum), clock, krylov).displacement(STEPS)
        exact = system.descent(clock.rates.tolist(), momentum)[-1]
        return 0.0, float((moved - exact).norm() / exact.norm())

    return Claim(
        name,
        f"k Hessian products give {'momentum' if momentum else 'descent'} exactly on a quadratic with k eigenvalues.",
        OURS,
        "12 parameters, 3 eigenvalues, k = 3, flow time 20 / stiffest; relative error of the path; scale = stiffest",
        **each(pair, (10.0, 100.0, 1000.0)),
        tolerance=1e-9,
    )


def _krylov_bound(seed: int) -> Claim:
    """|f_k(H) g - Krylov| <= 2 |g| min_p max |f - p| over polynomials of degree k - 1, bounded by a Chebyshev tail."""
    system = Quadratic.with_spectrum(rotation(40, seed)[0], np.linspace(0.0, 50.0, 40).tolist(), seed + 1)
    clock = _clock(50.0)

    def pair(size: float) -> tuple[float, float]:
        k = round(size)
        krylov = measure_krylov(system.objective, measure_slope(system.objective, batches(4)), k)
        moved = KrylovPath(Sgd(), clock, krylov).displacement(STEPS)
        nodes = (chebyshev.chebpts1(200) + 1) * 25.0
        values = [(math.expm1(STEPS * math.log1p(-float(clock.rates[0]) * x)) / x) for x in nodes]
        series = chebyshev.chebfit(chebyshev.chebpts1(200), np.array(values), 199)
        return 2 * float(np.abs(series[k:]).sum()), float((moved - system.descent(clock.rates.tolist())[-1]).norm())

    return Claim(
        "krylov-bound",
        "Elsewhere the Krylov path errs by at most twice the best polynomial approximation of degree k - 1.",
        "Saad 1992, SIAM J. Numer. Anal. 29(1); Hochbruck and Lubich 1997, ibid. 34(5)",
        "40 eigenvalues from 0 to 50, |g| = 1, flow time 0.4; error of the path; scale = k",
        **each(pair, (2.0, 4.0, 6.0, 8.0, 10.0)),
        tolerance=1e-9,
        relation="<=",
    )


def _taylor_fails(seed: int) -> Claim:
    def pair(stiffness: float) -> tuple[float, float]:
        system, clock = _stiff(seed, stiffness), _clock(stiffness)
        slope = measure_slope(system.objective, batches(4)).mean
        path = TaylorPath(Sgd(), clock, slope, system.objective.hvp(slope))
        exact = system.descent(clock.rates.tolist())[-1]
        return 1.0, float((path.displacement(STEPS) - exact).norm() / exact.norm())

    return Claim(
        "taylor-fails",
        "At flow time 20 / lambda_max the second-order path is wrong by more than the drift itself.",
        OURS,
        "the same stiff quadratic; relative error of the Taylor path; scale = stiffest",
        **each(pair, (10.0, 100.0, 1000.0)),
        tolerance=0.0,
        relation=">=",
    )


def _curved(seed: int) -> Claim:
    def pair(stiffness: float) -> tuple[float, float]:
        system = _stiff(seed, stiffness)
        anchor = measure_slope(system.objective, batches(4))
        test = rotation(12, seed + 2)[0]

        def second(t: float) -> float:
            linear = LinearPath(Sgd(), Clock.constant(t / 9, 9), anchor)
            probe = measure_slope(system.objective, batches(4), displacement=linear.displacement(4))
            return float(test @ (CurvedPath(linear, probe, 4).displacement(9) - linear.displacement(9))) / (t**2 / 2)

        return float(test @ system.hessian @ system.slope), limit(second, 1e-2 / stiffness)

    return Claim(
        "curved-path",
        "The secant path has the second-order term t^2/2 H g, from one more gradient and no Hessian.",
        OURS,
        "the same stiff quadratic, probe at 4/9 of the way; along a random direction; scale = stiffest",
        **each(pair, (10.0, 100.0, 1000.0)),
        tolerance=1e-6,
    )


def _curved_exact(seed: int) -> Claim:
    """Departure from gradient flow over t^3, which must be |H^2 g| / 6."""

    def pair(stiffness: float) -> tuple[float, float]:
        system = _stiff(seed, stiffness)
        anchor = measure_slope(system.objective, batches(4))

        def third(t: float) -> float:
            linear = LinearPath(Sgd(), Clock.constant(t / 8, 8), anchor)
            probe = measure_slope(system.objective, batches(4), displacement=linear.displacement(8))
            return float((CurvedPath(linear, probe, 8).displacement(8) - system.displacement(t)).norm()) / t**3

        exact = (system.hessian @ system.hessian @ system.slope).norm() / 6
        return float(exact), limit(third, 1e-2 / stiffness)

    return Claim(
        "curved-path-error",
        "It departs from gradient flow by t^3/6 H^2 g.",
        OURS,
        "the same stiff quadratic against the exact flow; scale = stiffest",
        **each(pair, (10.0, 100.0, 1000.0)),
        tolerance=1e-4,
    )


def _rehearsed(seed: int) -> Claim:
    """Departure of a rehearsal from the run over the squared rate, which must be c (c - 1) |H g| / 2."""
    looks, half = 3, 4
    steps = (2 * looks - 1) * half

    def pair(stiffness: float) -> tuple[float, float]:
        system = _stiff(seed, stiffness)
        gradient = system.objective.gradient

        def second(rate: float) -> float:
            path = Rehearsal(Sgd(), Clock.constant(rate, steps), looks)

            def look(number: int, displacement: Tensor | None) -> Slope:
                return measure_slope(system.objective, batches(4), displacement=displacement)

            ((_, end),) = path.walk(look, [steps])
            run = torch.zeros_like(end)
            for _ in range(steps):
                run = run - rate * gradient(displacement=run)
            return float((end - run).norm()) / rate**2

        exact = (system.hessian @ system.slope).norm() * half * (half - 1) / 2
        return float(exact), limit(second, 1e-4 / stiffness)

    return Claim(
        "rehearsal-error",
        "A rehearsal departs from the run by what its first stretch leaves out: eta^2 c (c - 1) / 2 H g for c steps.",
        OURS,
        "the same stiff quadratic, 20 steps of gradient descent in 3 looks, c = 4; scale = stiffest",
        **each(pair, (10.0, 100.0, 1000.0)),
        tolerance=1e-4,
    )
