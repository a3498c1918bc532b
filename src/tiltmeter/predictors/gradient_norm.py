"""Plain ||g||: how strongly the tuning set pulls, wherever to. The baseline that is hard to beat.

Source: folklore; in a test of a published alignment forecast it ranked six sets at Spearman 0.74 to 0.87.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, known, passes


def gradient_norm(case: Case) -> Risk:
    """Norm of the mean gradient. Cost: one gradient."""
    price = passes(case, tuning={"forward_backward": 1})
    return known(case.measured.gradient_norm, "nats per parameter unit", price, "the gradient is not finite")
