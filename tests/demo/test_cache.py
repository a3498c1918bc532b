"""Folders in the cache appear whole or not at all, also when two processes build at once."""

import os
import time
from pathlib import Path

import pytest

from tiltmeter.demo.cache import built_folder, cache_folder, partial_folder
from tiltmeter.errors import ModelError


def writes(content: str, calls: list[str]):
    def build(folder: Path) -> None:
        calls.append(content)
        (folder / "weights").write_text(content)

    return build


def test_the_variable_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILTMETER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("TILTMETER_CACHE", "")
    assert cache_folder().name == "tiltmeter"
    assert cache_folder().is_absolute()


def test_built_once_and_rebuilt_when_a_file_is_cut_short(tmp_path: Path) -> None:
    calls: list[str] = []
    folder = built_folder(tmp_path / "model", writes("long", calls))
    built_folder(tmp_path / "model", writes("other", calls))
    assert calls == ["long"]
    (folder / "weights").write_text("lo")
    built_folder(tmp_path / "model", writes("again", calls))
    assert (folder / "weights").read_text() == "again"
    (folder / "weights").unlink()
    built_folder(tmp_path / "model", writes("third", calls))
    assert calls == ["long", "again", "third"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    calls: list[str] = []

    def slow(folder: Path) -> None:
        built_folder(tmp_path / "model", writes("fast", calls))
        writes("slow", calls)(folder)

    assert (built_folder(tmp_path / "model", slow) / "weights").read_text() == "fast"
    assert calls == ["fast", "slow"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left"):
        built_folder(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_runs_are_swept_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / ".partial-old", tmp_path / ".partial-young"
    for folder, age_hours in ((old, 25), (young, 1)):
        folder.mkdir()
        os.utime(folder, (time.time() - age_hours * 3600,) * 2)
    with partial_folder(tmp_path) as partial:
        assert sorted(tmp_path.iterdir()) == sorted([young, partial])
