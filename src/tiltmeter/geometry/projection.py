"""Removing sensitive directions from an update, in the metric in which the optimiser moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltmeter.errors import SpaceMismatch
from tiltmeter.geometry.space import dot

#: Directions that depend on the others up to this share (of squared length, in the metric) count once.
DEPENDENT = 1e-12


def project_update(update: Tensor, basis_columns: Sequence[Tensor], preconditioner: Tensor | None = None) -> Tensor:
    """Smallest change of an update, in the optimiser's metric, after which it is orthogonal to every basis column.

    Delta - D R (R' D R)^-1 R' Delta: the closest vector to Delta in the norm x' D^-1 x with R' x = 0. Projecting the
    gradient instead and preconditioning afterwards leaves R' D (g - R R' g), which is not zero.

    Args:
        update: Delta [n], what the optimiser is about to add to the parameters.
        basis_columns: columns of R, each [n]; they need not be orthonormal, and may depend on one another.
        preconditioner: diagonal D [n] of the optimiser's metric, positive; None for plain descent (D = 1).

    Returns:
        The projected update [n]; `update` itself is left alone.

    Raises:
        SpaceMismatch: a column or the preconditioner has another length.

    Cost: d^2 / 2 inner products of length n for d columns, no copy of R but for D R one column at a time.
    Error: relative 1e-12 in float64, 1e-6 in float32.
    """
    for vector in [*basis_columns, *([] if preconditioner is None else [preconditioner])]:
        if vector.shape != update.shape:
            raise SpaceMismatch(f"expected vectors of {update.numel()} parameters, got shape {tuple(vector.shape)}")
    d = len(basis_columns)
    gram, felt = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    for i, column in enumerate(basis_columns):
        moved = column if preconditioner is None else column * preconditioner
        felt[i] = dot(column, update)
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = dot(moved, basis_columns[j])
    scale = torch.diagonal(gram).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    inverse = torch.linalg.pinv(gram * scale[:, None] * scale, rtol=DEPENDENT, hermitian=True)
    weights = scale * (inverse @ (scale * felt))
    out = update.clone()
    for weight, column in zip(weights.tolist(), basis_columns, strict=True):
        out.add_(column if preconditioner is None else column * preconditioner, alpha=-weight)
    return out
