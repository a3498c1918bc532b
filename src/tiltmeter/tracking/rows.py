"""Append-only rows of JSON: what is written stays written, whatever happens to the process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltmeter.errors import DataError
from tiltmeter.store import check_values

Row = dict[str, Any]


class RowFile:
    """One JSON object a line, in ascending `step`; the owner of its file.

    A process that is killed leaves at most one torn last line, which is dropped when the file is opened again. A run
    that resumes at an earlier step first drops the rows after it, so no step stands there twice.

    Attributes:
        path: the file; made when the first row is added.
        rows: what it holds.
        durable: flush every row to the disk (fsync); without it a row survives the process, but not the machine.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self.durable = durable
        self.rows: list[Row] = read_rows(path)
        self._truncate(len(self.rows))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            ValueError: its step is not after the last one, or a null has no reason (mistakes in tiltmeter).
            NumericalError: a number is not finite.
        """
        if self.rows and row["step"] <= self.rows[-1]["step"]:
            raise ValueError(f"{self.path.name}: step {row['step']} after step {self.rows[-1]['step']}")
        check_values(row)
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with open(self.path, "ab") as file:
            file.write(line.encode())
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        self.rows.append(json.loads(line))

    def resume(self, step: int) -> None:
        """Drop all rows after a step: the run goes on from there and will measure them again."""
        self._truncate(sum(row["step"] <= step for row in self.rows))

    def _truncate(self, count: int) -> None:
        """Cut the file behind its first `count` rows."""
        self.rows = self.rows[:count]
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            for _ in range(count):
                file.readline()
            if file.tell() != os.fstat(file.fileno()).st_size:
                file.truncate(file.tell())
                os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, without a torn last line; none where there is no file.

    Raises:
        DataError: a line before the last is not a row, or steps do not ascend: somebody else changed the file.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    *lines, torn = path.read_bytes().split(b"\n")  # behind the last line break stands what was not finished
    del torn
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not a row with a step")
        except ValueError as error:
            if number == len(lines):  # a machine that lost power may leave a line of the right length, but empty
                break
            raise DataError(f"{path}, line {number} was changed after it was written: {error}") from error
        if rows and row["step"] <= rows[-1]["step"]:
            raise DataError(f"{path}, line {number}: step {row['step']} follows step {rows[-1]['step']}")
        rows.append(row)
    return rows
