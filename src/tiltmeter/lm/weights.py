"""Weights on disk, one tensor at a time: two checkpoints are compared without loading either.

A `Checkpoint` is a folder of safetensors shards, with any number of PEFT adapters on top. Adapters are kept as their
factors; a weight is put together when it is asked for, and nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tiltmeter.errors import ModelError
from tiltmeter.geometry.spectrum import LowRank
from tiltmeter.lm.adapter import adapter_folder, base_of
from tiltmeter.lm.adapter_factors import Adapter, read_adapter
from tiltmeter.lm.checkpoint import PICKLED, cannot

INDEX = "model.safetensors.index.json"
HEADS = frozenset({"lm_head.weight", "embed_out.weight"})


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be read tensor by tensor.

    Attributes:
        name: as the user named it.
        folder: of the shards and the configuration.
        files: tensor name -> the shard it is in.
        shapes: tensor name -> shape.
        kind: model type of the configuration, such as "llama".
        adapters: added one after another.
    """

    name: str
    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    kind: str
    adapters: tuple[Adapter, ...] = ()

    def read(self, name: str) -> Tensor:
        """One tensor with its adapters, at least float32.

        Raises: ModelError: the shard is damaged, or the tensor holds values that are not finite.
        """
        tensor = wide(read_tensor(self.files[name], name))
        for adapter in self.adapters:
            if name in adapter.replaced:
                tensor = wide(read_tensor(adapter.file, adapter.replaced[name]))
            added = adapter.change(name)
            if added is not None:
                tensor = tensor + added.dense().to(tensor.dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"parameter {name} of {self.name} holds values that are not finite; it is damaged")
        return tensor

    def with_adapter(self, folder: Path, name: str) -> Checkpoint:
        """The same weights with one more adapter.

        Raises: ModelError: the adapter cannot be read or does not fit.
        """
        return replace(self, name=name, adapters=(*self.adapters, read_adapter(folder, self.shapes)))


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one architecture: before and after a fine-tune.

    Attributes:
        base: before.
        tuned: after.
        names: tensors both have.
    """

    base: Checkpoint
    tuned: Checkpoint
    names: tuple[str, ...]

    @property
    def extra(self) -> tuple[Adapter, ...] | None:
        """The adapters that make the tuned model from the base; None where the tuned one has weights of its own."""
        held = len(self.base.adapters)
        same = self.base.folder == self.tuned.folder and self.tuned.adapters[:held] == self.base.adapters
        return self.tuned.adapters[held:] if same else None

    def change(self, name: str) -> Tensor | LowRank | None:
        """tuned - base of one tensor, as factors where the change is one adapter; None where nothing changes."""
        extra = self.extra
        if extra is not None:
            touching = [adapter for adapter in extra if adapter.touches(name)]
            if not touching:
                return None
            if len(touching) == 1 and name not in touching[0].replaced:
                return touching[0].change(name)
        difference = self.tuned.read(name) - self.base.read(name)
        return difference if bool(difference.any()) else None

    def changes(self) -> Iterator[tuple[str, Tensor | LowRank]]:
        """Every tensor that changes, one at a time; nothing is held between them."""
        for name in self.names:
            change = self.change(name)
            if change is not None:
                yield name, change
                del change


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Open a folder, a hub id, or an adapter on the base that it names.

    Only the headers of the shards are read.

    Raises: ModelError: no safetensors, a shard missing or damaged, no configuration.
    """
    text = str(name)
    if text.lower().endswith(".gguf"):
        raise ModelError(
            f"{text} is a GGUF file, which cannot be compared tensor by tensor; convert it once: load it with "
            f"tiltmeter or transformers and save it with save_pretrained"
        )
    adapter = adapter_folder(text)
    if adapter is not None:
        return open_checkpoint(base_of(adapter)).with_adapter(adapter, text)
    folder = Path(text).expanduser()
    if folder.is_file():
        raise ModelError(f"{text} is a file; expected a folder or hub id with safetensors weights")
    folder = (folder if folder.is_dir() else _download(text)).resolve()
    files = _shards(text, folder)
    return Checkpoint(text, folder, files, _shapes(files), _kind(text, folder))


def pair_of(base: Checkpoint, tuned: Checkpoint) -> Pair:
    """Put two checkpoints side by side.

    Raises: ModelError: another architecture, a tensor that only one has, or another shape.
    """
    if base.kind != tuned.kind:
        raise ModelError(
            f"{base.name} is a {base.kind} model but {tuned.name} is a {tuned.kind} model; expected a fine-tune of "
            f"the first"
        )
    # a tied output layer may be written out or left out; it is the embedding either way
    single = (base.shapes.keys() ^ tuned.shapes.keys()) & HEADS
    ours, theirs = base.shapes.keys() - single, tuned.shapes.keys() - single
    if ours != theirs:
        stray = sorted(ours ^ theirs)[0]
        owner, other = (base, tuned) if stray in ours else (tuned, base)
        raise ModelError(
            f"{owner.name} has the tensor {stray} but {other.name} has not ({len(ours ^ theirs)} such tensors); "
            f"expected two checkpoints of one architecture"
        )
    for name in base.shapes:
        if name not in single and base.shapes[name] != tuned.shapes[name]:
            raise ModelError(
                f"tensor {name} is {base.shapes[name]} in {base.name} but {tuned.shapes[name]} in {tuned.name}; "
                f"expected two checkpoints of one architecture"
            )
    return Pair(base, tuned, tuple(name for name in base.shapes if name not in single))


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of one shard.

    Raises: ModelError: the shard is damaged.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor
    except Exception as error:  # safetensors' own class, or OSError
        raise cannot(f"tensor {name} of {file}", error) from error


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors", INDEX]))
    except Exception as error:  # the hub's client has many
        raise cannot(f"{name}, which is no folder here and could not be fetched from the hub", error) from error


def _shards(name: str, folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {tensor: folder / shard for tensor, shard in listed.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise cannot(str(index), error) from error
        for shard in sorted(set(files.values())):
            if not shard.is_file():
                raise ModelError(f"{name} lacks the shard {shard.name}, which its index lists; fetch it again")
        held = {shard: _keys(shard) for shard in set(files.values())}
        for tensor, shard in files.items():
            if tensor not in held[shard]:
                raise ModelError(f"the shard {shard.name} of {name} lacks the tensor {tensor}, which its index lists")
        return files
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if not shards:
        if any(folder.glob("*.bin")):
            raise ModelError(PICKLED.format(name=name))
        raise ModelError(f"{name} holds no weights; expected model.safetensors")
    return {tensor: shard for shard in shards for tensor in _keys(shard)}


def _keys(shard: Path) -> list[str]:
    try:
        with safe_open(shard, framework="pt", device="cpu") as opened:
            return list(opened.keys())
    except Exception as error:
        raise cannot(f"the weights {shard}", error) from error


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for shard in sorted(set(files.values())):
        with safe_open(shard, framework="pt", device="cpu") as opened:
            here = [tensor for tensor, file in files.items() if file == shard]
            shapes.update({tensor: tuple(opened.get_slice(tensor).get_shape()) for tensor in here})
    return {tensor: shapes[tensor] for tensor in files}


def _kind(name: str, folder: Path) -> str:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cannot(f"the configuration (config.json) of {name}", error) from error
