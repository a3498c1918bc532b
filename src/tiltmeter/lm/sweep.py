"""Passes over batches that make something of every parameter's per-example gradients as soon as they are complete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tiltmeter.errors import DataError, NumericalError, SpaceMismatch, UnsupportedModel
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.factors import Pieces, wide
from tiltmeter.lm.gathered import gathering
from tiltmeter.lm.layers import Recorder
from tiltmeter.lm.model import undisturbed
from tiltmeter.lm.sharding import is_divided, is_part

Loss = Callable[[Tensor, Tensor], Tensor]
Data = Sequence[tuple[Tensor, Tensor]]


def sweep(
    model: Any,
    batches: Sequence[Batch],
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    take: Callable[[Pieces], Tensor],
    store_bytes: int,
    keep: Callable[[str, Tensor], Tensor] = lambda name, made: made,
) -> dict[str, Tensor]:
    """What `take` makes of each parameter's pieces and `keep` leaves of that; parameters that some loss depends on.

    Where weights are divided among processes all of them do the same, each with whole pieces.
    """
    _check(model, batches, parameters)
    data = [(batch.tokens, batch.labels) for batch in batches]
    out: dict[str, Tensor] = {}
    for group in _groups(model, data, parameters, store_bytes):
        found = _pass(model, data, loss, group, take, keep)
        out |= _one_by_one(model, data, loss, group, take, keep, store_bytes) if found is None else found
    if not out:
        raise UnsupportedModel(f"the losses do not depend on {next(iter(parameters))} or any other of the parameters")
    return out


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
        if not p.is_floating_point() or p.is_meta or not (type(p) is nn.Parameter or is_part(p)):
            raise UnsupportedModel(
                f"parameter {name} ({type(p).__name__}, {p.dtype}, {p.device}) has no per-example gradient: it is "
                "quantised or not loaded; measure on an adapter, or load the weights whole"
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
    chosen = {id(p): name for name, p in parameters.items()}

    def made(whole: Tensor, number: int) -> Tensor:
        if number not in chosen:
            return whole.detach()
        leaf = nn.Parameter(whole.detach())
        recorder.stands_for(leaf, chosen[number])
        return leaf

    with undisturbed(model), torch.enable_grad(), gathering(model, {}, made) if is_divided(model) else nullcontext():
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


def factor_bytes(model: Any, p: nn.Parameter, tokens: int, supervised: int) -> int:
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
        need = factor_bytes(model, p, tokens, supervised) if len(data) > 1 else 0
        if name in odd:
            need = m * p.numel() * max(4, p.element_size())
        if filled + need > store_bytes and groups[-1]:
            groups.append({})
            filled = 0
        groups[-1][name] = p
        filled += need
    return groups


def _pass(
    model: Any,
    data: Data,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    take: Callable[[Pieces], Tensor],
    keep: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor] | None:
    """One pass over all batches for some parameters; None if it has to be made one example at a time."""
    m, first = sum(len(tokens) for tokens, _ in data), 0
    blocks: dict[str, Tensor] = {}

    def finish(name: str) -> None:
        blocks[name] = keep(name, take(recorder.pieces.pop(name)))

    recorder = Recorder(parameters, m, finish)
    with _recorded(model, parameters, recorder):
        for index, (tokens, labels) in enumerate(data):
            recorder.begin(first, len(tokens), last=index == len(data) - 1)
            with recorder:
                losses = _losses(model, tokens, labels, loss)
            odd = recorder.reached(losses)
            if odd and len(tokens) > 1:
                return None
            recorder.end_forward(list(odd))
            if losses.requires_grad:
                named = [(name, leaf) for name, leaves in odd.items() for leaf in leaves]
                leaves = [recorder.anchor, *(leaf for _, leaf in named)]
                found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)[1:]
                for (name, _), gradient in zip(named, found, strict=True):
                    recorder.add_rows(name, wide(gradient).reshape(1, -1))
            first += len(tokens)
        for name in recorder.used & recorder.pieces.keys():
            finish(name)
    return blocks


def _one_by_one(
    model: Any,
    data: Data,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    take: Callable[[Pieces], Tensor],
    keep: Callable[[str, Tensor], Tensor],
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
        blocks |= _pass(model, apart, loss, group, take, keep) or {}
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
