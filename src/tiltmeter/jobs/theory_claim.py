"""What a claim of the theory is, and the few tools its checks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from tiltmeter.geometry.motion import (
    Acceleration,
    Coupling,
    Slope,
    measure_acceleration,
    measure_coupling,
    measure_slope,
)
from tiltmeter.geometry.objective import FunctionObjective, SoftmaxObjective
from tiltmeter.geometry.systems import batches
from tiltmeter.geometry.systems_saddle import Saddle

#: Where a claim comes from.
AIC = "Springer et al. 2026, arXiv:2602.15799"
OURS = "derived in docs/theory.md"

#: Every factor is tried at these sizes: at 1 alone a lost or doubled factor hides.
SCALES = (1e-2, 1.0, 1e2)


@dataclass(frozen=True)
class Claim:
    """One statement of the theory and how it came out.

    Attributes:
        id: short name, the heading under which docs/theory.md derives it.
        statement: one sentence.
        source: paper and place, or our own derivation.
        system: what it was tried on, and what `scales` are.
        scales: the sizes tried.
        expected: by the independent route, one value per scale.
        found: one value per scale.
        tolerance: relative (absolute where 0 is expected).
        relation: how `found` must stand to `expected`.
    """

    id: str
    statement: str
    source: str
    system: str
    scales: tuple[float, ...]
    expected: tuple[float, ...]
    found: tuple[float, ...]
    tolerance: float
    relation: Literal["=", "<=", ">="] = "="

    @property
    def holds(self) -> bool:
        """Whether it held at every scale; a value that is not finite never holds."""
        if not len(self.scales) == len(self.expected) == len(self.found):
            return False
        return all(self._holds(e, f) for e, f in zip(self.expected, self.found, strict=True))

    def _holds(self, expected: float, found: float) -> bool:
        slack = self.tolerance * (abs(expected) or 1.0)
        if self.relation == "<=":
            return found <= expected + slack
        if self.relation == ">=":
            return found >= expected - slack
        return abs(found - expected) <= slack

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "id": self.id,
            "statement": self.statement,
            "source": self.source,
            "system": self.system,
            "scales": list(self.scales),
            "expected": list(self.expected),
            "found": [value if math.isfinite(value) else None for value in self.found],
            "relation": self.relation,
            "tolerance": self.tolerance,
            "holds": self.holds,
        }

    def line(self) -> str:
        """One line for people."""
        pairs = ", ".join(f"{f:.6g} {self.relation} {e:.6g}" for e, f in zip(self.expected, self.found, strict=True))
        verdict = "holds" if self.holds else "FAILS"
        return f"{self.id:<24} {verdict}  {self.statement} [found {self.relation} expected: {pairs}]"


@dataclass(frozen=True)
class Motion:
    """What the shipped measurements say about a tuning loss and a safety model."""

    slope: Slope
    acceleration: Acceleration
    coupling: Coupling

    def law(self, flow_time: float) -> float:
        """Forecast u(t) of the polynomial, mean over prompts, nats."""
        return float(self.coupling.polynomial(torch.tensor([flow_time], dtype=torch.float64)).mean())


def measure(tuning: FunctionObjective, safety: SoftmaxObjective, groups: int = 4) -> Motion:
    """Slope, acceleration and coupling with batches of one example."""
    slope = measure_slope(tuning, batches(tuning.m), groups=groups)
    acceleration = measure_acceleration(tuning, slope)
    return Motion(slope, acceleration, measure_coupling(safety, slope, acceleration))


@lru_cache(maxsize=64)
def measure_saddle(system: Saddle) -> Motion:
    """The same for a system solved by hand; many claims look at one system."""
    return measure(system.tuning.objective, system.safety)


def limit(function: Callable[[float], float], start: float) -> float:
    """Value of a function at 0+, from h, h/2 and h/4: errors of first and second order in h cancel."""
    a, b, c = function(start), function(start / 2), function(start / 4)
    first, second = 2 * b - a, 2 * c - b
    return (4 * second - first) / 3


def each(values: Callable[[float], tuple[float, float]], scales: Sequence[float] = SCALES) -> dict[str, Any]:
    """Keyword arguments `scales`, `expected` and `found` of a claim from one (expected, found) pair per scale."""
    pairs = [values(scale) for scale in scales]
    return {"scales": tuple(scales), "expected": tuple(p[0] for p in pairs), "found": tuple(p[1] for p in pairs)}
