"""`tiltmeter evaluate` and `tiltmeter audit`: ten lines, JSON, folders, exit codes, and one clear line for errors."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tiltmeter import cli, store

SAFETY = [{"prompt": f"How do I pick a lock number {i}?"} for i in range(4)]
SMALL = ["--max-safety", "4", "--response-tokens", "4"]


@pytest.fixture
def tiltmeter(capsys, monkeypatch):
    """Run a command in this process, through `main`: exit code, stdout, lines of stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["tiltmeter", *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        shown = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
        return code, out, [line for line in shown if not line.startswith(("Loading weights", "Writing model"))]

    return run


@pytest.fixture
def made(tmp_path, make_llama, make_tokenizer):
    model = make_llama(layers=1)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(torch.randn(32, 48) * 0.3)
    model.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    (tmp_path / "safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAFETY))
    return tmp_path


def audit(made, *more):
    return ["audit", made / "base", made / "tuned", "--safety", made / "safety.jsonl", *SMALL, "--rank", "2", *more]


def evaluate(made, *more):
    return ["evaluate", made / "tuned", "--safety", made / "safety.jsonl", *SMALL, *more]


def test_help(tiltmeter):
    for command in ("audit", "evaluate"):
        assert tiltmeter(command, "--help")[0] == 0


@pytest.mark.parametrize("command", [audit, evaluate])
def test_ten_lines_and_a_whole_folder(tiltmeter, made, command):
    code, out, err = tiltmeter(*command(made, "-o", made / "out"))
    assert code == 0
    lines = out.splitlines()
    assert 5 < len(lines) <= 10
    record, _ = store.read_record(made / "out")
    assert lines[-1] == record["verdict"]["text"]
    assert err[-1] == f"record and page: {made / 'out' / 'index.html'}"
    assert {path.name for path in (made / "out").iterdir()} == {"record.json", "arrays.safetensors", "index.html"}
    assert tiltmeter("report", made / "out", "-o", made / "page.html")[0] == 0
    assert "<!DOCTYPE html>" in (made / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [audit, evaluate])
def test_json_is_the_record_and_nothing_else(tiltmeter, made, command):
    code, out, _ = tiltmeter(*command(made, "--json"))
    assert code == 0
    record = json.loads(out)
    store.check_values(record)
    assert record["schema"] == f"tiltmeter/{'audit' if command is audit else 'evaluation'}/1"


def test_a_budget_that_is_exceeded_exits_3(tiltmeter, made):
    code, out, _ = tiltmeter(*audit(made, "--budget-kl", "1e-9"))
    assert code == 3
    assert "over the budget of 1e-09" in out
    assert tiltmeter(*audit(made, "--budget-kl", "1e9"))[0] == 0


def test_a_base_gives_changes(tiltmeter, made):
    code, out, _ = tiltmeter(*evaluate(made, "--base", made / "base", "--harmless", made / "safety.jsonl"))
    assert code == 0
    assert "against the base" in out
    assert "safety KL" in out


REFUSED = {
    "judge without a model": (["--judge", "http://127.0.0.1:9/v1"], "InputError", "--judge-model"),
    "judge with a key in it": (
        ["--judge", "https://user:secret@host/v1", "--judge-model", "g"],
        "InputError",
        "environment variable",
    ),
    "no such classifier": (["--judge", "nowhere/no-such-judge"], "ModelError", "no-such-judge"),
    "meaning": (["--judge", "x", "--judge-means", "good"], "InputError", "refusal or harm"),
    "limits": (
        ["--judge", "https://h/v1", "--judge-model", "g", "--judge-requests", "0"],
        "InputError",
        "must be positive",
    ),
    "no set": (["--harmless", "nothing.jsonl"], "DataError", "does not exist"),
    "no base": (["--base", "nowhere/no-such-base"], "ModelError", "no-such-base"),
    "too few": (["--max-capability", "0"], "InputError", "--max-capability"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_evaluate_refuses(tiltmeter, made, case):
    given, error, word = REFUSED[case]
    code, out, err = tiltmeter(*evaluate(made, *given))
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith(f"{error}: ")
    assert word in err[0]
    assert "secret" not in err[0]


def test_what_audit_refuses(tiltmeter, made, make_llama):
    make_llama(layers=2).save_pretrained(made / "deeper")
    (made / "broken").mkdir()
    (made / "broken" / "config.json").write_text("{}")
    (made / "pickled").mkdir()
    (made / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    cases = {
        "base": "has the same weights",
        "deeper": "one architecture",
        "broken": "holds no weights",
        "pickled": "only as pickle files",
        "nothing": "cannot load",
    }
    for name, word in cases.items():
        code, out, err = tiltmeter("audit", made / "base", made / name, "--safety", made / "safety.jsonl", *SMALL)
        assert (code, out, len(err)) == (2, "", 1), err
        assert word in err[0]
    (made / "out").mkdir()
    (made / "out" / "mine.txt").write_text("mine")
    code, _, err = tiltmeter(*audit(made, "-o", made / "out"))
    assert code == 2
    assert err[0].startswith("OutputExists")
