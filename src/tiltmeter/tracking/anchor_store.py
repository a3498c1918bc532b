"""An anchor on disk: `anchor/record.json` and its arrays, complete or absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltmeter import store
from tiltmeter.errors import InputError
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.gathered import as_part, own_rows, own_vector, whole_vector
from tiltmeter.lm.judge import Answer
from tiltmeter.lm.processes import is_main
from tiltmeter.lm.safety import SafetySet
from tiltmeter.lm.sharding import whole
from tiltmeter.tracking.anchor import Anchor, TrackerOptions

SCHEMA = "tiltmeter/anchor/1"
FOLDER = "anchor"

_LISTS = ("responses", "refusals", "compliances")


def write_anchor(
    folder: Path,
    anchor: Anchor,
    options: TrackerOptions,
    about: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Store an anchor as `folder/anchor`, complete or absent; vectors whole, though a process has a part of them.

    Raises:
        OutputExists: there is one already.
    """
    arrays: dict[str, Tensor] = {"sketch": anchor.sketch}
    for name in _LISTS:
        arrays |= _packed(name, getattr(anchor.safety, name))
    arrays |= {f"log_probability.{i}": block for i, block in enumerate(anchor.log_probability)}
    vectors = {f"weights.{name}": partial(_whole, p, parameters[name]) for name, p in anchor.weights.items()}
    vectors |= {f"columns.{i}": partial(whole_vector, column, parameters) for i, column in enumerate(anchor.columns)}
    for name, gathered in vectors.items():
        held = gathered()
        if is_main():  # the others' folders are read by nobody
            arrays[name] = held
        del held
    if anchor.eigenvalues is not None and anchor.coefficients is not None:
        arrays |= {"eigenvalues": anchor.eigenvalues, "coefficients": anchor.coefficients}
    record = {
        "schema": SCHEMA,
        "options": options.as_dict(),
        "about": dict(about),
        "device": anchor.device,
        "no_subspace": anchor.no_subspace or "",
        "safety": {
            "answers": [answer.value for answer in anchor.safety.answers],
            "source": anchor.safety.source,
            "rows_read": anchor.safety.rows_read,
            "truncated": anchor.safety.truncated,
            "skipped": anchor.safety.skipped,
        },
    }
    with store.new_folder(folder / FOLDER) as part:
        store.write_record(part, record, arrays)


def read_anchor(
    folder: Path, options: TrackerOptions, about: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
) -> Anchor:
    """Read back the anchor that a run began with.

    Raises:
        DataError: it is damaged.
        InputError: it belongs to a run with other data, parameters or options; names the first difference.
    """
    record, arrays = store.read_record(folder / FOLDER)
    for there, now in (
        (record["about"], dict(about)),
        (record["options"], options.as_dict()),
    ):
        for key in sorted(there.keys() | now.keys()):
            if there.get(key) != now.get(key):
                raise InputError(
                    f"{folder} belongs to another run: {key} was {there.get(key)!r} and is {now.get(key)!r} now. "
                    "Resume with what the run began with, or give a new folder."
                )
    weights = {name.removeprefix("weights."): p for name, p in arrays.items() if name.startswith("weights.")}
    device = next(iter(parameters.values())).device
    held = record["safety"]
    safety = SafetySet(
        _unpacked("responses", arrays),
        _unpacked("refusals", arrays),
        _unpacked("compliances", arrays),
        tuple(Answer(value) for value in held["answers"]),
        held["source"],
        held["rows_read"],
        held["truncated"],
        held["skipped"],
    )
    return Anchor(
        safety,
        tuple(_numbered("log_probability", arrays)),
        {name: own_rows(weights[name], p).to(device) for name, p in parameters.items() if name in weights},
        arrays["sketch"],
        record["device"],
        arrays.get("eigenvalues"),
        arrays.get("coefficients"),
        tuple(own_vector(column, parameters).to(device) for column in _numbered("columns", arrays)),
        record["no_subspace"] or None,
        record["about"],
    )


def _whole(p: Tensor, like: nn.Parameter) -> Tensor:
    return whole(as_part(p, like))


def _numbered(name: str, arrays: Mapping[str, Tensor]) -> list[Tensor]:
    return [arrays[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in arrays))]


def _packed(name: str, examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        f"{name}.tokens": torch.tensor([token for example in examples for token in example.tokens]),
        f"{name}.labels": torch.tensor([label for example in examples for label in example.labels]),
        f"{name}.sizes": torch.tensor([[len(example.tokens), example.row] for example in examples]),
    }


def _unpacked(name: str, arrays: Mapping[str, Tensor]) -> tuple[Example, ...]:
    tokens, labels = arrays[f"{name}.tokens"].tolist(), arrays[f"{name}.labels"].tolist()
    out, start = [], 0
    for length, row in arrays[f"{name}.sizes"].tolist():
        out.append(Example(tuple(tokens[start : start + length]), tuple(labels[start : start + length]), row))
        start += length
    return tuple(out)
