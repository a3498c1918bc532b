"""Safe LoRA and LoX on files: a finished adapter or a checkpoint, one matrix in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiltmeter.errors import InputError, ModelError, OutputExists
from tiltmeter.guards.alignment import plain_name
from tiltmeter.guards.lox import top_part
from tiltmeter.guards.safe_lora import onto_alignment, similarity

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Projected:
    """What Safe LoRA did to an adapter.

    Attributes:
        cosines: of every update with its projection, by weight name.
        replaced: those at or below the threshold.
        left: matrices that the adapter holds whole (`modules_to_save`) and the models do not both have, such as an
            output layer that was tied to the embeddings; they are copied as they are.
    """

    cosines: dict[str, float]
    replaced: tuple[str, ...]
    left: tuple[str, ...] = ()


class Weights:
    """Tensors of a folder of safetensors files, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Open the files; `stack` closes them."""
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no safetensors files; expected a model or adapter folder")
        self.files = files
        self._of: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
            except Exception as error:  # safetensors has its own class for damaged files
                raise ModelError(f"{file} cannot be read: {error}") from error
            self._of |= dict.fromkeys(opened.keys(), opened)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)
        return tensor

    def of_file(self, file: Path) -> dict[str, Tensor]:
        """All tensors of one file."""
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def safe_lora_adapter(
    adapter: Path, aligned: Path, base: Path, out: Path, *, threshold: float = 0.35, strength: float = 1.0
) -> Projected:
    """Project a finished LoRA adapter onto what alignment changed; also the matrices in it that were trained whole.

    Args:
        adapter: folder of a PEFT LoRA adapter that was trained on `aligned`.
        aligned: folder of the aligned model (safetensors).
        base: folder of the model it was made from.
        out: folder for the new adapter; must not exist.
        threshold: cosine at or below which an update is replaced; see `safe_lora`.
        strength: share of the difference that is applied.

    Raises:
        ModelError: files are missing, or weights of the two models do not fit.
        OutputExists: `out` is there already.

    Cost: reads every adapted matrix twice; memory of two of them.
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists():
        raise OutputExists(f"{out} exists; adapters are never overwritten. Give another folder.")
    with ExitStack() as stack:
        own, here, there = (Weights(Path(folder), stack) for folder in (adapter, aligned, base))
        pairs = [name for name in own if ".lora_B." in name]
        if not pairs:
            raise ModelError(f"{adapter} holds no LoRA matrices; expected {ADAPTER} of a LoRA adapter")
        new = {name: own[name] for name in own}
        cosines, replaced = {}, []
        for name in pairs:
            weight = plain_name(name)
            v = _delta(weight, here, there)
            b, a = new[name].float(), new[name.replace(".lora_B.", ".lora_A.")].float()
            cosines[weight] = similarity(v, b, a)
            if cosines[weight] <= threshold:
                new[name] = b.add(onto_alignment(v, b) - b, alpha=strength).to(new[name].dtype)
                replaced.append(weight)
        kept = {plain_name(name): name for name in own if ".lora_" not in name and own[name].ndim == 2}
        left = tuple(weight for weight in kept if weight not in here or weight not in there)
        for weight, name in kept.items():
            if weight in left:
                continue
            v, update = _delta(weight, here, there), own[name].float() - here[weight].float()
            cosines[weight] = similarity(v, update)
            if cosines[weight] <= threshold:
                moved = update.add(onto_alignment(v, update) - update, alpha=strength)
                new[name] = (here[weight].float() + moved).to(own[name].dtype)
                replaced.append(weight)
        shutil.copytree(adapter, out, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "checkpoint-*"))
        save_file({name: tensor.contiguous() for name, tensor in new.items()}, out / ADAPTER, {"format": "pt"})
    return Projected(cosines, tuple(replaced), left)


def lox_checkpoint(aligned: Path, base: Path, out: Path, *, strength: float = 1.0, rank: int = 6) -> tuple[str, ...]:
    """Extrapolate a checkpoint along its alignment, file by file.

    Args:
        aligned: folder of the aligned model (safetensors).
        base: folder of the model it was made from.
        out: folder for the new model; must not exist.
        strength: alpha; see `lox`.
        rank: singular directions.

    Returns: names of the matrices that were extrapolated; embeddings and output layer stay as they are.

    Raises:
        InputError: strength or rank out of range, or alignment changed no matrix.
        ModelError: files are missing, or weights do not fit.
        OutputExists: `out` is there already.

    Cost: memory of one file and two matrices; a singular value decomposition a matrix.
    """
    aligned, out = Path(aligned), Path(out)
    if out.exists():
        raise OutputExists(f"{out} exists; models are never overwritten. Give another folder.")
    if not strength >= 0 or rank < 1:
        raise InputError(f"strength must be at least 0 and rank at least 1, got {strength} and {rank}")
    moved = []
    with ExitStack() as stack:
        here, there = Weights(aligned, stack), Weights(Path(base), stack)
        shutil.copytree(aligned, out, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "checkpoint-*"))
        for file in here.files:
            tensors = here.of_file(file)
            for name, tensor in tensors.items():
                if tensor.ndim != 2 or "embed" in name or "lm_head" in name:
                    continue
                v = _delta(name, here, there)
                if bool(v.any()):
                    tensors[name] = (tensor.float() + strength * top_part(v, rank)).to(tensor.dtype)
                    moved.append(name)
            save_file({name: t.contiguous() for name, t in tensors.items()}, out / file.name, {"format": "pt"})
    if not moved:
        shutil.rmtree(out)
        raise InputError("alignment changed no matrix: aligned and base are the same model")
    return tuple(moved)


def _delta(weight: str, here: Weights, there: Weights) -> Tensor:
    """W_aligned - W_base, float32."""
    for weights, what in ((here, "aligned model"), (there, "base")):
        if weight not in weights:
            raise ModelError(
                f"the {what} has no weight {weight}; give the folders that belong to this adapter or model"
            )
    a, b = here[weight].float(), there[weight].float()
    if a.shape != b.shape:
        raise ModelError(f"{weight} has shape {tuple(a.shape)} in the aligned model and {tuple(b.shape)} in the base")
    return a - b
