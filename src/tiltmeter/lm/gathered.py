"""Products of weights that are divided among processes (FSDP2): each process has its part of every vector.

A module's weights are gathered when the model comes to it and dropped when it has passed, in forward mode with their
tangents and again on the way back, so that no process holds the model whole. FSDP2's own gathering knows nothing of
displaced weights or tangents and is switched off meanwhile. All processes measure the same examples: they gather the
same weights at the same time, and each keeps its part of a gradient, so that nothing is added up between them but
inner products.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiltmeter.errors import UnsupportedModel
from tiltmeter.geometry.space import summed_by
from tiltmeter.lm.sharding import is_part, let_go

#: Numbers of a random vector that are drawn at once; a multiple of 16, by which torch draws.
BLOCK = 2**22


#: Its name from PyTorch 2.13 on; before, the longer one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class Part:
    """Rows of one divided parameter that this process has.

    Attributes:
        shape: of the whole parameter.
        begin: first row that is here.
        end: row after the last one.
        each: rows that a process has, the last ones fewer.
        group: the processes.
    """

    shape: tuple[int, ...]
    begin: int
    end: int
    each: int
    group: Any

    @classmethod
    def of(cls, p: Any) -> Part:
        """That of a DTensor as FSDP2 makes them: first axis, one group of processes.

        Raises:
            UnsupportedModel: it is divided in another way.
        """
        if len(p.placements) != 1 or not p.placements[0].is_shard(0):
            raise UnsupportedModel(
                f"a weight is divided as {p.placements}; expected rows divided among the processes of one group, as "
                "fully_shard does. Launch without tensor parallelism or replicas (--fsdp_version 2 alone)."
            )
        world, rank, shape = p.device_mesh.size(), p.device_mesh.get_local_rank(), tuple(p.shape)
        each = -(-shape[0] // world)
        begin = min(rank * each, shape[0])
        return cls(shape, begin, min(begin + each, shape[0]), each, p.device_mesh.get_group())

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole tensor, or of several in front of each other [..., *shape]; a view."""
        return whole.narrow(whole.ndim - len(self.shape), self.begin, self.end - self.begin)

    def gather(self, own: Tensor) -> Tensor:
        """The whole of which every process gives its rows. Cost: a word from each process to each."""
        padded = own.new_zeros(self.each, *self.shape[1:])
        padded[: self.end - self.begin] = own
        out = own.new_empty(dist.get_world_size(self.group) * self.each, *self.shape[1:])
        _all_gather(out, padded, group=self.group)
        return out[: self.shape[0]]


class _Gather(torch.autograd.Function):
    """The whole of a tensor from its rows: linear, so that tangents are gathered and gradients cut alike."""

    @staticmethod
    def forward(own: Tensor, part: Part) -> Tensor:
        return part.gather(own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.part = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.part.own(gradients[0]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _gather(tangent, ctx.part)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], own: Tensor, part: Part) -> tuple[Tensor, int | None]:
        if in_dims[0] is None:
            return _gather(own, part), None
        return torch.stack([_gather(each, part) for each in own.unbind(in_dims[0])]), 0


def _gather(own: Tensor, part: Part) -> Tensor:
    out: Tensor = _Gather.apply(own, part)  # type: ignore[no-untyped-call]
    return out


