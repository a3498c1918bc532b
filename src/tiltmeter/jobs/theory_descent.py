"""Claims about gradient descent as it is really run: steps, schedules, momentum, weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Sgd
from tiltmeter.geometry.motion import measure_slope
from tiltmeter.geometry.path import TaylorPath
from tiltmeter.geometry.systems import DOUBLE, Quadratic, batches, rotation
from tiltmeter.jobs.theory_claim import OURS, SCALES, Claim, each, limit
from tiltmeter.jobs.theory_torch import decay_pull

Optimiser = Callable[[list[Tensor]], torch.optim.Optimizer]


def descent_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _second_order(),
        _schedule_sum(),
        _remainder(seed),
        _schedule_invariance(),
        _momentum_lag(),
        _momentum_curvature("momentum-curvature", nesterov=False),
        _momentum_curvature("nesterov-curvature", nesterov=True),
        _decay_sgd(seed),
    ]


def warmup_cosine(peak: float, steps: int, warmup: int) -> Clock:
    """Linear warm-up from zero, then a cosine down to zero."""
    k = torch.arange(steps, dtype=DOUBLE)
    down = 0.5 * (1 + torch.cos(math.pi * (k - warmup).clamp_min(0) / (steps - warmup)))
    return Clock(peak * torch.where(k < warmup, k / warmup, down))


def _second_order() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        k = 17
        return scale**2 * k * (k - 1) / 2, float(Sgd().second_order(Clock.constant(scale, k))[-1])

    return Claim(
        "descent-sum",
        "k steps of gradient descent at rate eta move by -eta k g + eta^2 k (k - 1) / 2 H g.",
        OURS,
        "17 steps; coefficient of H g; scale = eta",
        **each(pair),
        tolerance=1e-12,
    )


def _schedule_sum() -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        clock = warmup_cosine(scale, 40, 10)
        rates = clock.rates.tolist()
        pairs = sum(rates[i] * rates[j] for j in range(len(rates)) for i in range(j))
        return pairs, float((clock.flow_time[-1] ** 2 - clock.squared_rates[-1]) / 2)

    def shipped(scale: float) -> tuple[float, float]:
        clock = warmup_cosine(scale, 40, 10)
        return pair(scale)[0], float(Sgd().second_order(clock)[-1])

    both = [each(pair), each(shipped)]
    return Claim(
        "schedule-sum",
        "Under a schedule the H g coefficient is sum_{i<j} eta_i eta_j = (tau^2 - sum eta^2) / 2.",
        OURS,
        "40 steps of warm-up and cosine; by the clock's sums, then by the optimiser's recursion; scale = peak rate",
        scales=SCALES * 2,
        expected=both[0]["expected"] + both[1]["expected"],
        found=both[0]["found"] + both[1]["found"],
        tolerance=1e-12,
    )


def _remainder(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        steps, eigenvalues = 7, [scale * e for e in (3.0, 1.0, -0.5, 0.2)]
        slope = rotation(4, seed)[0]
        system = Quadratic.with_spectrum(slope, eigenvalues, seed + 1)
        measured = measure_slope(system.objective, batches(4))
        turned = system.objective.hvp(measured.mean)

        def missing(rate: float) -> float:
            path = TaylorPath(Sgd(), Clock.constant(rate, steps), measured.mean, turned)
            rest = system.descent([rate] * steps)[-1] - path.displacement(steps)
            return float(rest.norm()) / (rate**3 * math.comb(steps, 3))

        return float((system.hessian @ system.hessian @ slope).norm()), limit(missing, 1e-3 / scale)

    return Claim(
        "taylor-remainder",
        "What the second-order path misses after k steps is eta^3 k (k-1) (k-2) / 6 H^2 g to leading order.",
        OURS,
        "quadratic in a random frame, 7 dense steps minus the path; scale = curvature",
        **each(pair),
        tolerance=1e-5,
    )


def _schedule_invariance() -> Claim:
    """Three schedules with the same sum of rates end at the same place, that of gradient flow."""
    schedules = {
        1.0: Clock.constant(1.0, 3000),
        2.0: warmup_cosine(1.0, 3000, 300),
        3.0: Clock(torch.linspace(0, 1, 3000, dtype=DOUBLE)),
    }

    def pair(which: float) -> tuple[float, float]:
        rates = schedules[which].rates
        curvature = torch.tensor([0.5], dtype=DOUBLE)
        end = Sgd().response(Clock(rates * (2.0 / rates.sum())), curvature)[-1]
        return math.expm1(-2.0 * 0.5) / 0.5, float(end)

    return Claim(
        "schedule-invariance",
        "In the limit of small rates only flow time counts, not the schedule.",
        OURS,
        "parabola of curvature 0.5, flow time 2 in 3000 steps; scale = 1 constant, 2 warm-up and cosine, 3 linear rise",
        **each(pair, tuple(schedules)),
        tolerance=1e-3,
    )


def _momentum_lag() -> Claim:
    def pair(beta: float) -> tuple[float, float]:
        k, rate = 60, 1e-2
        settled = rate / (1 - beta) * (k - beta * (1 - beta**k) / (1 - beta))
        return settled, float(Sgd(momentum=beta).flow_time(Clock.constant(rate, k))[-1])

    return Claim(
        "momentum",
        "Momentum multiplies flow time by 1/(1-beta), after a lag of beta/(1-beta) steps.",
        OURS,
        "60 steps at rate 0.01; geometric sum against the optimiser's recursion; scale = beta",
        **each(pair, (0.1, 0.5, 0.9)),
        tolerance=1e-12,
    )


def _momentum_curvature(name: str, nesterov: bool) -> Claim:
    def pair(beta: float) -> tuple[float, float]:
        clock, h = warmup_cosine(0.1, 12, 3), 1e-4

        def end(curvature: float) -> float:
            theta = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
            optimiser = torch.optim.SGD([theta], lr=0.0, momentum=beta, nesterov=nesterov)
            for rate in clock.rates.tolist():
                optimiser.param_groups[0]["lr"] = rate
                optimiser.zero_grad()
                (theta + curvature * theta**2 / 2).sum().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            return float(theta.detach())

        exact = (end(h) - end(-h)) / (2 * h)
        return exact, float(Sgd(momentum=beta, nesterov=nesterov).second_order(clock)[-1])

    return Claim(
        name,
        f"With {'Nesterov' if nesterov else 'heavy-ball'} momentum the H g coefficient is the optimiser's own sum.",
        OURS,
        "torch.optim.SGD on x + h x^2/2 under warm-up and cosine, derivative in h; scale = beta",
        **each(pair, (0.3, 0.6, 0.9)),
        tolerance=1e-5,
    )


def _decay_sgd(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        return decay_pull(
            lambda p: torch.optim.SGD(p, lr=1e-7, momentum=0.5, weight_decay=0.3),
            lambda p: torch.optim.SGD(p, lr=1e-7, momentum=0.5),
            (Sgd(momentum=0.5, weight_decay=0.3), Sgd(momentum=0.5)),
            scale * rotation(6, seed)[2],
            1e-7,
        )

    return Claim(
        "weight-decay",
        "Weight decay adds its own constant drift, -decay * theta per flow time.",
        OURS,
        "torch.optim.SGD, momentum 0.5, with and without decay, along the anchor; scale = size of the anchor",
        **each(pair),
        tolerance=1e-3,
    )
