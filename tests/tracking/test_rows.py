"""Rows that survive whatever happens to the process that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiltmeter.errors import DataError, NumericalError
from tiltmeter.tracking.rows import RowFile, read_rows


def rows_to(path: Path, steps: list[int]) -> RowFile:
    file = RowFile(path)
    for step in steps:
        file.add({"step": step, "value": step / 7})
    return file


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    rows_to(path, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = RowFile(path)
    assert [row["step"] for row in kept.rows] == [0, 1]
    kept.add({"step": 2, "value": 2 / 7})
    assert path.read_bytes() == whole


def test_resuming_drops_what_lies_ahead_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows_to(path, [0, 1, 2, 4, 8])
    again = RowFile(path)
    again.resume(3)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
    again.add({"step": 4, "value": 0.5})
    assert [row["value"] for row in read_rows(path)] == [0.0, 1 / 7, 2 / 7, 0.5]
    again.resume(100)
    assert len(read_rows(path)) == 4


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    file.add({"step": 0, "small": 1.1754943508222875e-38, "third": 1 / 3, "none": None, "reasons": {"none": "why"}})
    assert file.rows == read_rows(path) == [json.loads(path.read_text())]
    assert file.rows[0]["third"] == 1 / 3


def test_mistakes_are_refused(tmp_path: Path) -> None:
    file = rows_to(tmp_path / "rows.jsonl", [0, 4])
    for step in (4, 3):
        with pytest.raises(ValueError, match="after step 4"):
            file.add({"step": step})
    with pytest.raises(ValueError, match="does not say why"):
        file.add({"step": 5, "margin": None})
    with pytest.raises(NumericalError, match="margin"):
        file.add({"step": 5, "margin": float("nan")})
    assert len(read_rows(file.path)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step":0}\nnonsense\n{"step":2}\n', "line 2 was changed"),
        ('{"step":0}\n{"value":1}\n{"step":2}\n', "line 2 was changed"),
        ('{"step":3}\n{"step":3}\n', "step 3 follows step 3"),
    ],
)
def test_a_file_that_somebody_changed_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        RowFile(path)


def test_an_empty_line_of_the_right_length_counts_as_torn(tmp_path: Path) -> None:
    """After a power cut the last block of a file may hold zeros."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":0}\n' + bytes(9) + b"\n")
    assert [row["step"] for row in RowFile(path).rows] == [0]
    assert path.read_bytes() == b'{"step":0}\n'