def parts_together(parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[None]:
    """Inner products of vectors of these parameters are over all processes, if each has a part of them alone."""
    parted = [p for p in parameters.values() if is_part(p)]
    if not parted:
        return nullcontext()
    if len(parted) < len(parameters):
        name = next(name for name, p in parameters.items() if not is_part(p))
        raise UnsupportedModel(
            f"{name} is whole in every process and other trained weights are divided; train one kind or the other"
        )
    group = Part.of(parted[0]).group

    def total(held: Tensor) -> Tensor:
        there = held.to(parted[0].device)
        dist.all_reduce(there, group=group)
        return there.to(held.device)

    return summed_by(total)


def own_part(p: Tensor) -> Tensor:
    """What this process has of a parameter, detached; all of it where it is not divided."""
    if not is_part(p):
        return p.detach()
    with torch.no_grad():  # then it is no operation, which inside a transform of `torch.func` would give another tensor
        held: Tensor = p.to_local()  # type: ignore[attr-defined]
    return held.detach() if held.requires_grad else held


def as_part(own: Tensor, p: Any) -> Tensor:
    """What this process has of a tensor, as one that is divided like a parameter; the tensor itself for a whole one."""
    if not is_part(p):
        return own
    from torch.distributed.tensor import DTensor

    held: Tensor = DTensor.from_local(
        own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return held


def own_rows(whole: Tensor, p: Any) -> Tensor:
    """This process's rows of a tensor of a parameter's shape; all where it is not divided."""
    return Part.of(p).own(whole) if is_part(p) else whole


def whole_vector(own: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """All of a vector [n] of which each process has a part. Cost: a gathering for every parameter."""
    if not any(is_part(p) for p in parameters.values()):
        return own
    out, start = [], 0
    for p in parameters.values():
        held = own_part(p)
        out.append(Part.of(p).gather(own[start : start + held.numel()].view(held.shape)).reshape(-1))
        start += held.numel()
    return torch.cat(out)


def own_vector(whole: Tensor, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """This process's part of a whole vector [n]."""
    out, start = [], 0
    for p in parameters.values():
        out.append(own_rows(whole[start : start + p.numel()].view(p.shape), p).reshape(-1))
        start += p.numel()
    return torch.cat(out)


def evenly_spread(parameters: Mapping[str, nn.Parameter], vector: Tensor, most: int) -> Tensor:
    """At most about `most` entries of a vector [n], evenly spread; the same in all processes that have a part of it."""
    size = sum(p.numel() for p in parameters.values())
    step = max(1, size // most)
    if not any(is_part(p) for p in parameters.values()):
        return vector[::step]
    out = vector.new_zeros(-(-size // step))
    start = here = 0
    group = None
    for p in parameters.values():
        part, row = Part.of(p), p.numel() // max(1, len(p))
        begin, count, group = start + part.begin * row, (part.end - part.begin) * row, part.group
        first = -(-begin // step)  # the first of them that is in this process's rows
        taken = vector[here : here + count][first * step - begin :: step]
        out[first : first + len(taken)] = taken
        start, here = start + p.numel(), here + count
    dist.all_reduce(out, group=group)
    return out


def standard_normal(parameters: Mapping[str, nn.Parameter], seed: int, dtype: torch.dtype) -> Tensor:
    """Independent standard normal numbers [n]: of a divided vector, its part of what one process would draw."""
    generator = torch.Generator().manual_seed(seed)
    if not any(is_part(p) for p in parameters.values()):
        size = sum(p.numel() for p in parameters.values())
        return torch.randn(size, generator=generator, dtype=dtype)
    wanted, start = [], 0
    for p in parameters.values():
        begin, end = 0, p.numel()
        if is_part(p):
            part, row = Part.of(p), p.numel() // max(1, len(p))
            begin, end = part.begin * row, part.end * row
        wanted.append((start + begin, start + end))
        start += p.numel()
    out = torch.empty(sum(end - begin for begin, end in wanted), dtype=dtype)
    filled = drawn = 0
    while drawn < start:
        # torch draws its last sixteen numbers anew where their count is no multiple of sixteen: they stay together
        count = start - drawn if start - drawn < 2 * BLOCK else BLOCK
        block = torch.randn(count, generator=generator, dtype=dtype)
        for begin, end in wanted:
            low, high = max(begin, drawn), min(end, drawn + count)
            if low < high:
                out[filled : filled + high - low] = block[low - drawn : high - drawn]
                filled += high - low
        drawn += count
    return out


@contextmanager
def gathering(
    model: nn.Module,
    values: Mapping[int, Tensor],
    made: Callable[[Tensor, int], Tensor] | None = None,
    *,
    back: bool = True,
) -> Iterator[None]:
    """Run a divided model on given parts of its weights, gathering each when its module is called.

    What is gathered is not kept for the way back, but gathered again there.

    Args:
        model: whose parameters are divided.
        values: id of a parameter -> this process's part of what stands for it, which may carry a tangent or require a
            gradient; parameters that are not named stand for themselves.
        made: given a gathered weight and its parameter's id, returns what the module is to use.
        back: whether there is a way back; not inside the transforms of `torch.func`.

    Cost: a gathering of every module's weights in each pass through it, forwards and backwards.
    """
    let_go(model)
    alive: dict[int, tuple[Any, Tensor, Part]] = {}
    inside: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []

    def enter(module: nn.Module, _: Any) -> None:
        held = {key: p for key, p in module._parameters.items() if p is not None and is_part(p)}
        inside.append((module, held))
        for key, p in held.items():
            own, part = values.get(id(p)), Part.of(p)
            own = own_part(p) if own is None else own
            whole = _gather(own, part)
            used = whole if made is None else made(whole, id(p))
            module._parameters[key] = used  # type: ignore[assignment]
            if back:
                alive[used.untyped_storage().data_ptr()] = weakref.ref(used), own.detach(), part

    def leave(module: nn.Module, *_: Any) -> None:
        if inside and inside[-1][0] is module:
            module._parameters.update(inside.pop()[1])

    def pack(tensor: Tensor) -> Any:
        if tensor._is_zerotensor():  # the tangent of a constant, in forward mode: it has no memory
            return tensor
        found = alive.get(tensor.untyped_storage().data_ptr())
        if found is None or found[0]() is None:  # another tensor where a weight was before
            return tensor
        return found[1:], tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        (own, part), shape, stride, offset = packed
        whole: Tensor = part.gather(own)
        return whole.as_strided(shape, stride, offset)

    owners = [m for m in model.modules() if any(p is not None and is_part(p) for p in m._parameters.values())]
    hooks = []
    with _unhooked(model), torch.autograd.graph.saved_tensors_hooks(pack, unpack) if back else nullcontext():
        try:
            for module in owners:
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            while inside:
                module, held = inside.pop()
                module._parameters.update(held)


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Without FSDP2's own hooks around the forward passes of its modules."""
    kept: list[tuple[nn.Module, OrderedDict[int, Any], OrderedDict[int, Any]]] = []
    for module in model.modules():
        before, after = module._forward_pre_hooks, module._forward_hooks
        if any(_is_fsdp(hook) for hook in (*before.values(), *after.values())):
            kept.append((module, before, after))  # type: ignore[arg-type]
            module._forward_pre_hooks = OrderedDict((k, h) for k, h in before.items() if not _is_fsdp(h))
            module._forward_hooks = OrderedDict((k, h) for k, h in after.items() if not _is_fsdp(h))
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
