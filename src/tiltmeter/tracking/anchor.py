"""The aligned model as a run began with it: answers, exact log-probabilities and weights, kept in the run's folder.

A run that is resumed is measured against this, not against the checkpoint it resumes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiltmeter.errors import DataError, InputError
from tiltmeter.geometry.sensitivity import ROUNDING, spectrum_of
from tiltmeter.lm.conversation import Example, batches, prompts_of
from tiltmeter.lm.divergence import DivergenceObjective, divergence_objective
from tiltmeter.lm.forward import Forward, divergence
from tiltmeter.lm.gathered import own_part
from tiltmeter.lm.gram import gram
from tiltmeter.lm.model import Loaded, trainable
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective
from tiltmeter.lm.safety import COMPLIANCE_OPENING, REFUSAL_OPENING, SafetySet, prepare_safety, spread
from tiltmeter.lm.scores import score_loss
from tiltmeter.lm.sharding import whole
from tiltmeter.tracking.path import Sketch

#: Parameters up to which a copy of the weights is kept; above, only their sketch.
HELD = 2**29

#: Memory that the factors of the examples' gradients may take, bytes.
FACTORS = 3 * 2**29

#: Values of dense directions [k, n] that are kept; above, the subspace is held by its examples' coefficients.
DENSE = 2**27


@dataclass(frozen=True)
class TrackerOptions:
    """How much the tracker measures.

    Attributes:
        max_safety: most safety prompts, evenly spread over the set.
        response_tokens: length of the aligned model's own answers, where the rows have none.
        max_length: longest prompt with answer, tokens.
        max_tokens: tokens per micro-batch.
        rank: directions of the safety subspace; 0 for none.
        refresh_every: measure the subspace again at every so many measurements, to see it turn; 0 for never.
        refusal_every: generate and judge answers at every so many measurements; 0 for never, since generation is dear.
        commutator_every: exchange a safety step and a task step at every so many measurements; 0 for never, since it
            costs four gradients.
        every: steps between measurements; None chooses the smallest interval that costs less than 5 % of training.
        also: further steps to measure at, such as those of a forecast.
        refusal_opening: how a refusal of this model begins.
        compliance_opening: how a compliant answer begins.
        seed: of the sketch.
    """

    max_safety: int = 16
    response_tokens: int = 24
    max_length: int = 512
    max_tokens: int = 512
    rank: int = 8
    refresh_every: int = 0
    refusal_every: int = 0
    commutator_every: int = 0
    every: int | None = None
    also: tuple[int, ...] = ()
    refusal_opening: str = REFUSAL_OPENING
    compliance_opening: str = COMPLIANCE_OPENING
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"max_safety": 2, "response_tokens": 1, "max_length": 8, "max_tokens": 1, "rank": 0}
        for name, bound in {**least, "refresh_every": 0, "refusal_every": 0, "commutator_every": 0, "every": 1}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name} must be at least {bound}, got {value}")

    def as_dict(self) -> dict[str, Any]:
        """All but when to measure, which may differ between a run and its resumption."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("every", "also")}


@dataclass(frozen=True)
class Anchor:
    """What the run is measured against.

    Attributes:
        safety: prompts with the aligned model's answers and with both openings.
        log_probability: of the aligned model over its own answers, [P, vocabulary] per micro-batch.
        weights: the trained parameters by name; empty where the space is too large to hold a copy.
        sketch: of the trained parameters, [d].
        device: kind of device the sketch was made on.
        eigenvalues: of the safety subspace, [k], nats per parameter unit squared.
        coefficients: C [m, k] of its directions V = G'C.
        columns: V as k vectors [n], where they are small enough to keep.
        no_subspace: why there is none.
        about: what the run is, for the comparison on resumption.
    """

    safety: SafetySet
    log_probability: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    sketch: Tensor
    device: str
    eigenvalues: Tensor | None
    coefficients: Tensor | None
    columns: tuple[Tensor, ...]
    no_subspace: str | None
    about: dict[str, Any] = field(default_factory=dict)

    def divergence(self, forward: Forward, pad: int, max_tokens: int) -> DivergenceObjective:
        """Safety KL of any model from this anchor; no pass is made."""
        reference = tuple(block.to(forward.device) for block in self.log_probability)
        examples = self.safety.responses
        chunks = tuple((torch.tensor(members), batch) for members, batch in batches(examples, pad, max_tokens))

        def reading(logits: Tensor, labels: Tensor, number: int) -> Tensor:
            return divergence(reference[number], logits, labels)

        m = self.safety.m
        ones = torch.ones(m, dtype=torch.float64)
        return DivergenceObjective(LanguageObjective(forward, chunks, torch.arange(m), ones, reading, m), reference)


