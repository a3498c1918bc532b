"""Claims about a low-rank adapter at B = 0."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tiltmeter.geometry.forecast import local_exponent
from tiltmeter.geometry.systems import DOUBLE
from tiltmeter.geometry.systems_lora import Lora
from tiltmeter.jobs.theory_claim import OURS, Claim, Motion, each, limit, measure


def lora_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _first_a(seed),
        _first_b(seed),
        _second(seed),
        _overlap(seed),
        _no_quartic(seed),
        _full(seed),
        _unseen(seed),
    ]


def _test(system: Lora, seed: int) -> Tensor:
    return torch.randn(system.space.size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed + 9))


@lru_cache(maxsize=8)
def _motion(seed: int, scale: float) -> Motion:
    system = Lora.random(seed, scale=scale)
    return measure(system.tuning, system.safety)


def _first_a(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Lora.random(seed, scale=scale)
        part = system.space.split(_motion(seed, scale).slope.mean)
        return 0.0, float(part["A"].norm() / part["B"].norm())

    return Claim(
        "lora-first-a",
        "At B = 0 the gradient in A vanishes: the first motion is in B alone.",
        OURS,
        "rank-2 adapter, loss linear in W; |gradient in A| / |gradient in B|; scale = s",
        **each(pair),
        tolerance=1e-12,
    )


def _first_b(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Lora.random(seed, scale=scale)
        test = _test(system, seed)
        exact = limit(
            lambda t: float(test @ (system.displacement(t) - system.displacement(-t))) / (2 * t), 1e-2 / scale
        )
        return exact, float(test @ -_motion(seed, scale).slope.mean)

    return Claim(
        "lora-first-b",
        "B starts with velocity -s M A_0', M the gradient in W.",
        OURS,
        "the same adapter; exact cosh-sinh flow along a random direction; scale = s",
        **each(pair),
        tolerance=1e-6,
    )


def _second(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Lora.random(seed, scale=scale)
        test = _test(system, seed)
        exact = limit(lambda t: float(test @ (system.displacement(t) + system.displacement(-t))) / t**2, 1e-2 / scale)
        return exact, float(test @ _motion(seed, scale).acceleration.value)

    return Claim(
        "lora-second",
        "A follows at second order, with acceleration s^2 A_0 M'M: the coupling of A and B.",
        OURS,
        "the same adapter and flow; scale = s",
        **each(pair),
        tolerance=1e-6,
    )


def _overlap(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Lora.random(seed, scale=scale)
        exact = limit(lambda t: 2 * float(system.kl(t).mean()) / t**2, 1e-3 / max(scale, scale**2))
        return exact, float(_motion(seed, scale).coupling.overlap.mean())

    return Claim(
        "lora-overlap",
        "In the coordinates (A, B) the law holds as it stands: e0^2 = g'Fg.",
        OURS,
        "the same adapter watched through three inputs; twice the exact KL over t^2; scale = s",
        **each(pair),
        tolerance=1e-4,
    )


def _no_quartic(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        coupling = _motion(seed, scale).coupling
        return 0.0, float(coupling.full.mean().abs().sqrt() / coupling.overlap.mean())

    return Claim(
        "lora-no-quartic",
        "A-B coupling alone gives no t^4: for a loss linear in W the weights turn only at t^3, and Gamma = gamma = 0.",
        OURS,
        "the same adapter; measured Gamma / e0^2; scale = s",
        **each(pair),
        tolerance=1e-7,
    )


def _full(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = replace(Lora.random(seed, scale=scale), stiffness=0.7)
        turned = system.inputs @ system.second_in_weights.T
        p = torch.softmax(system.inputs @ system.base.T, -1)
        centred = turned - (p * turned).sum(-1, keepdim=True)
        found = measure(system.tuning, system.safety).coupling.full
        return float((p * centred.square()).sum(-1).mean()), float(found.mean())

    return Claim(
        "lora-full",
        "What does give Gamma is curvature of the loss in W: W'' = h s^4 M (A_0'A_0)^2.",
        OURS,
        "the adapter with h = 0.7; variance of x'W'' over outcomes by hand; scale = s",
        **each(pair),
        tolerance=1e-9,
    )


def _unseen(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Lora.random(seed, scale=scale)
        hidden = torch.eye(4, dtype=DOUBLE) - torch.linalg.pinv(system.start) @ system.start
        system = replace(system, inputs=system.inputs @ hidden)

        def exponent(t: float) -> float:
            times = torch.tensor([t, 1.01 * t], dtype=DOUBLE)
            values = torch.stack([system.kl(float(x)).mean() for x in times])
            return float(local_exponent(times, values))

        return 6.0, limit(exponent, 0.05 / max(scale, scale ** (4 / 3)))

    return Claim(
        "lora-unseen-input",
        "An input that A_0 maps to zero is reached only when A has turned: its KL rises like t^6.",
        OURS,
        "the same adapter, inputs in the null space of A_0; exponent of the exact KL; scale = s",
        **each(pair),
        tolerance=1e-3,
    )
