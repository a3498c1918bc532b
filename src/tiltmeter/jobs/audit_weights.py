"""The part of an audit that reads weights only: how long, how low in rank, how strange the change is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiltmeter.errors import InputError
from tiltmeter.geometry.spectrum import (
    Intruders,
    LowRank,
    intruders,
    projected_share,
    singular_values,
    top_share,
)
from tiltmeter.jobs.subject import Report
from tiltmeter.lm.gram import per_layer_name
from tiltmeter.lm.weights import Pair


@dataclass(frozen=True)
class TensorChange:
    """What is known of the change of one tensor.

    Attributes:
        name: of the parameter.
        layer: part of the model it is in.
        size: entries.
        length: Frobenius norm of the change.
        base_length: Frobenius norm of the base tensor.
        factored: known as a product of two factors.
        top_share: share of the change's energy in its leading singular directions; None for vectors and embeddings.
        intruders: None where not looked for (vectors, embeddings).
        lox: R_align and R_ft, where there is a checkpoint from before the alignment.
    """

    name: str
    layer: str
    size: int
    length: float
    base_length: float
    factored: bool
    top_share: float | None
    intruders: Intruders | None
    lox: tuple[float, float] | None


def measure_weights(
    pair: Pair, unaligned: Pair | None, top: int, threshold: float, report: Report
) -> tuple[TensorChange, ...]:
    """Read both checkpoints once, one tensor at a time.

    Args:
        pair: base and tuned.
        unaligned: the checkpoint from before the alignment, and the base; or None.
        top: leading singular directions.
        threshold: cosine below which a direction is an intruder.
        report: told of every layer.

    Raises: InputError: the two checkpoints hold the same weights.

    Cost: for every changed matrix [p, q] two eigenproblems of min(p, q), float64. Memory: a few copies of the largest
    tensor.
    """
    out = []
    layer = ""
    for name, change in pair.changes():
        if per_layer_name(name) != layer:
            layer = per_layer_name(name)
            report(f"weights of {layer}")
        out.append(_tensor(pair, unaligned, name, change, top, threshold))
    if not out:
        raise InputError(
            f"{pair.tuned.name} has the same weights as {pair.base.name}; expected a fine-tune of it. Check that the "
            f"adapter was trained and saved"
        )
    return tuple(out)


def _tensor(
    pair: Pair, unaligned: Pair | None, name: str, change: torch.Tensor | LowRank, top: int, threshold: float
) -> TensorChange:
    layer, factored = per_layer_name(name), isinstance(change, LowRank)
    base = pair.base.read(name)
    matrix = base.ndim == 2 and layer not in ("embed", "head")
    if isinstance(change, LowRank) or matrix:
        sigma = singular_values(change)
        length = float(sigma.square().sum().sqrt())
    else:
        length = float(change.double().norm())
    found = intruders(base, pair.tuned.read(name), top, threshold) if matrix else None
    lox = None
    if matrix and unaligned is not None:
        alignment = unaligned.change(name)
        if alignment is not None:
            dense = alignment.dense() if isinstance(alignment, LowRank) else alignment
            lox = projected_share(dense, change.dense() if isinstance(change, LowRank) else change, top)
    return TensorChange(
        name,
        layer,
        base.numel(),
        length,
        float(base.double().norm()),
        factored,
        top_share(sigma, top) if matrix else None,
        found,
        lox,
    )
