"""Checkpoints of a run: which one to go on from, and whether it fits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from tiltmeter.errors import ModelError

#: Where the trainer keeps the states of the optimiser and of the learning rate's schedule.
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"

#: Where the optimiser's state of divided weights is kept, which the trainer does not save.
DIVIDED_OPTIMIZER = "optimizer.safetensors"

#: How the names of files with weights begin, whole or in shards.
_WEIGHTS = ("model", "adapter_model")

_PICKLES = ("pytorch_model.bin", "adapter_model.bin", "pytorch_model.bin.index.json")


def last_checkpoint(folder: Path, needs: Sequence[str] = ()) -> Path | None:
    """The last whole checkpoint of a run; the trainer writes `trainer_state.json` last, so one without is torn.

    Args:
        folder: of the run.
        needs: files that callbacks put into a checkpoint after that; one without them is passed over, if there is
            one with them.

    Returns: `checkpoint-N` with the largest N, or None.
    """
    whole: list[Path] = []
    numbered = [(int(path.name[11:]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for step, path in sorted(numbered, reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and state.get("global_step") == step:
            whole.append(path)
    return next((path for path in whole if all((path / name).exists() for name in needs)), next(iter(whole), None))


def check_optimizer(folder: Path, name: str = OPTIMIZER) -> None:
    """Refuse a checkpoint of weights alone, from which the trainer would go on with a fresh optimiser, silently.

    Args:
        folder: of a checkpoint.
        name: of the file that holds the optimiser's state.

    Raises:
        ModelError: the optimiser's state is not there.
    """
    if not (folder / name).exists():
        raise ModelError(
            f"{folder} was saved without its optimiser's {name} (save_only_model, cut off, or divided among processes "
            "where it is whole now, or the other way round), so the run cannot go on as it was. If an earlier "
            "checkpoint has one, delete this; else begin anew in another folder."
        )


def check_checkpoint(folder: Path, model: Any) -> None:
    """Refuse a checkpoint that the trainer would load in part, with warnings only, or not at all.

    Args:
        folder: of a checkpoint.
        model: what it is to be loaded into, a transformers or PEFT model.

    Raises:
        ModelError: its weights are missing, pickled or damaged, or are of another model; names the first tensor.

    Cost: the headers are read, not the weights.
    """
    there = _shapes(folder)
    if isinstance(model, PeftModel):
        expected, tied = {name: tuple(p.shape) for name, p in get_peft_model_state_dict(model).items()}, set()
    else:
        state = model.state_dict()
        expected = {name: tuple(p.shape) for name, p in state.items()}
        # by identity: of divided weights a process may hold nothing, and nothing has no address
        held = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        times = Counter(held.values())
        tied = {name for name, which in held.items() if times[which] > 1}
    for name, shape in there.items():
        if name not in expected:
            raise ModelError(f"{folder} is of another model: it has {name}, which this one has no place for")
        if shape != expected[name]:
            raise ModelError(f"{folder} does not fit the model: {name} is {shape}, expected {expected[name]}")
    missing = sorted(expected.keys() - there.keys() - tied)
    if missing:
        raise ModelError(f"{folder} is incomplete: {missing[0]} is missing ({len(missing)} such tensors)")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    # guards keep their own state beside the weights
    files = sorted(path for kind in _WEIGHTS for path in folder.glob(f"{kind}*.safetensors"))
    if not files:
        pickled = any((folder / name).exists() for name in _PICKLES)
        why = "only pickle files, which run code when they are opened" if pickled else "no weights"
        raise ModelError(f"{folder} holds {why}; expected model.safetensors or adapter_model.safetensors")
    out: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    out[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or cut off ({error}); delete {folder.name} and resume") from error
    return out
