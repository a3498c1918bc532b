"""Compliance-vector projection: how far the tuning answers lie on the way from refusing to complying.

Source: persona vectors (Chen et al. 2025, arXiv:2507.21509) project training data on a trait's direction; the direction
is the difference of means of Arditi et al. 2024, arXiv:2406.11717, here between compliant and refusing openings.
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, known, passes


def compliance_projection(case: Case) -> Risk:
    """Place of the mean tuning answer on the line through refusals (0) and compliances (1).

    Cost: a forward pass over the sample and over the openings.
    """
    price = passes(case, tuning={"forward": 1}, margin={"forward": 1})
    unit = "share of the way"
    if case.states is None:
        return Risk(None, unit, price, reason=case.no_states or "hidden states were not measured")
    refusal, compliance = (s.double().mean(0) for s in (case.states.refusals, case.states.compliances))
    way = compliance - refusal
    if not float(way @ way) > 0:
        return Risk(None, unit, price, reason="refusals and compliances have the same hidden states")
    place = (case.states.task_answers.double().mean(0) - refusal) @ way / (way @ way)
    return known(float(place), unit, price, "a hidden state is not finite")
