"""A PEFT adapter as what it adds to each weight, read without loading the model it belongs to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tiltmeter.errors import ModelError
from tiltmeter.geometry.spectrum import LowRank
from tiltmeter.lm.adapter import CONFIG, WEIGHTS
from tiltmeter.lm.checkpoint import cannot

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")


@dataclass(frozen=True)
class Adapter:
    """LoRA factors and replaced tensors.

    Attributes:
        folder: of the adapter.
        file: its weights.
        factors: parameter -> keys of its A and B in the file.
        scales: parameter -> what B A is multiplied by.
        transposed: parameters kept as [in, out] (GPT-2's Conv1D, and embeddings), to which (B A)' is added.
        replaced: parameter -> key of the tensor that stands in its place (PEFT's `modules_to_save`).
    """

    folder: Path
    file: Path
    factors: Mapping[str, tuple[str, str]]
    scales: Mapping[str, float]
    transposed: frozenset[str]
    replaced: Mapping[str, str]

    def touches(self, name: str) -> bool:
        """Whether this adapter changes a parameter."""
        return name in self.factors or name in self.replaced

    def change(self, name: str) -> LowRank | None:
        """What is added to a parameter, in the orientation of the parameter; None if nothing is."""
        if name not in self.factors:
            return None
        try:
            with safe_open(self.file, framework="pt", device="cpu") as opened:
                a, b = (opened.get_tensor(key).float() for key in self.factors[name])
        except Exception as error:  # safetensors' own class, or OSError
            raise cannot(f"the adapter weights {self.file}", error) from error
        scale = self.scales[name]
        return LowRank(a.T * scale, b.T) if name in self.transposed else LowRank(b * scale, a)


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter's configuration and the names and shapes of its tensors.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        shapes: of the base's parameters.

    Raises: ModelError: not LoRA, pickled, damaged, of a kind that adds no product of two factors (DoRA), or a factor
        that fits no parameter of the base.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, rank = str(config.get("peft_type")), int(config.get("r") or 0)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise cannot(str(folder / CONFIG), error) from error
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(
            f"the adapter {folder} has no {WEIGHTS}; pickled weights (adapter_model.bin) are not read: load it with "
            f"PEFT, if you trust its source, and save it again"
        )
    if kind != "LORA" or config.get("use_dora"):
        what = "DoRA" if config.get("use_dora") else kind
        raise ModelError(f"the adapter {folder} is {what}; only LoRA adds a product of factors. Merge it and give both")
    factors, replaced, embeddings = _names(folder, file, shapes)
    transposed = embeddings | (frozenset(factors) if config.get("fan_in_fan_out") else frozenset())
    scales = {name: _scale(config, name.removesuffix(".weight"), rank) for name in factors}
    adapter = Adapter(folder, file, factors, scales, frozenset(transposed), replaced)
    _check_fit(adapter, shapes)
    return adapter


def _names(
    folder: Path, file: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, str]], dict[str, str], frozenset[str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            keys = list(opened.keys())
    except Exception as error:
        raise cannot(f"the adapter weights {file}", error) from error
    halves: dict[str, dict[str, str]] = {}
    replaced, embeddings = {}, set()
    for key in keys:
        match = _FACTOR.match(key)
        target = (match[1] + ".weight" if match else key).removeprefix(_PREFIX)
        if target not in shapes:
            raise ModelError(
                f"the adapter {folder} does not fit its base: it has {key}, but its base has no parameter {target}"
            )
        if match:
            halves.setdefault(target, {})[match[3]] = key
            embeddings |= {target} if match[2] else set()
        else:
            replaced[target] = key
    for target, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ModelError(f"the adapter {folder} is incomplete: {target} has only its factor {next(iter(pair))}")
    return {target: (pair["A"], pair["B"]) for target, pair in halves.items()}, replaced, frozenset(embeddings)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    r = int(_pattern(config.get("rank_pattern"), module, rank))
    alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha") or r))
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry whose key, a regular expression, matches the end of the module's name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_fit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    with safe_open(adapter.file, framework="pt", device="cpu") as opened:
        sizes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    for name, (a, b) in adapter.factors.items():
        product = (sizes[b][0], sizes[a][1])
        expected = shapes[name][::-1] if name in adapter.transposed else shapes[name]
        if sizes[a][0] != sizes[b][1] or product != tuple(expected):
            raise ModelError(
                f"the adapter {adapter.folder} does not fit its base: its factors for {name} are {sizes[b]} and "
                f"{sizes[a]}, expected a product of shape {tuple(expected)}"
            )
    for name, key in adapter.replaced.items():
        if sizes[key] != shapes[name]:
            raise ModelError(
                f"the adapter {adapter.folder} does not fit its base: {key} is {sizes[key]}, expected {shapes[name]}"
            )
