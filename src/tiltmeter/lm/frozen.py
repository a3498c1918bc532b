"""Forward mode through frozen weights, without calculating with their zero tangents.

The tangent of x W' is x_t W' + x W_t'. Where W is not differentiated, as the base model under LoRA, torch stands a zero
tensor in for W_t that knows it is zero. Matrix products have no kernel for such tensors: it is filled with zeros and
multiplied like any other, a third of a JVP's work and more of a JVP's of a JVP. Sums and products have one, but it asks
Python for the shape of the result, which for the small tensors of a norm takes longer than to calculate it.
Inside `frozen_weights` all three are answered at once. No value changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _zeros(shape: tuple[int, ...] | torch.Size, like: Tensor, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch._efficientzerotensor(shape, dtype=dtype, device=like.device)
    return out


def _known(tensor: Tensor) -> bool:
    return bool(tensor._is_zerotensor())


def _tensors(one: Tensor | float, other: Tensor | float) -> tuple[Tensor, Tensor]:
    """Numbers, which outside of `torch.func` come as they are, as tensors that change no type.

    One of the two is known to be zero. If that is not the tensor it is the number: the tangent of a constant.
    """
    if not isinstance(one, Tensor):
        return _tensors(other, one)[::-1]
    if not isinstance(other, Tensor):
        dtype = torch.result_type(one, other)
        other = torch.tensor(other, dtype=dtype, device=one.device) if _known(one) else _zeros((), one, dtype)
    return one, other


def _matrix_product(one: Tensor, other: Tensor) -> Tensor:
    return _zeros((one.shape[0], other.shape[1]), one, one.dtype)


def _product(one: Tensor | float, other: Tensor | float) -> Tensor:
    one, other = _tensors(one, other)
    shape = torch.broadcast_shapes(one.shape, other.shape)  # type: ignore[no-untyped-call]
    return _zeros(shape, one if one.ndim else other, torch.result_type(one, other))


def _sum(one: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    one, other = _tensors(one, other)
    shape = torch.broadcast_shapes(one.shape, other.shape)  # type: ignore[no-untyped-call]
    dtype = torch.result_type(one, other)
    if _known(one) and _known(other):
        return _zeros(shape, one if one.ndim else other, dtype)
    rest = one if _known(other) else other if alpha == 1 else other * alpha
    return rest.expand(shape).to(dtype, copy=True)


#: What to do where an argument is known to be zero.
KERNELS: dict[str, Callable[..., Tensor]] = {"mm": _matrix_product, "mul.Tensor": _product, "add.Tensor": _sum}


@contextmanager
def frozen_weights() -> Iterator[None]:
    """Skip calculations with tangents that are known to be zero, as long as this lasts."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():  # torch says that kernels are replaced; they come back below
        warnings.simplefilter("ignore", UserWarning)
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, "ZeroTensor")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]
