"""Data as people keep it: files and hub sets, read into rows."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tiltmeter.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSet:
    """Rows of one data set.

    Attributes:
        name: as the user named it.
        rows: one dictionary per row.
        digest: sixteen hex digits of the rows' contents.
    """

    name: str
    rows: tuple[Row, ...]
    digest: str


def read_rows(name: str | Path, split: str = "train", limit: int | None = None) -> RowSet:
    """Read a data set from a file or from the hub.

    Args:
        name: a .jsonl, .json, .parquet or .csv file, or a hub id, which may carry a configuration: `openai/gsm8k:main`.
        split: split of a hub set; a file has only one.
        limit: read only so many rows from the start.

    Returns: the rows, in order.

    Raises:
        DataError: the file is missing, empty, malformed (named with its line) or of an unknown kind; the hub cannot
            be reached or does not have the set, the configuration or the split.
    """
    if limit is not None and limit < 1:
        raise DataError(f"asked for {limit} rows of {name}; ask for at least one")
    path = Path(name).expanduser()
    read = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{name} is a directory; expected a {_KINDS} file or the id of a set on the hub")
    if path.is_file():
        if read is None:
            raise DataError(f"{name} has the ending {path.suffix!r}; expected {_KINDS}")
        rows = read(path, limit)
    elif read is not None or isinstance(name, Path) or path.is_absolute() or str(name).startswith((".", "~")):
        raise DataError(f"{name} does not exist; expected a {_KINDS} file or the id of a set on the hub")
    else:
        rows = _read_hub(name, split, limit)
    if not rows:
        raise DataError(f"{name} holds no rows")
    return RowSet(str(name), tuple(rows), digest_of(rows))


def digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Sixteen hex digits that depend on the rows' contents and order, but not on the order of their columns."""
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_lines(path: Path, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with columns, got {type(row).__name__}")
        rows.append(row)
    return rows


def _read_json(path: Path, limit: int | None) -> list[Row]:
    text = _text_of(path)
    try:
        whole = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if "Extra data" in error.msg:  # one object after another: JSON lines under another name
            return _read_lines(path, limit)
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(whole, list):
        raise DataError(f"{path}: expected a list of objects, got {type(whole).__name__}")
    for index, row in enumerate(whole):
        if not isinstance(row, dict):
            raise DataError(f"{path}, entry {index}: expected an object with columns, got {type(row).__name__}")
    return whole[:limit]


def _read_csv(path: Path, limit: int | None) -> list[Row]:
    # Not through pandas: its type inference turns "007" into 7 and "NA" into a missing value.
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[Row] = []
            for row in islice(reader, limit):
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(f"{path}, line {reader.line_num}: expected {wanted} columns as in the header")
                rows.append(dict(row))
            return rows
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not a readable CSV file: {error}") from error


def _read_parquet(path: Path, limit: int | None) -> list[Row]:
    import pyarrow as arrow  # type: ignore[import-untyped]  # comes with datasets
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    rows: list[Row] = table.slice(0, limit).to_pylist()
    return rows


def _read_hub(name: str, split: str, limit: int | None) -> list[Row]:
    import datasets

    set_id, _, configuration = name.partition(":")
    wanted = split if limit is None else f"{split}[:{limit}]"
    try:
        return list(datasets.load_dataset(set_id, configuration or None, split=wanted))
    except Exception as error:  # the hub, its client and the builders share no base class
        raise DataError(
            f"cannot load {name!r} (split {split!r}) from the hub: {type(error).__name__}: {error}. "
            f"A file is named by its path; offline, only sets already in the cache can be loaded."
        ) from error


_READERS: dict[str, Callable[[Path, int | None], list[Row]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
_KINDS = ", ".join(_READERS)
