"""Models whose weights are divided among processes (FSDP2), as transformers loads them.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it through the environment. Every process then reads and keeps
only its part of the weights. LoRA's factors are added afterwards and are whole everywhere; where the divided weights
themselves are trained, each process has its part of every vector. `gathered` forms products of such a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tiltmeter.errors import UnsupportedModel
from tiltmeter.lm.processes import launched

#: What `accelerate launch --use_fsdp` sets.
FSDP = "ACCELERATE_USE_FSDP"


def divided(what: str) -> Any | None:
    """The configuration to load a model with, or None where each process should hold it whole.

    Args:
        what: what is to be loaded, for messages.

    Raises:
        UnsupportedModel: the launcher asks for DeepSpeed or FSDP1, or transformers is too old.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UnsupportedModel(
            f"cannot load {what} under DeepSpeed: its engine owns parameters and gradients, and products of them are "
            "what tiltmeter is made of. Launch without it, or with --use_fsdp --fsdp_version 2."
        )
    if not _asked(FSDP):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UnsupportedModel(
            f"cannot load {what} under FSDP1, which flattens parameters; give accelerate launch --fsdp_version 2"
        )
    if launched() == 1:
        return None
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(fsdp_size=launched(), fsdp_cpu_offload=_asked("FSDP_OFFLOAD_PARAMS"))
    except (ImportError, TypeError) as error:
        raise UnsupportedModel(
            "this version of transformers cannot load a model divided among processes; 5.23 can"
        ) from error


def is_divided(model: nn.Module) -> bool:
    """Whether a process holds only a part of some parameter (a DTensor)."""
    return any(is_part(p) for p in model.parameters())


@contextmanager
def fulfilled(model: nn.Module) -> Iterator[None]:
    """While this lasts the launcher's wish for FSDP is not heard, if the model is divided already.

    Trainers are made in here: accelerate would have them divide the model a second time.
    """
    before = os.environ.get(FSDP)
    if before is None or not is_divided(model):
        yield
        return
    os.environ[FSDP] = "false"
    try:
        yield
    finally:
        os.environ[FSDP] = before


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor: a DTensor, whose type some builds of PyTorch lack."""
    return hasattr(tensor, "placements")


def let_go(model: nn.Module) -> None:
    """Drop what layers still hold of the others' parts, so that the model's parameters are its own parts again.

    FSDP2 keeps the outermost layer's weights gathered between passes; by their names one would then find the gathered
    copies, which nobody trains.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)  # of an FSDPModule, which some builds of PyTorch lack
        if callable(reshard):
            reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Cost: a gathering by all processes, if it is divided."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def split_like(tensor: Tensor, part: Tensor) -> Tensor:
    """This process's part of a tensor that all of them have whole, divided as another is; whole if that is.

    Cost: no word between processes.
    """
    if not is_part(part):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    where: Any = part
    return distribute_tensor(tensor, where.device_mesh, where.placements, src_data_rank=None)


def read_whole_states(model: nn.Module) -> None:
    """Make `load_state_dict` of a divided model take whole tensors, of which each process keeps its part."""

    def divide(module: nn.Module, state: dict[str, Tensor], *args: Any) -> None:
        for name, p in module.named_parameters(remove_duplicate=False):
            if name in state and not is_part(state[name]):
                state[name] = split_like(state[name].to(p.device), p)

    model.register_load_state_dict_pre_hook(divide)  # type: ignore[no-untyped-call]


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
