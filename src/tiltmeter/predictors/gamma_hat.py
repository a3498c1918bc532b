"""Gamma-hat: curvature coupling ||F^1/2 H g||, the constant of the quartic law where log p is flat.

Source: Springer et al. 2026, arXiv:2602.15799, definition 5.1.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, passes, root_of_mean

UNIT = "nats^1/2 per flow time squared"


def gamma_hat(case: Case) -> Risk:
    """Root of (Hg)'F(Hg). Cost: a gradient and a Hessian product, one JVP over the answers."""
    price = passes(case, tuning={"forward_backward": 1, "hvp": 1}, safety={"jvp": 2})
    if case.measured.coupling is None:
        return Risk(None, UNIT, price, reason=case.measured.no_coupling or "no coupling was measured")
    return root_of_mean(case.measured.coupling.coupling, UNIT, price)
