"""Give a loaded model the weights of a checkpoint, or of a point between two, tensor by tensor and in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiltmeter.errors import UnsupportedModel
from tiltmeter.lm.weights import Pair


def check_names(model: Any, pair: Pair) -> None:
    """Check that every parameter of the model is in both checkpoints under its own name.

    Raises: UnsupportedModel: names differ, as where a checkpoint is converted on loading.
    """
    missing = [name for name, _ in model.named_parameters() if name not in pair.names]
    if missing:
        raise UnsupportedModel(
            f"parameter {missing[0]} of the loaded model is not stored under this name in {pair.base.name} "
            f"({len(missing)} such parameters); save both models with save_pretrained and audit those folders"
        )


def write_weights(model: Any, pair: Pair, names: Sequence[str], alpha: float) -> None:
    """Set parameters to base + alpha (tuned - base); 0 and 1 give the stored weights themselves.

    Memory: two tensors. Cost: one read of the shards that hold them.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            if alpha == 1.0:
                value = pair.tuned.read(name)
            else:
                value = pair.base.read(name)
                if alpha != 0.0:
                    value = value + alpha * (pair.tuned.read(name) - value)
            parameters[name].copy_(value)
