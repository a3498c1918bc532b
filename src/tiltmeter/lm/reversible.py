"""Forward mode that can be differentiated backwards: a Hessian product as the gradient of a directional derivative.

A product with the Hessian takes 8 multiply-adds per weight and token so, against 9 for the gradient of <gradient, v>,
since weight gradients of the plain loss are never made; a forward and backward pass takes 3.

torch's own tangents of softmax and log_softmax change what they have computed in place, which backward mode refuses;
that of a layer norm takes mean and variance for constants, which it does not even notice. In here the three are put
together from simpler operations. Attention kernels have the same inside, so the model's plain attention is used. What
else a model may hold is not known, so the way is tried on one sequence, against backward mode twice (`agree`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from tiltmeter.geometry.space import norm
from tiltmeter.lm.model import second_order

#: What torch says where an operation's tangent is missing or cannot be differentiated backwards.
BEYOND = ("forward AD", "modified by an inplace operation", "derivative for", "not implemented for")

#: Two ways to one product differ by rounding, and in the row of an embedding's padding token; not by this share.
ALIKE = 1e-2


def log_softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Put together from exponentials, as stable as torch's: the largest value is taken off.

    Args:
        values: any shape.
        dim: that adds up to one.
        dtype: to calculate in, unless the values are finer.
    """
    values = values if dtype is None else values.to(torch.promote_types(values.dtype, dtype))
    most = _largest(values, dim)
    shifted = values - most
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """As `log_softmax`."""
    values = values if dtype is None else values.to(torch.promote_types(values.dtype, dtype))
    most = _largest(values, dim)
    powers = (values - most).exp()
    return powers / powers.sum(dim, keepdim=True)


def layer_norm(
    values: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Put together from means; arguments as torch's."""
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    out = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(values.dtype)


def _largest(values: Tensor, dim: int) -> Tensor:
    primal: Tensor = forward_ad.unpack_dual(values).primal  # type: ignore[no-untyped-call]
    return primal.detach().amax(dim, keepdim=True)


_SOFT = {
    **dict.fromkeys((torch.softmax, torch.nn.functional.softmax, Tensor.softmax), softmax),
    **dict.fromkeys((torch.log_softmax, torch.nn.functional.log_softmax, Tensor.log_softmax), log_softmax),
}


class _Composed(TorchFunctionMode):
    """Answers softmax, log_softmax and layer norms by the functions above."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.layer_norm, torch.nn.functional.layer_norm):
            return layer_norm(*args, **({"values": given.pop("input"), **given} if not args else given))
        composed = _SOFT.get(func)
        if composed is None:
            return func(*args, **given)
        values = args[0] if args else given.pop("input")
        dim = args[1] if len(args) > 1 else given.get("dim")
        if dim is None:
            return func(*args, **given)  # torch's own choice of a dimension, with its warning
        types = [each for each in (*args[2:], given.get("dtype")) if isinstance(each, torch.dtype)]
        return composed(values, dim, types[0] if types else None)


def _with_parts(config: Any) -> list[Any]:
    """A configuration that names an attention, and those of its parts that do."""
    if getattr(config, "_attn_implementation", None) is None:
        return []
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return [config, *(each for part in parts for each in _with_parts(part))]


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention as matrix products and a softmax, where the model goes by its configuration."""
    found = [config for module in model.modules() for config in _with_parts(getattr(module, "config", None))]
    before = [(config, config._attn_implementation) for config in {id(c): c for c in found}.values()]
    for config, kind in before:
        if kind == "sdpa":
            config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, kind in before:  # the whole before its parts, which it sets too
            if config._attn_implementation != kind:
                config._attn_implementation = kind


@contextmanager
def reversible(model: nn.Module) -> Iterator[None]:
    """While this lasts, tangents through the model can be differentiated backwards."""
    with second_order(), plain_attention(model), _Composed():
        yield


def duals(leaves: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors that carry tangents; inside a `torch.autograd.forward_ad.dual_level`."""
    made: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        made[name] = forward_ad.make_dual(leaf, tangents[name])  # type: ignore[no-untyped-call]
    return made


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two products are the same to `ALIKE` of the larger; nothing is told by two that are zero."""
    return norm(one - other) <= ALIKE * max(norm(one), norm(other)) > 0


def beyond(error: Exception, words: Sequence[str] = BEYOND) -> bool:
    """Whether an error says that a tangent cannot be had or not be differentiated, and not that memory ran out."""
    return any(word in str(error) for word in words)
