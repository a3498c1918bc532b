"""Frozen weights in four bits (bitsandbytes), under layers that can be differentiated as often as it takes.

The product of bitsandbytes has a first derivative backwards and none forwards, and on a CPU repacks its weights for
good when it is first used for inference. `differentiable` puts another product in its place: the weights are unpacked
when they are needed, in the type the layer calculates in, forwards as backwards. Since the weights stand still, the
product is linear in what goes in, and every derivative of it is the same product again, or its transpose; nothing
unpacked is kept. What is trained lies beside it, in LoRA's factors.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tiltmeter.errors import ModelError, UnsupportedModel

#: What `--dtype` calls four-bit normal floats with float32 around them.
NF4 = "nf4"


def four_bit_config() -> Any:
    """How transformers should quantise a model as it reads it: normal floats of four bits, float32 arithmetic.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    _require()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def asks_for_four_bits(config: Any) -> bool:
    """Whether a checkpoint's configuration says that its weights are kept in four bits.

    Raises:
        UnsupportedModel: they are quantised in another way.
        ModelError: bitsandbytes is not installed.
    """
    held = getattr(config, "quantization_config", None)
    if held is None:
        return False
    said = held if isinstance(held, dict) else held.to_dict()
    if not said.get("load_in_4bit"):
        raise UnsupportedModel(
            f"the checkpoint is quantised by {said.get('quant_method', 'a method that it does not name')}; understood "
            "are four bits by bitsandbytes, and weights that are not quantised. Give the model as it was before."
        )
    _require()
    return True


def is_four_bit(tensor: Tensor) -> bool:
    """Whether a parameter holds packed four-bit numbers."""
    return type(tensor).__name__ == "Params4bit"


def holds_four_bits(model: nn.Module) -> bool:
    """Whether any parameter of a model does."""
    return any(is_four_bit(p) for p in model.parameters())


def dtype_name(model: Any) -> str:
    """The type of a model's weights in words: torch's name, or how the packed ones are packed."""
    packed = [p for p in model.parameters() if is_four_bit(p)]
    return str(packed[0].quant_type if packed else model.dtype).removeprefix("torch.")


def count(parameter: Tensor) -> int:
    """How many numbers a parameter stands for, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def scales(parameter: Tensor) -> list[Tensor]:
    """What a packed parameter's numbers are multiplied by, in a fixed order; nothing for others."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    held = state.as_dict(packed=True)
    return [held[name] for name in sorted(held)]


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] of a four-bit parameter, unpacked."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return found.to(dtype)


def differentiable(model: nn.Module) -> None:
    """Give every four-bit layer of a model a product that can be differentiated twice, backwards and forwards.

    Raises:
        UnsupportedModel: a weight was repacked for inference on a CPU, or is not of a linear layer.
    """
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")  # its own: an adapter passes off the weight inside as one of its own
        if weight is None or not is_four_bit(weight):
            continue
        if not hasattr(module, "compute_dtype"):
            raise UnsupportedModel(
                f"{name} ({type(module).__name__}) holds its weight in four bits; understood are linear layers"
            )
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise UnsupportedModel(
                f"{name} has been used for inference on a CPU already, for which bitsandbytes repacks its weights: "
                "load the model anew, and measure it before it answers anything"
            )
        found.append(module)
    for module in found:
        module.forward = MethodType(forward, module)


def forward(layer: Any, x: Tensor) -> Tensor:
    """x W' + b, calculated in the type that bitsandbytes would: the layer's own if it has one, else that of x."""
    inner = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
    out: Tensor = _Product.apply(inner, layer.weight, False)  # type: ignore[no-untyped-call]
    return (out if layer.bias is None else out + layer.bias.to(out.dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W', or x W, for a W that stands still."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """The product over the last dimension of x."""
        whole = dense(weight, x.dtype)
        return x @ (whole if transposed else whole.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        """Keep the packed weights only."""
        _, ctx.weight, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The other product."""
        return _Product.apply(gradient, ctx.weight, not ctx.transposed), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        """The same product."""
        out: Tensor = _Product.apply(tangent, ctx.weight, ctx.transposed)  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, transposed: bool
    ) -> tuple[Tensor, int | None]:
        """All of a batch at once."""
        place = in_dims[0]
        moved = x if place is None else x.movedim(place, 0)
        out: Tensor = _Product.apply(moved, weight, transposed)  # type: ignore[no-untyped-call]
        return out, None if place is None else 0


def _require() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError("weights in four bits need bitsandbytes: pip install 'tiltmeter[four-bit]'") from error
