"""Representation similarity: tuning prompts that look like alignment prompts touch what alignment taught.

Source: arXiv:2506.05346: mean of the K largest cosines between the hidden states (last token, last layer) of a tuning
prompt and those of the alignment set; more similar sets did more harm.
"""

from __future__ import annotations

import torch

from tiltmeter.predictors.contract import Case, Risk, known, passes

#: Nearest alignment prompts that are averaged.
NEAREST = 5


def representation_similarity(case: Case) -> Risk:
    """Mean over tuning prompts of the mean of the largest cosines. Cost: a forward pass over both sets' prompts."""
    price = passes(case, tuning={"forward": 1}, safety={"forward": 1})
    if case.states is None:
        return Risk(None, "cosine", price, reason=case.no_states or "hidden states were not measured")
    task, alignment = (
        torch.nn.functional.normalize(s.double(), dim=-1) for s in (case.states.task, case.states.alignment)
    )
    nearest = (task @ alignment.T).topk(min(NEAREST, len(alignment)), dim=-1).values
    return known(float(nearest.mean()), "cosine", price, "a hidden state is not finite")