def measure_anchor(loaded: Loaded, rows: Sequence[Mapping[str, Any]], options: TrackerOptions) -> Anchor:
    """Measure the aligned model, in eval mode and undisturbed, before the first step.

    Raises:
        DataError: no safety row can be used.

    Cost: answers where the rows have none, one forward pass over them, one Gram matrix, and where directions are kept
        one gradient for each; log-probabilities take 4 P vocabulary bytes for P answer tokens.
    """
    safety = prepare_safety(
        loaded,
        [dict(row) for row in rows],
        limit=options.max_safety,
        max_length=min(options.max_length, loaded.context),
        response_tokens=options.response_tokens,
        refusal_opening=options.refusal_opening,
        compliance_opening=options.compliance_opening,
    )
    forward = Forward(loaded.model, trainable(loaded.model, parts=True))
    pad = loaded.tokenizer.pad_token_id
    measured = divergence_objective(forward, safety.responses, pad, options.max_tokens)
    # in the micro-batches that a run which is resumed will cut again, though memory may have made them smaller here
    reference = measured.anchor_of([members for members, _ in batches(safety.responses, pad, options.max_tokens)])
    values, coefficients, columns, reason = measure_subspace(forward, safety.responses, pad, options)
    held = forward.whole.size <= HELD
    weights = {name: own_part(p).clone() for name, p in forward.parameters.items()} if held else {}
    sketch = Sketch(seed=options.seed).of(whole(p.detach()) for p in forward.parameters.values())
    return Anchor(
        safety, reference, weights, sketch, forward.device.type, values, coefficients, tuple(columns), reason,
    )  # fmt: skip


def measure_subspace(
    forward: Forward, examples: Sequence[Example], pad: int, options: TrackerOptions
) -> tuple[Tensor | None, Tensor | None, list[Tensor], str | None]:
    """Top of the empirical Fisher matrix of the answers at the model as it stands.

    Returns: eigenvalues [k], coefficients [m, k], directions where they are small enough, and why there are none.
    """
    if options.rank == 0:
        return None, None, [], "the tracker was told to measure no subspace (rank 0)"
    score = likelihood_objective(forward, examples, pad, options.max_tokens, per="root")
    held = [batch for _, batch in score.chunks]
    products = gram(forward.model, held, score_loss, forward.parameters, store_bytes=FACTORS)
    order = torch.cat([members for members, _ in score.chunks])
    scale = score.factor[order]
    total = torch.empty_like(products.total)
    total[order[:, None], order] = products.total * scale[:, None] * scale
    values, coefficients = spectrum_of(total)
    k = min(options.rank, int((values > ROUNDING * values[0]).sum()))
    if not float(values[0]) > 0:
        return None, None, [], "the aligned model's answers do not depend on the trained parameters"
    values, coefficients = values[:k], coefficients[:, :k]
    if k * forward.whole.size > DENSE:
        return values, coefficients, [], None
    return values, coefficients, [score.gradient(column) for column in coefficients.T.contiguous()], None


def usable_prompts(loaded: Loaded, rows: Sequence[Mapping[str, Any]], options: TrackerOptions) -> list[Any]:
    """The prompts of the rows that are measured, for generation; those without a prompt are left out."""
    out = []
    for index in spread(len(rows), options.max_safety):
        try:
            out += prompts_of([rows[index]], loaded.tokenizer)
        except DataError:  # counted as skipped where the safety set is tokenised
            continue
    return out
