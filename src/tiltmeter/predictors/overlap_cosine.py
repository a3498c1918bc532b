"""Share of the gradient inside the safety subspace, ||P g|| / ||g||.

Source: the condition epsilon of Springer et al. 2026, arXiv:2602.15799, definition 3.4, freed of the gradient's size.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, known, passes


def overlap_cosine(case: Case) -> Risk:
    """||P g|| / ||g||, between 0 and 1. Cost: a gradient, a Gram matrix and a JVP over the answers."""
    price = passes(case, tuning={"forward_backward": 1}, safety={"gram": 1, "jvp": 1})
    projected = case.measured.projected
    if projected is None:
        return Risk(None, "cosine", price, reason=case.no_sensitivity or "no safety subspace")
    return known(projected / case.measured.gradient_norm, "cosine", price, "the gradient is zero")
