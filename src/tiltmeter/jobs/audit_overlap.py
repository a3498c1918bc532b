"""The overlap of a weight change with the safety subspace of the base, overall and layer by layer.

With G [m, n] the scores of the base's own answers and K = G G' = sum over tensors of K_l, everything is m x m: the
subspace V = G'C of all parameters from K, that of one layer alone from its K_l, and the change's coordinates from
G delta, one inner product for every answer and tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.geometry.overlap import Overlap, layer_null, overlap_score
from tiltmeter.geometry.sensitivity import ROUNDING, spectrum_of
from tiltmeter.geometry.space import dot
from tiltmeter.geometry.spectrum import LowRank
from tiltmeter.jobs.audit_weights import TensorChange
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.gram import gram
from tiltmeter.lm.model import Loaded
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective
from tiltmeter.lm.scores import score_loss
from tiltmeter.lm.weights import Pair

MAX_TOKENS = 256


@dataclass(frozen=True)
class LayerOverlap:
    """One layer.

    Attributes:
        own: overlap with the layer's own most sensitive directions; None if its scores determine none.
        share: part of the change's squared coordinates in the whole model's subspace that this layer brings alone.
    """

    own: Overlap | None
    share: float


@dataclass(frozen=True)
class OverlapFindings:
    """The overlap and what it is read against.

    Attributes:
        whole: over all changed parameters, with the isotropic null.
        layered_mean: mean of OS^2 for a change as long in every layer, of random direction.
        layered_z: (OS^2 - layered_mean) / its deviation.
        by_layer: layer -> overlap.
        energy: 1/2 sum of eigenvalue times squared coordinate: KL the change makes to second order, nats per token.
    """

    whole: Overlap
    layered_mean: float
    layered_z: float
    by_layer: dict[str, LayerOverlap]
    energy: float


def measure_overlap(
    loaded: Loaded, pair: Pair, changes: tuple[TensorChange, ...], answers: tuple[Example, ...], rank: int
) -> OverlapFindings:
    """Measure overlaps at the base.

    Args:
        loaded: the base, with its own weights in it.
        pair: the checkpoints.
        changes: of the tensors that changed; they span the space.
        answers: the base's own answers to safety prompts, m of them.
        rank: directions; fewer where m answers determine fewer.

    Cost: about 2.5 forward+backward passes over the answers; memory: model, one gradient. The shards are read m times.
    """
    names = {each.name for each in changes}
    parameters = {name: p for name, p in loaded.model.named_parameters() if name in names}
    for name, p in loaded.model.named_parameters():
        p.requires_grad_(name in names)
    forward = Forward(loaded.model, parameters)
    score = likelihood_objective(forward, answers, loaded.tokenizer.pad_token_id, MAX_TOKENS, per="root")
    blocks = _blocks(score, {each.name: each.layer for each in changes})
    along = _along(score, pair, {each.name: each.layer for each in changes})
    lengths = {layer: sum(e.length**2 for e in changes if e.layer == layer) ** 0.5 for layer in blocks}
    sizes = {layer: sum(e.size for e in changes if e.layer == layer) for layer in blocks}
    return combine(blocks, along, lengths, sizes, rank)


def combine(
    blocks: dict[str, Tensor], along: dict[str, Tensor], lengths: dict[str, float], sizes: dict[str, int], rank: int
) -> OverlapFindings:
    """Overlaps from m x m blocks K_l, coordinates G_l delta_l [m], lengths |delta_l| and sizes n_l of all layers."""
    total = torch.stack(list(blocks.values())).sum(0)
    eigenvalues, coefficients = _top(total, rank)
    d = coefficients.shape[1]
    parts = {layer: coefficients.T @ values for layer, values in along.items()}
    z = torch.stack(list(parts.values())).sum(0)
    length = sum(each**2 for each in lengths.values()) ** 0.5
    whole = overlap_score(float(z.norm()), length, d, sum(sizes.values()))
    mean, deviation = layer_null(
        [coefficients.T @ block @ coefficients for block in blocks.values()],
        [lengths[layer] for layer in blocks],
        [sizes[layer] for layer in blocks],
    )
    squares = {layer: float(part.square().sum()) for layer, part in parts.items()}
    summed = sum(squares.values())
    by_layer = {}
    for layer, block in blocks.items():
        own = _top(block, rank)[1]
        score = None
        if 0 < own.shape[1] < sizes[layer] and lengths[layer] > 0:
            score = overlap_score(float((own.T @ along[layer]).norm()), lengths[layer], own.shape[1], sizes[layer])
        by_layer[layer] = LayerOverlap(score, squares[layer] / summed if summed else 0.0)
    energy = float((eigenvalues * z.square()).sum()) / 2
    return OverlapFindings(whole, mean, (whole.score**2 - mean) / max(deviation, 1e-300), by_layer, energy)


def _top(block: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """At most `rank` eigenvalues and coefficients that a Gram matrix determines."""
    values, coefficients = spectrum_of(block)
    determined = int((values > ROUNDING * values[0]).sum()) if bool(values[0] > 0) else 0
    keep = min(rank, determined)
    return values[:keep], coefficients[:, :keep]


def _blocks(score: LanguageObjective, layer_of: dict[str, str]) -> dict[str, Tensor]:
    """K_l [m, m] of every layer."""
    forward = score.forward
    products = gram(forward.model, [batch for _, batch in score.chunks], score_loss, forward.parameters)
    sequences = torch.cat([members for members, _ in score.chunks])
    mix = torch.zeros(score.m, len(sequences), dtype=torch.float64)
    mix[score.owner[sequences], torch.arange(len(sequences))] = score.factor[sequences]
    out: dict[str, Tensor] = {}
    for name, block in products.by_parameter.items():
        mixed = mix @ block.double() @ mix.T
        layer = layer_of[name]
        out[layer] = out[layer] + mixed if layer in out else mixed
    return out


def _along(score: LanguageObjective, pair: Pair, layer_of: dict[str, str]) -> dict[str, Tensor]:
    """G_l delta_l [m] of every layer, from one gradient for each answer."""
    out = {layer: torch.zeros(score.m, dtype=torch.float64) for layer in dict.fromkeys(layer_of.values())}
    for e in range(score.m):
        weights = torch.zeros(score.m, dtype=torch.float64)
        weights[e] = 1.0
        gradient = score.gradient(weights)
        for name, part in score.space.split(gradient).items():
            change = pair.change(name)
            if isinstance(change, LowRank):  # <g, b a> = <b' g, a>
                value = float(((change.b.to(part).T @ part).double() * change.a.to(part).double()).sum())
            elif change is not None:
                value = dot(part.reshape(-1), change.to(part).reshape(-1))
            else:
                value = 0.0
            out[layer_of[name]][e] += value
    return out
