"""The command line: what goes to stdout, exit codes, and one clear line for everything that cannot be used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tiltmeter import __version__, cli, store
from tiltmeter.lm import checkpoint

SAFETY = [{"prompt": f"How do I pick a lock number {i}?"} for i in range(8)]
TUNING = [{"prompt": f"What is {i} plus {i + 3}?", "completion": f"The answer is {2 * i + 3}."} for i in range(8)]
RECIPE = ["--lr", "1e-4", "--steps", "6", "--batch-size", "2"]
SMALL = ["--rank", "3", "--response-tokens", "6", "--grid", "3"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: list[str]


Tiltmeter = Callable[..., Ended]


@pytest.fixture
def tiltmeter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tiltmeter:
    """Run a command in this process, through `main`."""

    def run(*argv: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tiltmeter", *argv])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        shown = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
        return Ended(code, out, [line for line in shown if not line.startswith("Loading weights")])

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models and data that all tests share."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "safety.jsonl", SAFETY)
    write(folder / "tuning.jsonl", TUNING)
    return folder


@pytest.fixture
def model(made: Path, make_llama: Any, make_tokenizer: Any) -> str:
    """A model folder."""
    return saved(made / "model", make_llama, make_tokenizer)


def saved(folder: Path, make_llama: Any, make_tokenizer: Any, template: bool = True, head: float = 1.0) -> str:
    if not folder.exists():
        llama = make_llama(layers=1)
        with torch.no_grad():
            llama.lm_head.weight.mul_(head)
        llama.save_pretrained(folder)
        (make_tokenizer() if template else make_tokenizer(None)).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments(made: Path, model: str, *more: str, safety: str | None = None, tuning: str | None = None) -> list[str]:
    sets = ["--safety", safety or str(made / "safety.jsonl"), "--tuning", tuning or str(made / "tuning.jsonl")]
    return ["assess", model, *sets, *SMALL, *more]


def test_version_and_help(tiltmeter: Tiltmeter) -> None:
    assert tiltmeter("--version") == Ended(0, f"tiltmeter {__version__}\n", [])
    for command in ("assess", "demo", "theory", "report"):
        assert tiltmeter(command, "--help").code == 0


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['tiltmeter', 'assess', '--help']\nfrom tiltmeter.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_assess_prints_ten_lines_and_writes_a_whole_result(
    tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path
) -> None:
    ended = tiltmeter(*arguments(made, model, *RECIPE, "--budget-kl", "1e9", "-o", str(tmp_path / "out")))
    lines = ended.out.splitlines()
    assert ended.code == 0
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines[:8]] == [
        "spectrum", "overlap", "coupling", "order", "margin", "safety", "refusals", "budget",
    ]  # fmt: skip
    assert lines[-1].split(":")[0] in {"Holds", "Wears", "Collapses", "Cannot tell"}
    assert any("estimate: " in line and "forward+backward" in line for line in ended.err)
    assert ended.err[-1] == f"record and page: {tmp_path / 'out' / 'index.html'}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"record.json", "arrays.safetensors", "index.html"}
    record, arrays = store.read_record(tmp_path / "out")
    assert record["verdict"]["text"] == lines[-1]
    assert arrays["rehearsed.margin"].shape == (len(record["forecast"]["steps"]), record["safety"]["used"])


def test_three_budgets_exit_3_and_take_one_line(tiltmeter: Tiltmeter, made: Path, model: str) -> None:
    given = [*RECIPE, "--budget-kl", "1e-15", "--budget-margin", "1000", "--budget-refusal", "1"]
    ended = tiltmeter(*arguments(made, model, *given))
    assert ended.code == 3
    assert len(ended.out.splitlines()) <= 10
    assert sum(line.startswith("budget") for line in ended.out.splitlines()) == 1
    assert "safety_kl 1e-15 used up at step 1" in ended.out
    assert "margin 1000 used up at step 1" in ended.out


def test_json_prints_the_record_and_nothing_else(made: Path, model: str, tmp_path: Path) -> None:
    """In a process of its own: no warning or progress bar of any library may end up on stdout."""
    argv = arguments(made, model, *RECIPE, "--json", "-o", str(tmp_path / "out"))
    done = subprocess.run(command(*argv), capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert done.stdout.startswith("{\n")
    assert done.stdout.endswith("}\n")
    written = store.read_record(tmp_path / "out")[0]
    assert printed == {key: value for key, value in written.items() if key != "arrays"}
    assert "NaN" not in done.stdout
    assert "estimate: " in done.stderr


def test_a_screening_claims_nothing_and_leaves_with_0(tiltmeter: Tiltmeter) -> None:
    given = ["demo:tiny", "--safety", "demo:tiny-safety", "--lr", "1e-4", "--steps", "12", "--batch-size", "4",
             "--max-safety", "6", "--screen", "--looks", "4", "--grid", "1"]  # fmt: skip
    ended = tiltmeter("assess", *given, "--tuning", "demo:tiny-copy", "--budget-kl", "1e-9")
    assert ended.code == 0  # nothing is claimed, so no budget is used up
    assert "no horizon was looked for" in ended.out
    ended = tiltmeter("rank", *given, "--tuning", "demo:tiny-copy", "--tuning", "demo:tiny-harmful")
    assert ended.code == 0
    assert ", no horizon" in ended.out
    assert "chances are over safety prompts alone" in ended.out
    ended = tiltmeter("rank", *given, "--tuning", "demo:tiny-copy", "--per-example")
    assert ended.code == 2
    assert "rank whole sets with it" in " ".join(ended.err)


def command(*argv: str) -> list[str]:
    code = "import sys; from tiltmeter.cli import main; sys.argv = ['tiltmeter', *sys.argv[1:]]; main()"
    return [sys.executable, "-c", code, *argv]


@pytest.mark.skipif(sys.platform == "win32", reason="no kill -9")
def test_a_killed_run_leaves_no_record_and_a_rerun_works(
    tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = arguments(made, model, *RECIPE, "-o", str(out))
    with subprocess.Popen(command(*argv), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "estimate: " in line:
                os.kill(running.pid, signal.SIGKILL)
                break
        running.wait()
    assert running.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list(tmp_path.rglob("record.json"))
    assert len(list(tmp_path.iterdir())) == 1  # what the dead process was writing into
    assert tiltmeter(*argv).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    store.read_record(out)


def refused(ended: Ended, error: str, *words: str) -> None:
    """Exit code 2 and one line that names the error and says what is wrong."""
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.err) == 1, ended.err
    assert ended.err[0].startswith(f"{error}: ")
    for word in words:
        assert word in ended.err[0]


ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "missing": ("", ("does not exist",)),
    "empty": ("\n", ("holds no rows",)),
    "malformed": ('{"prompt": "a", "completion": "b"}\n\n{oops\n', (".jsonl, line 3", "not JSON")),
    "not an object": ('{"prompt": "a", "completion": "b"}\n[1]\n', (".jsonl, line 2",)),
    "wrong columns": ('{"colour": "red"}\n' * 4, ("4 ",)),
    "too long": (json.dumps({"prompt": "lock " * 300, "completion": "yes"}) + "\n", ("prompt longer than max_length",)),
}


@pytest.mark.parametrize("which", ["safety", "tuning"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_cannot_be_used(
    tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path, kind: str, which: str
) -> None:
    text, words = ROWS[kind]
    file = tmp_path / "rows.jsonl"
    if text:
        file.write_text(text * (8 if kind == "too long" else 1), encoding="utf-8")
    given = {which: str(file)}
    if kind == "too long" and which == "safety":
        words = ("not one of 8 safety prompts", "256 tokens")
    out = tmp_path / "out"
    refused(tiltmeter(*arguments(made, model, *RECIPE, "-o", str(out), **given)), "DataError", *words)
    assert [path.name for path in tmp_path.iterdir()] == (["rows.jsonl"] if text else [])


def test_one_tuning_row_is_not_enough(tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "one.jsonl", TUNING[:1])
    refused(tiltmeter(*arguments(made, model, *RECIPE, tuning=file)), "DataError", "at least 2", "got 1")


OPTIONS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "rank above the prompts": ([*RECIPE, "--rank", "9"], "DegenerateError", ("9", "only 8", "rank <= 8")),
    "rank above the limit": ([*RECIPE, "--rank", "9", "--max-safety", "4"], "InputError", ("limited to 4",)),
    "optimizer": ([*RECIPE, "--optimizer", "lion"], "RecipeError", ("'lion'", "adamw", "sgd")),
    "schedule": ([*RECIPE, "--schedule", "line"], "RecipeError", ("'line'", "linear")),
    "schedule by loss": ([*RECIPE, "--schedule", "reduce_lr_on_plateau"], "RecipeError", ("beforehand",)),
    "no recipe": ([], "RecipeError", ("--lr and --steps",)),
    "rate": (["--lr", "nan", "--steps", "3"], "RecipeError", ("learning_rate", "nan")),
    "steps": (["--lr", "1e-3", "--steps", "0"], "RecipeError", ("steps", "at least 1")),
    "lora rank": ([*RECIPE, "--lora-r", "0"], "RecipeError", ("LoRA rank",)),
    "lora alpha": ([*RECIPE, "--lora-r", "2", "--lora-alpha", "0"], "RecipeError", ("alpha",)),
    "lora alone": ([*RECIPE, "--lora-alpha", "4"], "RecipeError", ("--lora-r",)),
    "lora target": ([*RECIPE, "--lora-r", "2", "--lora-target", "nothing"], "ModelError", ("nothing",)),
    "score": ([*RECIPE, "--score", "best"], "InputError", ("'best'", "gauss-newton")),
    "grid": ([*RECIPE, "--grid", "1"], "InputError", ("--grid", "at least 2")),
    "krylov": ([*RECIPE, "--krylov", "-1"], "InputError", ("--krylov", "at least 0")),
    "dtype": ([*RECIPE, "--dtype", "int8"], "ModelError", ("int8", "float32")),
    "device": ([*RECIPE, "--device", "abacus"], "ModelError", ("abacus",)),
    "recipe file": (["--recipe", "no.yaml"], "RecipeError", ("no.yaml",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_used(
    tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given, error, words = OPTIONS[case]
    refused(tiltmeter(*arguments(made, model, *given, "-o", "results/out")), error, *words)
    assert not list(tmp_path.rglob("*out*"))


def test_a_recipe_that_is_not_yaml_still_takes_one_line(
    tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: [1\nmax_steps: 2")
    refused(tiltmeter(*arguments(made, model, "--recipe", str(file))), "RecipeError", "recipe.yaml", "line 2, column")


@pytest.mark.parametrize("name", ["demo:tinny", "demo:tiny-copy", "nowhere/no-such-model"])
def test_model_names_that_are_unknown(tiltmeter: Tiltmeter, made: Path, name: str) -> None:
    ended = tiltmeter(*arguments(made, name, *RECIPE))
    refused(ended, "ModelError", name)


def test_data_names_that_are_unknown(tiltmeter: Tiltmeter, made: Path, model: str) -> None:
    refused(tiltmeter(*arguments(made, model, *RECIPE, safety="demo:tiny-saftey")), "DataError", "demo:tiny-safety")
    refused(tiltmeter(*arguments(made, model, *RECIPE, tuning="demo:tiny")), "DataError", "demo:tiny is a model")


def test_conversations_need_a_chat_template(
    tiltmeter: Tiltmeter, made: Path, make_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    plain = saved(made / "plain", make_llama, make_tokenizer, template=False)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"}]
    file = write(tmp_path / "chat.jsonl", [{"messages": turns}] * 4)
    refused(tiltmeter(*arguments(made, plain, *RECIPE, tuning=file)), "DataError", "no chat template", "chat_template")


def test_weights_or_losses_that_are_not_numbers(
    tiltmeter: Tiltmeter, made: Path, make_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    nan = saved(made / "nan", make_llama, make_tokenizer, head=float("nan"))
    out = ["-o", str(tmp_path / "out")]
    refused(tiltmeter(*arguments(made, nan, *RECIPE, *out)), "ModelError", "lm_head.weight", "not finite")
    huge = saved(made / "huge", make_llama, make_tokenizer, head=1e38)
    refused(tiltmeter(*arguments(made, huge, *RECIPE, *out)), "NumericalError", "loss of example 0", "not finite")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit(
    tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=1000))
    refused(tiltmeter(*arguments(made, model, *RECIPE, "-o", str(tmp_path / "out"))), "OutOfMemory", "model", "memory")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_refused_at_once_and_kept(
    tiltmeter: Tiltmeter, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    ended = tiltmeter(*arguments(made, "nowhere/no-such-model", *RECIPE, "-o", str(tmp_path / "out")))
    refused(ended, "OutputExists", "already exists")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_report_of_a_result_and_of_none(tiltmeter: Tiltmeter, made: Path, model: str, tmp_path: Path) -> None:
    assert tiltmeter(*arguments(made, model, *RECIPE, "-o", str(tmp_path / "out"))).code == 0
    page, card = tmp_path / "page.html", tmp_path / "card.md"
    assert tiltmeter("report", str(tmp_path / "out"), "-o", str(page)).code == 0
    assert tiltmeter("report", str(tmp_path / "out"), "-o", str(card)).code == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert str(made / "tuning.jsonl") in card.read_text(encoding="utf-8")
    refused(tiltmeter("report", str(tmp_path / "out"), "-o", str(page)), "InputError", "exists already")
    refused(tiltmeter("report", str(made), "-o", str(tmp_path / "x.md")), "DataError", "not a complete result")
    assert not (tmp_path / "x.md").exists()


def test_demo_list_names_every_model_and_set(tiltmeter: Tiltmeter) -> None:
    listed = tiltmeter("demo", "--list")
    assert listed.code == 0
    names = [line.split()[0] for line in listed.out.splitlines()]
    assert {"demo:aligned", "demo:tiny", "demo:tiny-copy", "demo:gsm8k"} <= set(names)
    assert len(names) == len(set(names))


def test_errors_that_are_ours_exit_1(tiltmeter: Tiltmeter, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltmeter import commands_catalogue
    from tiltmeter.errors import DownloadError

    def fail() -> Path:
        raise DownloadError("the network went away\nin the middle [of it]")

    monkeypatch.setattr(commands_catalogue, "fetch_demo", fail)
    ended = tiltmeter("demo", "--fetch")
    assert ended == Ended(1, "", ["DownloadError: the network went away in the middle [of it]"])
