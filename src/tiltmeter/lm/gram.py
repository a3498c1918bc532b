"""Inner products and weighted sums of the per-example gradients of a language model, without holding the gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltmeter.errors import NumericalError, SpaceMismatch
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.factors import Pieces
from tiltmeter.lm.gathered import Part, own_part
from tiltmeter.lm.sharding import is_part
from tiltmeter.lm.sweep import Loss, factor_bytes, sweep


@dataclass(frozen=True)
class Gram:
    """Inner products K[i, j] = <grad loss_i, grad loss_j> over m examples.

    Attributes:
        total: [m, m] float64, in squared units of the loss per squared parameter unit.
        by_parameter: the share [m, m] of every parameter, by name; they sum to `total`.
    """

    total: Tensor
    by_parameter: dict[str, Tensor]


def gram(
    model: Any,
    batches: Sequence[Batch],
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    *,
    chunk_bytes: int = 256 * 2**20,
    store_bytes: int = 8 * 2**30,
) -> Gram:
    """Measure the inner products of all pairs of per-example gradients.

    One forward and one backward pass over every batch record, at each layer, the activations and output gradients that
    the gradients are products of; no weight gradient is computed. Examples of different batches are paired too, so
    these factors stay in memory until the last batch has passed the layer. If `gram_bytes` says that they would take
    more than `store_bytes`, the parameters are split into groups, with a pass over all batches for each.

    The model is evaluated as it stands, without dropout, and left as it was. Right-padded tokens need no attention
    mask under a causal one. Gradient checkpointing, if switched on, is used. Tied weights count once, with all cross
    terms.

    Args:
        model: a causal language model of transformers; the batch is the first axis of its activations.
        batches: m examples in all.
        loss: logits [b, T, vocabulary] and labels [b, T] to losses [b], each of its own example alone.
        parameters: which parameters the gradient is taken for; others are constants, trainable or not.
        chunk_bytes: memory that gradients may be formed in.
        store_bytes: memory that the factors may take.

    Returns: the products, whole and by parameter. A parameter that no loss depends on has zeros.

    Raises:
        UnsupportedModel: a parameter is not of this model or cannot be differentiated, or no loss depends on any.
        SpaceMismatch: two names stand for one parameter, or the loss is not one number per example.
        DataError: there are no examples.
        NumericalError: a loss or product is not finite.

    Cost: 1.0 (8 examples) to 1.4 (32) forward+backward passes over the data; with several groups about half as much
        for each. Where a parameter is used in a way that is not recognised (see `layers.Recorder`), the examples are
        passed one at a time for its group, and the gradients of that parameter are held [m, size].
    Error: relative 1e-6 in float32; half-precision weights are multiplied in float32, but their gradients are only as
        good as their activations. TF32, where it is switched on, costs digits.
    """
    m = sum(len(batch.tokens) for batch in batches)
    blocks = sweep(model, batches, loss, parameters, lambda pieces: pieces.gram(m, chunk_bytes), store_bytes)
    by_parameter = {name: blocks.get(name, torch.zeros(m, m, dtype=torch.float64)) for name in parameters}
    total = torch.stack(list(by_parameter.values())).sum(0)
    if not total.isfinite().all():
        raise NumericalError("a product of per-example gradients is not finite; load the model in float32 or bfloat16")
    return Gram(total, by_parameter)


def combine(
    model: Any,
    batches: Sequence[Batch],
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    weights: Tensor,
    *,
    chunk_bytes: int = 256 * 2**20,
    store_bytes: int = 8 * 2**30,
) -> dict[str, Tensor]:
    """Form k weighted sums of the per-example gradients at once, as the eigenvectors V = G'C of a Gram matrix are.

    Args:
        model: as for `gram`, like the next three.
        batches: m examples in all.
        loss: of each example.
        parameters: what the gradients are taken for.
        weights: C' [k, m].
        chunk_bytes: memory that gradients may be formed in.
        store_bytes: memory that the factors may take.

    Returns: parameter -> [k, *shape]; zeros for one that no loss depends on. Of a parameter that is divided among
        processes, this one's rows.

    Raises: as `gram`.

    Cost: about that of `gram`, whatever k is; memory 4 k n bytes for the result.
    """
    m = sum(len(batch.tokens) for batch in batches)
    if weights.ndim != 2 or weights.shape[1] != m:
        raise SpaceMismatch(f"expected weights [k, {m}], one per example, got shape {tuple(weights.shape)}")

    def own(name: str, held: Tensor) -> Tensor:
        p = parameters[name]
        return Part.of(p).own(held).clone() if is_part(p) else held

    def take(pieces: Pieces) -> Tensor:
        return pieces.combine(weights, chunk_bytes)

    sums = sweep(model, batches, loss, parameters, take, store_bytes, own)
    for name, p in parameters.items():
        if name in sums and not sums[name].isfinite().all():
            raise NumericalError(f"a gradient of {name} is not finite; load the model in float32 or bfloat16")
        sums.setdefault(name, own_part(p).new_zeros(len(weights), *own_part(p).shape))
    return sums


def gram_bytes(model: Any, tokens: int, supervised: int, parameters: Mapping[str, nn.Parameter] | None = None) -> int:
    """Estimate the memory that `gram` adds to that of a forward and backward pass, less `chunk_bytes`.

    The factors of all batches are counted, as if no activation were shared by two layers and none freed early; over
    a single batch, most of this is never needed at one time.

    Args:
        model: a causal language model of transformers.
        tokens: positions in all batches, padding included.
        supervised: positions of them that carry loss.
        parameters: as for `gram`; by default those that are trainable.

    Returns: bytes, an upper bound for layers that are recognised.
    """
    chosen = parameters or {name: p for name, p in model.named_parameters() if p.requires_grad}
    return sum(factor_bytes(model, p, tokens, supervised) for p in chosen.values())


def per_layer_name(parameter_name: str) -> str:
    """Name of the part of the model that a parameter is in.

    Returns: "layers.3" for a block, "embed", "head" or "final_norm"; for anything else its module's name.
    """
    block = re.search(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.", parameter_name)
    if block:
        return f"layers.{block[1]}"
    parts = set(parameter_name.split("."))
    if parts & {"lm_head", "embed_out", "output_layer"}:
        return "head"
    if parts & {"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embed_positions"}:
        return "embed"
    if parts & {"norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm"}:
        return "final_norm"
    return parameter_name.removeprefix("base_model.model.").rpartition(".")[0] or parameter_name
