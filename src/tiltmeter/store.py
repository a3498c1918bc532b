"""Results on disk: a folder with `record.json` and `arrays.safetensors`, complete or absent.

A job may run for hours and be killed at any moment, so a result is written into a sibling folder and renamed
once it is whole. Inside it `record.json` comes last: where it exists, everything it speaks of exists too.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltmeter.errors import DataError, InputError, NumericalError, OutputExists

if sys.platform != "win32":
    import fcntl

RECORD, ARRAYS = "record.json", "arrays.safetensors"
SCHEMA_VERSION = 1
_SCHEMA = re.compile(r"tiltmeter/([a-z_]+)/(\d+)")


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a sibling folder to write into; it becomes `path` only if the block ends without an exception.

    Args:
        path: the result folder; must not exist, or be an empty folder. Missing parents are created.
        replace: put the new folder in the place of an old result, which stays until the new one is whole.

    Yields:
        The temporary folder `.NAME.part-XXXXXXXX` beside `path`.

    Raises:
        OutputExists: `path` is already there. If somebody else filled it meanwhile, the result is kept beside it.
        InputError: nothing can be created beside `path`.
    """
    path = Path(path).resolve()
    if not (replace and (path / RECORD).is_file()):
        _refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        folder, lock = _claim_sibling(path)
    except OSError as error:
        raise InputError(f"cannot create {path}: {error}. Give an output folder you may write to.") from error
    try:
        yield folder
        if replace and (path / RECORD).is_file():
            _set_aside(path)
        _move(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def write_record(folder: Path, record: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Write `arrays.safetensors`, then `record.json` with the digest of every array under the key `arrays`.

    Args:
        folder: an existing folder, as a rule the one `new_folder` yields.
        record: JSON values only, with a `schema` such as `tiltmeter/assessment/1`. For every null, `reasons` holds
            the reason under its dotted path (`forecast.horizon_steps`, `layers.3.sensitivity`) or that of a parent.
        arrays: name -> tensor.

    Raises:
        NumericalError: a number of the record or of an array is not finite; the message names the key path.
        ValueError: the record breaks a rule above (a mistake in tiltmeter, not in what the user gave).
    """
    if not _is_schema(record.get("schema"), SCHEMA_VERSION):
        raise ValueError(
            f"record key 'schema' must read tiltmeter/<kind>/{SCHEMA_VERSION}, got {record.get('schema')!r}"
        )
    check_values(record)
    held = {name: array.detach().to("cpu", copy=True).contiguous() for name, array in arrays.items()}
    for name, array in held.items():
        if (array.is_floating_point() or array.is_complex()) and not bool(torch.isfinite(array).all()):
            raise NumericalError(f"array {name!r} holds values that are not finite; the result was not written")
    complete = {**record, "arrays": {name: _describe(array) for name, array in held.items()}}
    part = folder / f"{ARRAYS}.part"
    save_file(held, part)
    _settle(part, folder / ARRAYS)
    write_text(folder / RECORD, json.dumps(complete, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read back what `write_record` wrote, checking every array against its digest.

    Raises:
        DataError: the folder is missing, incomplete, not a tiltmeter result, of a version this tiltmeter does
            not know, or was changed after it was written.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise DataError(f"{folder} is not a complete result: it has no {RECORD}. Run the job again.")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, OSError) as error:
        raise DataError(f"{folder / RECORD} cannot be read as JSON ({error}). Run the job again.") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if not _is_schema(schema):
        raise DataError(f"{folder / RECORD} is not a tiltmeter result: its schema is {schema!r}.")
    if not _is_schema(schema, SCHEMA_VERSION):
        raise DataError(
            f"{folder / RECORD} has schema {schema}; this tiltmeter reads version {SCHEMA_VERSION}. Upgrade."
        )
    try:
        arrays: dict[str, Tensor] = load_file(folder / ARRAYS)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / ARRAYS} is missing or damaged ({error}). Run the job again.") from error
    listed = record.get("arrays")
    for name in sorted(arrays.keys() | (listed if isinstance(listed, dict) else {}).keys()):
        if not isinstance(listed, dict) or name not in arrays or listed.get(name) != _describe(arrays[name]):
            raise DataError(f"array {name!r} in {folder / ARRAYS} is not the one {RECORD} lists. Run the job again.")
    return record, arrays


def check_values(record: Mapping[str, Any]) -> None:
    """Refuse a record with a number that is not finite, a null without a reason, or a value JSON does not have."""
    reasons = record.get("reasons", {})
    if not isinstance(reasons, Mapping) or not all(isinstance(r, str) and r.strip() for r in reasons.values()):
        raise ValueError("record key 'reasons' must map dotted paths to sentences")
    for path, value in _leaves(record, ""):
        if value is None and reason_of(record, path) is None:
            raise ValueError(f"record key {path!r} is null and reasons[{path!r}] does not say why")
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericalError(f"record key {path!r} is {value}; unknown values are null with a reason")
        if value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"record key {path!r} is a {type(value).__name__}; a record holds JSON values only")


def reason_of(record: Mapping[str, Any], path: str) -> str | None:
    """Return why the value at a dotted path is null: the reason given for it, or for the nearest parent."""
    reasons = record.get("reasons") or {}
    while path:
        if path in reasons:
            return str(reasons[path])
        path = path.rpartition(".")[0]
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is, at every moment, either the old one or the new one, complete."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        # A lone surrogate (from an undecodable file name) becomes \udcXX, which is valid inside a JSON string.
        part.write_bytes(text.encode("utf-8", errors="backslashreplace"))
        _settle(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal; the order of keys does not matter, the order of lists does."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"record key {path!r} has the key {key!r}; JSON keys are text")
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


def _is_schema(schema: object, version: int | None = None) -> bool:
    match = _SCHEMA.fullmatch(schema) if isinstance(schema, str) else None
    return match is not None and (version is None or int(match[2]) == version)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}")


def _describe(array: Tensor) -> dict[str, Any]:
    content = array.reshape(-1).contiguous().view(torch.uint8).numpy()
    digest = hashlib.sha256(content.data).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype).removeprefix("torch."), "sha256": digest}


def _settle(part: Path, path: Path) -> None:
    """Flush to the disk before the rename: a rename that outlives its content would be a half-written result."""
    with open(part, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _refuse_existing(path: Path) -> None:
    way_out = "Results are never overwritten: give another folder, or delete this one first."
    if os.path.ismount(path):
        raise OutputExists(f"{path} is a mount point and cannot be replaced as a whole; give a folder inside it.")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputExists(f"{path} already exists. {way_out}")


def _claim_sibling(path: Path) -> tuple[Path, int | None]:
    while True:
        folder = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
        folder.mkdir()
        try:
            lock = _lock(folder)
        except BlockingIOError:  # another run found it before it was locked, takes it for stale and deletes it
            continue
        if folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _remove_stale(path: Path) -> None:
    """Delete siblings whose writer died. The kernel drops a dead process's lock, so no process id can mislead."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.part-*"):
        with suppress(BlockingIOError):
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder; BlockingIOError where somebody holds it, None where there are no locks (then nothing is stale)."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _set_aside(path: Path) -> None:
    """Rename an old result away and delete it; a sibling of this name counts as stale if the process dies meanwhile."""
    aside = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _move(folder: Path, path: Path) -> None:
    target = path
    try:
        if path.is_dir():
            path.rmdir()  # an empty folder only; not every system renames onto one
        os.rename(folder, path)
    except OSError:
        if not path.exists():
            raise
        target = path.with_name(f"{path.name}-{secrets.token_hex(2)}")
        os.rename(folder, target)
    _sync(path.parent)
    if target != path:
        raise OutputExists(f"{path} was filled by another run meanwhile; this result was kept in {target}.")


def _sync(folder: Path) -> None:
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
