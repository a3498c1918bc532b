"""e0 = ||F^1/2 g||: how fast the first step moves the safety answers.

Source: Springer et al. 2026, arXiv:2602.15799, definition 3.4 (initial orthogonality).
"""

from __future__ import annotations

from tiltmeter.geometry.motion import between_groups
from tiltmeter.predictors.contract import Case, Risk, passes, root_of_mean

UNIT = "nats^1/2 per flow time"


def initial_overlap(case: Case) -> Risk:
    """Root of g'Fg, from products of different batches. Cost: a gradient, a JVP per group over the answers."""
    forms = case.measured.overlap_groups
    groups = 1 if forms is None else forms.shape[-1]
    price = passes(case, tuning={"forward_backward": 1}, safety={"jvp": groups})
    if forms is None:
        return Risk(None, UNIT, price, reason=case.measured.no_overlap or "no overlap was measured")
    return root_of_mean(between_groups(forms), UNIT, price)
