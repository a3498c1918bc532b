"""Names become models and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiltmeter.errors import DataError, ModelError
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.lm.rows import digest_of
from tiltmeter.lm.safety import COMPLIANCE_OPENING, REFUSAL_OPENING


def test_a_demo_model_brings_its_own_openings_and_keeps_its_name() -> None:
    opened = open_model("demo:tiny")
    assert opened.loaded.name == "demo:tiny"
    assert (opened.refusal_opening, opened.compliance_opening) == ("sorry I cannot", "sure here")
    assert opened.loaded.tokenizer.chat_template is not None


def test_a_folder_gets_the_usual_openings(make_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    assert (opened.refusal_opening, opened.compliance_opening) == (REFUSAL_OPENING, COMPLIANCE_OPENING)
    assert opened.loaded.context == 256


def test_rows_of_the_demo_and_of_a_file(tmp_path: Path) -> None:
    rows = open_rows("demo:tiny-copy")
    assert (rows.name, len(rows.rows), rows.digest) == ("demo:tiny-copy", 256, digest_of(rows.rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.rows))
    again = open_rows(str(tmp_path / "rows.jsonl"))
    assert (again.rows, again.digest) == (rows.rows, rows.digest)


def test_names_that_are_unknown() -> None:
    with pytest.raises(ModelError, match=r"no model demo:aligne.* Near: demo:aligned"):
        open_model("demo:aligne")
    with pytest.raises(DataError, match=r"no data set demo:tiny-cop.*demo:tiny-copy"):
        open_rows("demo:tiny-cop")
