"""The quartic law with its lower orders: u(t) = 1/2 (e0^2 t^2 + c t^3 + Gamma^2 t^4 / 4) at the end of the recipe.

Source: Springer et al. 2026, arXiv:2602.15799 (theorem 6.2, corollary 6.3); constants derived in docs/theory.md.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, Trend, known, passes

#: Gradient and Hessian product of the tuning loss, forms and path over the answers.
COST = {"tuning": {"forward_backward": 1.0, "hvp": 1.0}, "safety": {"jvp": 6.0, "path": 1.0}}


def polynomial(case: Case) -> Risk:
    """Safety KL by the polynomial, in the clock of plain gradient descent whatever the optimiser is.

    Cost: a gradient, a Hessian product, six JVPs and a second-order pass over the answers.
    """
    price = passes(case, **COST)
    coupling = case.measured.coupling
    if coupling is None:
        return Risk(None, "nats per token", price, reason=case.measured.no_coupling or "no coupling was measured")
    flow = case.clock.flow_time
    steps = tuple(case.clock.grid(5))
    values = coupling.polynomial(flow[list(steps)]).mean(-1)
    curve = Trend(steps, tuple(values.tolist()))
    return known(float(values[-1]), "nats per token", price, "the polynomial left the range of numbers", curve)
