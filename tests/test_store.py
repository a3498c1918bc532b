"""A result on disk is complete or absent, holds no number that is not one, and notices when it was changed."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from tiltmeter import store
from tiltmeter.errors import DataError, InputError, NumericalError, OutputExists

RECORD = {"schema": "tiltmeter/assessment/1", "margin": 4.2, "horizon": None, "reasons": {"horizon": "one path only"}}


@pytest.fixture
def arrays():
    return {
        "vectors": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def write(path, record=RECORD, arrays=None, then=lambda: None):
    with store.new_folder(path) as folder:
        store.write_record(folder, record, arrays or {})
        then()


def siblings(path):
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != path.name)


def test_round_trip(tmp_path, arrays):
    path = tmp_path / "deep" / "result"
    write(path, {**RECORD, "nested": {"list": [1, 2.5, "ü \udc80", True]}}, arrays)
    record, back = store.read_record(path)
    assert record["margin"] == 4.2
    assert record["nested"]["list"] == [1, 2.5, "ü \udc80", True]
    assert set(record["arrays"]) == set(arrays)
    assert record["arrays"]["half"]["dtype"] == "bfloat16"
    for name, array in arrays.items():
        torch.testing.assert_close(back[name], array, rtol=0, atol=0)
    assert siblings(path) == []
    assert sorted(p.name for p in path.iterdir()) == ["arrays.safetensors", "record.json"]


def test_tensors_sharing_memory_are_written_apart(tmp_path):
    base = torch.arange(4.0)
    write(tmp_path / "r", arrays={"all": base, "tail": base[2:]})
    torch.testing.assert_close(store.read_record(tmp_path / "r")[1]["tail"], torch.tensor([2.0, 3.0]))


def test_an_exception_leaves_nothing(tmp_path):
    path = tmp_path / "result"

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, then=interrupt)
    assert not path.exists()
    assert siblings(path) == []


def test_an_existing_result_is_never_overwritten(tmp_path):
    path = tmp_path / "result"
    write(path)
    before = (path / "record.json").read_bytes()
    with pytest.raises(OutputExists, match="give another folder"):
        write(path, {**RECORD, "margin": 1.0})
    assert (path / "record.json").read_bytes() == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputExists):
        write(file)
    assert file.read_text() == "mine"


def test_an_empty_folder_is_accepted_and_a_link_to_one(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link")
    assert store.read_record(tmp_path / "empty")[0]["margin"] == 4.2


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(OutputExists, match="folder inside it"):
        write(tmp_path / "out")


def test_a_place_that_cannot_hold_a_folder_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create"):
        write(tmp_path / "file" / "result")


def test_a_result_survives_another_run_that_was_faster(tmp_path):
    path = tmp_path / "result"
    with pytest.raises(OutputExists, match="kept in") as caught:
        write(path, {**RECORD, "margin": 1.0}, then=lambda: write(path))
    kept = re.search(r"kept in (\S+)\.$", str(caught.value))[1]
    assert store.read_record(path)[0]["margin"] == 4.2
    assert store.read_record(kept)[0]["margin"] == 1.0


KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from tiltmeter import store
if sys.argv[2] == "before record":
    def stop(path, text):
        print("ready", flush=True)
        time.sleep(60)
    store.write_text = stop
with store.new_folder(Path(sys.argv[1])) as folder:
    store.write_record(folder, {"schema": "tiltmeter/assessment/1"}, {"a": torch.ones(3)})
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["before record", "before rename"])
def test_killed_while_writing_leaves_no_target_and_a_rerun_works(tmp_path, moment):
    path = tmp_path / "result"
    job = subprocess.Popen([sys.executable, "-c", KILLED, str(path), moment], stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "ready\n"
        [part] = siblings(path)
        assert (path.parent / part / "arrays.safetensors").exists()
        assert (path.parent / part / "record.json").exists() == (moment == "before rename")
        write(
            tmp_path / "result2"
        )  # a run of a similar name leaves the living sibling alone, and so does one of the same
        with store.new_folder(path):
            assert (path.parent / part).exists()
        path.rmdir()
    finally:
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        job.stdout.close()
    assert not path.exists()
    assert siblings(path) == [part, "result2"]
    write(path)
    assert store.read_record(path)[0]["margin"] == 4.2
    assert siblings(path) == ["result2"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_with_its_path(tmp_path, bad):
    record = {**RECORD, "forecast": {"margin": {"value": [1.0, bad]}}}
    with pytest.raises(NumericalError, match=r"'forecast\.margin\.value\.1'"):
        write(tmp_path / "r", record)
    with pytest.raises(NumericalError, match="'spectrum'"):
        write(tmp_path / "r", arrays={"spectrum": torch.tensor([1.0, bad])})
    assert list(tmp_path.iterdir()) == []


def test_a_null_needs_a_reason_of_its_own_or_of_a_parent(tmp_path):
    holed = {"schema": "tiltmeter/audit/1", "layers": [{"name": "embed", "share": None}]}
    with pytest.raises(ValueError, match=r"'layers\.0\.share' is null"):
        write(tmp_path / "r", holed)
    with pytest.raises(ValueError, match="null"):
        write(tmp_path / "r", {**holed, "reasons": {"layer": "a prefix in letters is not a parent"}})
    with pytest.raises(ValueError, match="reasons"):
        write(tmp_path / "r", {**holed, "reasons": {"layers": "  "}})
    write(tmp_path / "r", {**holed, "reasons": {"layers": "the adapter has one layer"}})
    record = store.read_record(tmp_path / "r")[0]
    assert store.reason_of(record, "layers.0.share") == "the adapter has one layer"
    assert store.reason_of(record, "layer") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": None}, "schema"),
        ({"schema": "tiltmeter/assessment/2"}, "schema"),
        ({"x": torch.tensor(1.0)}, "'x' is a Tensor"),
        ({"x": {1: 2}}, "'x' has the key 1"),
    ],
)
def test_a_record_that_breaks_the_rules_is_a_mistake_of_ours(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "r", {**RECORD, **change})


def damage(path, how):
    record = json.loads((path / "record.json").read_text())
    if how == "truncated":
        (path / "record.json").write_text((path / "record.json").read_text()[:-20])
    elif how == "nan":
        (path / "record.json").write_text(json.dumps({**record, "margin": float("nan")}))
    elif how == "no record":
        (path / "record.json").unlink()
    elif how == "no arrays":
        (path / "arrays.safetensors").unlink()
    elif how == "list":
        (path / "record.json").write_text("[]")
    elif how in ("foreign", "future"):
        schema = {"foreign": "other/1", "future": "tiltmeter/assessment/9"}[how]
        (path / "record.json").write_text(json.dumps({**record, "schema": schema}))
    elif how == "changed":
        content = bytearray((path / "arrays.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "arrays.safetensors").write_bytes(content)
    elif how == "array lost":
        (path / "record.json").write_text(json.dumps({**record, "arrays": {**record["arrays"], "z": {}}}))
    elif how == "unlisted":
        (path / "record.json").write_text(json.dumps({**record, "arrays": {}}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "cannot be read as JSON"),
        ("nan", "contains NaN"),
        ("no record", "not a complete result"),
        ("no arrays", "missing or damaged"),
        ("list", "not a tiltmeter result"),
        ("foreign", "not a tiltmeter result"),
        ("future", "Upgrade"),
        ("changed", "'a' in .* is not the one"),
        ("array lost", "'z' in .* is not the one"),
        ("unlisted", "'a' in .* is not the one"),
    ],
)
def test_a_damaged_or_foreign_result_is_refused(tmp_path, how, message):
    write(tmp_path / "r", arrays={"a": torch.ones(5)})
    damage(tmp_path / "r", how)
    with pytest.raises(DataError, match=message):
        store.read_record(tmp_path / "r")


def test_text_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    store.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "old"


def test_digests(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert store.digest_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.digest_json({"a": 1, "b": [1, 2]}) == store.digest_json({"b": [1, 2], "a": 1})
    assert store.digest_json([1, 2]) != store.digest_json([2, 1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.digest_json(float("nan"))
