"""Loss of the aligned model on the tuning set: what it finds strange, it may have to change for.

Source: folklore; data selection by perplexity (e.g. Marion et al. 2023, arXiv:2309.04564).
"""

from __future__ import annotations

from tiltmeter.predictors.contract import Case, Risk, known, passes


def initial_loss(case: Case) -> Risk:
    """Mean loss, nats per token. Cost: one forward pass."""
    price = passes(case, tuning={"forward": 1})
    return known(case.measured.tuning_loss, "nats per token", price, "the loss is not finite, or was not measured")
