"""Gamma: how fast the safety answers accelerate, the curvature of log p included.

Source: derived in docs/theory.md from Springer et al. 2026, arXiv:2602.15799.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, passes, root_of_mean
from tiltmeter.predictors.polynomial import COST

UNIT = "nats^1/2 per flow time squared"


def gamma_full(case: Case) -> Risk:
    """Root of E[(s.Hg + g'Ag)^2]. Cost: that of the polynomial."""
    price = passes(case, **COST)
    if case.measured.coupling is None:
        return Risk(None, UNIT, price, reason=case.measured.no_coupling or "no coupling was measured")
    return root_of_mean(case.measured.coupling.full, UNIT, price)
