"""Gradient matching: does the tuning set pull where harmful examples pull, and away from safe ones?

Source: He, Xia and Henderson 2024, "What is in Your Safe Data?", arXiv:2404.01099: cosine with the mean gradient of
harmful examples minus that with safe ones, on the first ten answer tokens. Here the anchors are the compliant and the
refusing opening of the safety prompts, so that no harmful answer need be kept.
"""

from __future__ import annotations

from tiltmeter.geometry.space import dot, norm
from tiltmeter.predictors.contract import Case, Risk, gradient_of, known, passes


def gradient_matching(case: Case) -> Risk:
    """cos(g, g_harmful) - cos(g, g_safe), between -2 and 2. Cost: a gradient of the sample, one of the openings."""
    price = passes(case, tuning={"forward_backward": 1}, margin={"forward_backward": 1})
    unit = "difference of cosines"
    if case.anchors is None:
        return Risk(None, unit, price, reason="the gradients of the anchors were not measured")
    gradient = gradient_of(case)
    size = norm(gradient)
    cosines = []
    for anchor in case.anchors:
        length = norm(anchor)
        if not size * length > 0:
            return Risk(None, unit, price, reason="a gradient is zero")
        cosines.append(dot(gradient, anchor) / size / length)
    return known(cosines[0] - cosines[1], unit, price, "a gradient is not finite")
