"""Inner products of the per-example gradients of a language model, without ever holding the gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tiltmeter.errors import DataError, NumericalError, SpaceMismatch, UnsupportedModel
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.factors import wide
from tiltmeter.lm.layers import Recorder
from tiltmeter.lm.model import undisturbed

Loss = Callable[[Tensor, Tensor], Tensor]
Data = Sequence[tuple[Tensor, Tensor]]


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
    _check(model, batches, parameters)
    data = [(batch.tokens, batch.labels) for batch in batches]
    blocks: dict[str, Tensor] = {}
    for group in _groups(model, data, parameters, store_bytes):
        found = _sweep(model, data, loss, group, chunk_bytes)
        blocks |= _sweep_apart(model, data, loss, group, chunk_bytes, store_bytes) if found is None else found
    if not blocks:
        raise UnsupportedModel(f"the losses do not depend on {next(iter(parameters))} or any other of the parameters")
    m = sum(len(tokens) for tokens, _ in data)
    by_parameter = {name: blocks.get(name, torch.zeros(m, m, dtype=torch.float64)) for name in parameters}
    total = torch.stack(list(by_parameter.values())).sum(0)
    if not total.isfinite().all():
        raise NumericalError("a product of per-example gradients is not finite; load the model in float32 or bfloat16")
    return Gram(total, by_parameter)


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
    return sum(_factor_bytes(model, p, tokens, supervised) for p in chosen.values())


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


def _check(model: Any, batches: Sequence[Batch], parameters: Mapping[str, nn.Parameter]) -> None:
    if not batches:
        raise DataError("no examples to take gradients of")
    if not parameters:
        raise SpaceMismatch("no parameters to take gradients for")
    own = {id(p) for p in model.parameters()}
    names: dict[int, str] = {}
    for name, p in parameters.items():
        if id(p) not in own:
            raise UnsupportedModel(f"parameter {name} is not one of this model's")
        if not p.is_floating_point() or p.is_meta or type(p) is not nn.Parameter:
            raise UnsupportedModel(
                f"parameter {name} ({type(p).__name__}, {p.dtype}, {p.device}) has no per-example gradient: it is "
                "quantised, sharded or not loaded; measure on an adapter, or load the weights whole"
            )
        if id(p) in names:
            raise SpaceMismatch(f"{names[id(p)]} and {name} are one tied parameter; give it once")
        names[id(p)] = name


@contextmanager
def _recorded(model: Any, parameters: Mapping[str, nn.Parameter], recorder: Recorder) -> Iterator[None]:
    """Work on the model as it is evaluated, with gradients to these parameters alone, and leave no trace.

    Checkpointing layers work as such in training mode only, so they are put there; the modules in them are not. What
    they run again on the way back has to be recorded as it was the first time.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), recorder))
    chosen = {id(p) for p in parameters.values()}
    with undisturbed(model), torch.enable_grad():
        try:
            for layer in layers:
                layer.training, layer._gradient_checkpointing_func = True, again
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)
            yield
        finally:
            recorder.pieces.clear()
            for layer, function in zip(layers, functions, strict=True):
                layer._gradient_checkpointing_func = function


def _factor_bytes(model: Any, p: nn.Parameter, tokens: int, supervised: int) -> int:
    """Memory of the factors of one parameter."""
    if p.ndim != 2:
        return 0
    r, c = p.shape
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    floats = tokens * (r + c)
    if embedding is not None and p is embedding.weight:
        floats = tokens * c
    if head is not None and p is head.weight:
        floats = supervised * (r + c) + (tokens * c if p is embedding.weight else 0)
    return floats * p.element_size()


def _groups(
    model: Any,
    data: Data,
    parameters: Mapping[str, nn.Parameter],
    store_bytes: int,
    odd: Collection[str] = (),
) -> list[dict[str, nn.Parameter]]:
    """Split the parameters, in order, so that what is kept for each group fits; one batch needs no store."""
    m = sum(len(t) for t, _ in data)
    tokens, supervised = sum(t.numel() for t, _ in data), sum(int((y != -100).sum()) for _, y in data)
    groups: list[dict[str, nn.Parameter]] = [{}]
    filled = 0
    for name, p in parameters.items():
        need = _factor_bytes(model, p, tokens, supervised) if len(data) > 1 else 0
        if name in odd:
            need = m * p.numel() * max(4, p.element_size())
        if filled + need > store_bytes and groups[-1]:
            groups.append({})
            filled = 0
        groups[-1][name] = p
        filled += need
    return groups


def _sweep(
    model: Any,
    data: Data,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    chunk_bytes: int,
) -> dict[str, Tensor] | None:
    """One pass over all batches for some parameters; None if it has to be made one example at a time."""
    m, first = sum(len(tokens) for tokens, _ in data), 0
    blocks: dict[str, Tensor] = {}

    def finish(name: str) -> None:
        blocks[name] = recorder.pieces.pop(name).gram(m, chunk_bytes)

    recorder = Recorder(parameters, m, finish)
    with _recorded(model, parameters, recorder):
        for index, (tokens, labels) in enumerate(data):
            recorder.begin(first, len(tokens), last=index == len(data) - 1)
            with recorder:
                losses = _losses(model, tokens, labels, loss)
            odd = recorder.reached(losses)
            if odd and len(tokens) > 1:
                return None
            recorder.end_forward(odd)
            if losses.requires_grad:
                leaves = [recorder.anchor, *(parameters[name] for name in odd)]
                found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)[1:]
                for name, gradient in zip(odd, found, strict=True):
                    recorder.add_rows(name, wide(gradient).reshape(1, -1))
            first += len(tokens)
        for name in recorder.used & recorder.pieces.keys():
            finish(name)
    return blocks


def _sweep_apart(
    model: Any,
    data: Data,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    chunk_bytes: int,
    store_bytes: int,
) -> dict[str, Tensor]:
    """The same one example at a time, in groups that fit although some gradients have to be kept whole."""
    apart = [(t[i : i + 1], y[i : i + 1]) for t, y in data for i in range(len(t))]
    recorder = Recorder(parameters, 1, lambda name: None)
    with _recorded(model, parameters, recorder):
        recorder.begin(0, 1, last=False)
        with recorder:
            odd = recorder.reached(_losses(model, *apart[0], loss))
    blocks: dict[str, Tensor] = {}
    for group in _groups(model, apart, parameters, store_bytes, odd):
        blocks |= _sweep(model, apart, loss, group, chunk_bytes) or {}
    return blocks


def _losses(model: Any, tokens: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=tokens.to(device), use_cache=False).logits
    losses = loss(logits, labels.to(logits.device))
    if losses.shape != (len(tokens),):
        raise SpaceMismatch(f"expected {len(tokens)} losses, one per example, got shape {tuple(losses.shape)}")
    if not losses.isfinite().all():
        raise NumericalError("the loss of an example is not finite; load the model in float32 or bfloat16")
    return losses
