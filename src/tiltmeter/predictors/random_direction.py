"""Safety KL after a random displacement as long as the forecast's: the null that knows only how far the run goes.

Source: the random-direction basin of Peng et al. 2024 (VISAGE), arXiv:2405.17374, with one direction.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, known, passes


def random_direction(case: Case) -> Risk:
    """Mean KL there. Cost: two gradients to know the length, one forward pass over the answers."""
    price = passes(case, tuning={"forward_backward": 2}, safety={"forward": 1})
    if case.measured.random_kl is None:
        return Risk(None, "nats per token", price, reason="no random displacement was measured")
    return known(float(case.measured.random_kl.double().mean()), "nats per token", price, "the KL is not finite")
