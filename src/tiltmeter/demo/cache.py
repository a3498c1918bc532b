"""The user cache: where it is, and how a folder gets into it whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from tiltmeter.errors import ModelError

CACHE_VARIABLE = "TILTMETER_CACHE"
_PARTIAL = ".partial-"
_MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """The folder that holds downloads and prepared models; it need not exist yet.

    Returns: `$TILTMETER_CACHE` if that is set and not empty, otherwise the platform's user cache folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("tiltmeter", appauthor=False)


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A private folder inside `parent` that is gone afterwards, unless it was renamed away.

    It lies beside its final place, so that the last step can be a rename on one file system. Folders left by a
    killed run are swept away a day later.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_PARTIAL}*"):
        try:
            stale = time.time() - left.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # another process has just finished with it
            continue
        if stale:
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def built_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, building it first if it is absent or incomplete.

    Two processes may build at once: each works in a folder of its own, the first to finish is kept.

    Args:
        target: the final folder, in the cache.
        build: fills the (empty) folder it is given.
    Returns: `target`, with all files it was built with at their full length.
    Raises: ModelError: the disk is full, or the cache cannot be written.
    Cost: one `stat` per file when the folder is there; `build` otherwise.
    """
    if _is_complete(target):
        return target
    try:
        _build_and_place(target, build)
    except OSError as error:
        raise ModelError(
            f"{target.name} could not be prepared in {target.parent} ({error}). "
            f"{CACHE_VARIABLE} names another folder for the cache."
        ) from error
    return target


def _build_and_place(target: Path, build: Callable[[Path], None]) -> None:
    """Build in a folder of our own, then rename; leave the other's if another process was faster."""
    with partial_folder(target.parent) as partial:
        fresh = partial / target.name
        fresh.mkdir()
        build(fresh)
        files = [path for path in sorted(fresh.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(fresh).as_posix(): path.stat().st_size for path in files}
        (fresh / _MANIFEST).write_text(json.dumps({"bytes": sizes}, indent=1), encoding="utf-8")
        if not _is_complete(target):
            with suppress(FileNotFoundError):
                os.replace(target, partial / "broken")
        try:
            os.replace(fresh, target)
        except OSError:
            if not _is_complete(target):
                raise


def _is_complete(folder: Path) -> bool:
    """Whether every file in the folder's manifest is there with its length."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
