"""Safety KL and refusal margin together: what is measured at every point of a path and of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltmeter.geometry.forecast import Separate, Standing
from tiltmeter.lm.conversation import Batch, collate
from tiltmeter.lm.divergence import DivergenceObjective
from tiltmeter.lm.forward import Forward, Reading, divergence, negative_log_likelihood
from tiltmeter.lm.memory import logger, shrinking
from tiltmeter.lm.objective import LanguageObjective, halved
from tiltmeter.lm.packed import common_prompt, pack, packs
from tiltmeter.lm.safety import SafetySet
from tiltmeter.lm.template import UNSUPERVISED

#: What two ways of reading the same prompt may differ by, relative to 1 + |log-likelihood|, by the model's precision.
AGREE = {torch.float32: 1e-3, torch.float64: 1e-8}

#: Sequences of one prompt: answer, refusal, compliance.
TRIPLE = 3


@dataclass(frozen=True)
class KlAndMargin:
    """Both of m prompts, with each prompt read once.

    Attributes:
        inner: losses [2 m], KL first, then minus the margin; three sequences per prompt.
        log_probability: the anchor's at the answers' tokens, [P, vocabulary] per micro-batch; shared with the
            divergence it was made from.
    """

    inner: LanguageObjective
    log_probability: tuple[Tensor, ...]

    @property
    def work(self) -> int:
        """Tokens of one pass, padding included."""
        return self.inner.work

    @shrinking
    def __call__(self, displacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Safety KL [m], nats per token, and margin [m], nats. Cost: one forward pass."""
        kl, negative = self.inner.losses(displacement).chunk(2)
        return kl, -negative

    def only(self, numbers: Sequence[int]) -> KlAndMargin:
        """The same prompts, of which only the micro-batches with these numbers are read; the others give zero."""
        references = tuple(self.log_probability[i] for i in numbers)
        chunks = tuple(self.inner.chunks[i] for i in numbers)
        return KlAndMargin(replace(self.inner, chunks=chunks, reading=_reading(references)), references)

    def halve(self) -> bool:
        """Split the largest micro-batches, for good.

        Raises:
            OutOfMemory: they hold one prompt each.
        """
        before = self.inner.chunks
        parts = halved(before, self.inner.forward)
        references = tuple(_answers_of(self.log_probability[i], before[i][1].labels, rows) for _, i, rows in parts)
        chunks = tuple(part for part, _, _ in parts)
        object.__setattr__(self, "log_probability", references)
        object.__setattr__(self, "inner", replace(self.inner, chunks=chunks, reading=_reading(references)))
        return True


def standing(
    divergence: DivergenceObjective, negative_margin: LanguageObjective, safety: SafetySet, pad_id: int, *, packed: bool
) -> Standing:
    """Safety KL and margin as one function of the displacement.

    Args:
        divergence: of the safety set's answers.
        negative_margin: of its openings; only used where prompts are not packed.
        safety: the prompts.
        pad_id: token to pad with.
        packed: whether the model reads packed prompts.

    Cost: of a call, one forward pass over the prompts with all that may follow them; over each three times where they
        are not packed.
    """
    if not packed:
        return Separate(divergence, negative_margin)
    triples = list(zip(safety.responses, safety.refusals, safety.compliances, strict=True))
    # the same groups as the answers', so that what the anchor said of them is not stored twice
    groups = [members.tolist() for members, _ in divergence.inner.chunks]
    chunks = tuple((torch.tensor(members), batch) for members, batch in packs(triples, pad_id, 0, groups))
    m = safety.m
    owner = torch.stack([torch.arange(m), m + torch.arange(m), m + torch.arange(m)], 1).flatten()
    factor = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64).repeat(m)
    references = divergence.log_probability
    inner = LanguageObjective(divergence.inner.forward, chunks, owner, factor, _reading(references), 2 * m)
    return KlAndMargin(inner, references)


def reads_packed(forward: Forward, safety: SafetySet, pad_id: int) -> bool:
    """Whether a model reads the continuations of a packed prompt as if each stood alone, tried on the longest prompt.

    Half-precision models are not packed: the two ways round differently, and a small KL would drown in that.

    Cost: a forward pass over one prompt with all that may follow it, in both layouts.
    """
    dtypes = {p.dtype for p in forward.model.parameters()}
    if not dtypes <= AGREE.keys():
        return False
    triples = list(zip(safety.responses, safety.refusals, safety.compliances, strict=True))
    if min(common_prompt(triple) for triple in triples) == 0:
        return False
    longest = max(triples, key=lambda triple: max(len(each.tokens) for each in triple))
    alone = [collate([each], pad_id) for each in longest]  # one by one: not more at a time than anything else needs

    def read(batch: Batch) -> Tensor:
        forward.passes.add("forward", batch.tokens.numel())
        return negative_log_likelihood(*forward.logits(forward.at(), batch)).double()

    with torch.no_grad():
        apart = torch.cat([read(batch) for batch in alone])
        try:
            joined = read(pack([longest], pad_id))
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            # the model takes no mask of its own, or no positions, or there is no room for both at once
            logger.info("every sequence is read by itself, since packed prompts failed: %s", error)
            return False
    allowed = max(AGREE[dtype] for dtype in dtypes)
    return bool(((joined - apart).abs() <= allowed * (1 + apart.abs())).all())


def _reading(references: Sequence[Tensor]) -> Reading:
    """KL of answers and negative log-likelihood of openings, in turn."""

    def reading(logits: Tensor, labels: Tensor, number: int) -> Tensor:
        first, rest = slice(None, None, TRIPLE), torch.arange(len(labels)) % TRIPLE > 0
        kl = divergence(references[number], logits[first], labels[first])
        openings = negative_log_likelihood(logits[rest], labels[rest])
        return torch.cat([kl[:, None], openings.view(-1, TRIPLE - 1)], 1).flatten()

    return reading


def _answers_of(reference: Tensor, labels: Tensor, sequences: Tensor) -> Tensor:
    """What a reference [P, vocabulary] over a micro-batch's answers holds of some of its sequences."""
    counts = (labels[::TRIPLE] != UNSUPERVISED).sum(1).tolist()
    parts = torch.split(reference, counts)
    return torch.cat([parts[i] for i in torch.unique(sequences // TRIPLE).tolist()])
