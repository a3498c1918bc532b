"""Files and hub sets become rows, or one error that names the file and the line."""

import json
from pathlib import Path

import pytest

from tiltmeter.errors import DataError
from tiltmeter.lm.rows import digest_of, read_rows

ROWS = [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "line\u2028separator", "completion": "naïve 007"}]


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    path.write_text('prompt,completion\n2 + 2?,4\n"line\u2028separator",naïve 007\n', encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


WRITERS = {"a.jsonl": write_jsonl, "b.json": write_json, "c.csv": write_csv, "d.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    read = read_rows(WRITERS[name](tmp_path / name))
    assert read.rows == tuple(ROWS)
    assert read.digest == digest_of(ROWS)
    assert read.name == str(tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
def test_limit_takes_rows_from_the_start(tmp_path, name):
    assert read_rows(str(WRITERS[name](tmp_path / name)), limit=1).rows == tuple(ROWS[:1])


def test_json_lines_under_the_name_json_are_read(tmp_path):
    assert read_rows(write_jsonl(tmp_path / "lines.json")).rows == tuple(ROWS)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}\r\n\n')
    assert read_rows(path).rows == ({"text": "one"}, {"text": "two"})


def test_csv_keeps_text_as_it_stands(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nwho?,007\nwhat?,NA\nwhy?,\n", encoding="utf-8")
    assert [row["answer"] for row in read_rows(path).rows] == ["007", "NA", ""]


def test_digest_depends_on_contents_and_order_of_rows_only():
    swapped = [dict(reversed(list(row.items()))) for row in ROWS]
    assert digest_of(swapped) == digest_of(ROWS)
    assert digest_of(ROWS[::-1]) != digest_of(ROWS)
    assert digest_of([{**ROWS[0], "completion": "5"}, ROWS[1]]) != digest_of(ROWS)
    assert len(digest_of(ROWS)) == 16


def test_a_digest_of_odd_text_exists(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half a pair \\ud83d"}\n')
    assert len(read_rows(path).digest) == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n\n[1, 2]\n', r"a\.jsonl, line 3: expected an object with columns, got list"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "\n \n", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '{"text": "x"}', "expected a list of objects, got dict"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json, entry 1: expected an object with columns, got int"),
        ("a.json", '[\n{"text": }]', r"a\.json, line 2: not JSON"),
        ("a.csv", "prompt,completion\n", "holds no rows"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv, line 2: expected 2 columns"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv, line 3: expected 2 columns"),
        ("a.csv", 'prompt,completion\n"a,b\n', "not a readable CSV"),
        ("a.parquet", "PAR1 not really", "not a readable Parquet"),
        ("a.xlsx", "x", r"ending '.xlsx'; expected .jsonl, .json, .parquet, .csv"),
    ],
)
def test_a_bad_file_is_named_with_what_was_expected(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_text_that_is_not_utf8_is_named(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read_rows(tmp_path / name)


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path):
    for name in (tmp_path / "nothing", str(tmp_path / "nothing"), "nothing.jsonl", "./nothing", "~/nothing.csv"):
        with pytest.raises(DataError, match=r"does not exist; expected a \.jsonl"):
            read_rows(name)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is a directory; expected a \.jsonl"):
        read_rows(tmp_path)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(DataError, match="at least one"):
        read_rows(write_jsonl(tmp_path / "a.jsonl"), limit=limit)


def test_a_hub_set_that_cannot_be_reached_says_so():
    with pytest.raises(DataError, match=r"cannot load 'nobody/nothing:main'.*from the hub") as caught:
        read_rows("nobody/nothing:main")
    assert caught.value.__cause__ is not None


def test_a_hub_name_carries_configuration_split_and_limit(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("openai/gsm8k:main", split="test", limit=7).rows == tuple(ROWS)
    assert read_rows("openai/gsm8k").name == "openai/gsm8k"
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test[:7]"}),
        (("openai/gsm8k", None), {"split": "train"}),
    ]
