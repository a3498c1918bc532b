"""What alignment changed in the weights, V = W_aligned - W_base, by the names of the trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tiltmeter.errors import UnsupportedModel
from tiltmeter.geometry.space import ParameterSpace


@dataclass(frozen=True)
class Target:
    """A weight matrix and the trained parameters that change it.

    Attributes:
        weight: its name in the model without adapters.
        names: (name of B, name of A) of a LoRA pair, or (name,) of the weight itself.
    """

    weight: str
    names: tuple[str, ...]


def targets_of(space: ParameterSpace, alignment: Mapping[str, Tensor], what: str) -> list[Target]:
    """The matrices of a space that alignment changed.

    Raises:
        UnsupportedModel: there are none.
    """
    found = [target for target in matrices_of(space) if target.weight in alignment]
    if not found:
        raise UnsupportedModel(
            f"{what} needs what alignment changed in the trained matrices (aligned minus base weights), which is "
            f"known for none of them ({space.names[0]}, ...): give the base model that the aligned one was made from"
        )
    return found


def matrices_of(space: ParameterSpace) -> list[Target]:
    """The matrices that the parameters of a space change, a LoRA pair or the weight itself."""
    found = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        if len(shape) != 2 or ".lora_A." in name:
            continue
        pair = (name, name.replace(".lora_B.", ".lora_A.")) if ".lora_B." in name else (name,)
        found.append(Target(plain_name(name), pair))
    return found


def plain_name(name: str) -> str:
    """Name of a parameter in the model without PEFT: `base_model.model.X.lora_A.default.weight` -> `X.weight`.

    So are the copies that PEFT trains whole: `X.modules_to_save.default.weight`.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    if ".modules_to_save." in name:
        module, _, rest = name.partition(".modules_to_save.")
        name = f"{module}.{rest.partition('.')[2]}"
    for part in (".lora_A.", ".lora_B."):
        if part in name:
            return name.partition(part)[0] + ".weight"
    return name
