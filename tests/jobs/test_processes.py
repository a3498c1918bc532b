"""Two processes under `accelerate launch` (gloo) assess and fine-tune as one does, and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerCallback
from two import Ended, two

from tiltmeter import store
from tiltmeter.errors import RecipeError, UnsupportedModel
from tiltmeter.guards import budget
from tiltmeter.jobs import guarding
from tiltmeter.jobs.assess import assess
from tiltmeter.jobs.finetune import finetune
from tiltmeter.jobs.guarding import GuardOptions
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.recipe import Lora, Recipe, recipe_of
from tiltmeter.jobs.subject import Options
from tiltmeter.jobs.training import arguments_of
from tiltmeter.tracking.alarm import Budgets
from tiltmeter.tracking.anchor import TrackerOptions

NAMES = ("demo:tiny", "demo:tiny-safety", "demo:tiny-copy")
RECIPE = Recipe(learning_rate=2e-3, steps=8, batch_size=4, max_length=64, lora=Lora(4, 8.0, ("q_proj", "v_proj")))
OPTIONS = Options(max_safety=6, max_tuning=12, rank=2, grid=3, groups=3, max_tokens=100)
TRACKER = TrackerOptions(max_safety=6, rank=2, every=4)
#: In double precision, because training multiplies what rounding leaves of the order of a sum.
RUN = replace(RECIPE, learning_rate=2e-2)
GUARD = GuardOptions("budget", budget_kl=1e-3)


WORKER = """
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = {here!r}
import test_processes
getattr(test_processes, {name!r})({folder!r})
"""


def record_of(folder: Path) -> dict[str, Any]:
    """One assessment and one guarded run, as records."""
    told = assess(*NAMES, RECIPE, OPTIONS, device="cpu").record
    return {"told": told, "run": guarded_run(folder / "run")}


def guarded_run(folder: Path, **more: Any) -> dict[str, Any]:
    return finetune(*NAMES, RUN, folder, options=TRACKER, guard=GUARD, device="cpu", dtype="float64", **more).record


#: All weights move, so the rate is small, and falls.
FULL = replace(RUN, lora=None, learning_rate=2e-3, schedule="linear")


def full_run(folder: Path, **more: Any) -> dict[str, Any]:
    """Full fine-tuning."""
    return finetune(*NAMES, FULL, folder, options=TRACKER, device="cpu", dtype="float64", **more).record


def large_run(folder: Path, **more: Any) -> dict[str, Any]:
    """Full fine-tuning under the budget as in a large space: directions are combinations of examples."""
    with patch.object(budget, "DENSE", 0), patch.object(guarding, "DENSE", 0):
        return full_run(folder, guard=GUARD, **more)


def full_assessment() -> dict[str, Any]:
    recipe = replace(FULL, learning_rate=2e-4)
    return assess(*NAMES, recipe, OPTIONS, device="cpu", dtype="float64").record


def work(folder: str) -> None:
    """What each of the two does."""
    made = record_of(Path(folder))
    stopped = finetune(
        *NAMES,
        replace(RECIPE, steps=100),
        Path(folder) / "stopped",
        options=TRACKER,
        budgets=Budgets(kl=1e-9),
        stop_on_budget=True,
        device="cpu",
    ).record
    rank = dist.get_rank()
    assert (made["run"] == {}) == (stopped == {}) == (rank > 0)
    (Path(folder) / f"{rank}.json").write_text(json.dumps({**made, "stopped": stopped}))
    dist.destroy_process_group()


def divide(folder: str) -> None:
    """What each of the two does where the weights are divided; accelerate's --use_fsdp sets these variables."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    told = assess(*NAMES, RECIPE, OPTIONS, device="cpu").record
    model = open_model("demo:tiny", device="cpu").loaded.model
    here = sum(p.to_local().numel() for p in model.parameters())
    run = guarded_run(Path(folder) / "divided")
    full = full_run(Path(folder) / "divided-full")
    cut = Path(folder) / "cut"
    with pytest.raises(KeyboardInterrupt):
        guarded_run(cut, callbacks=[Cut()])
    resumed = guarded_run(cut, resume=True)
    with pytest.raises(KeyboardInterrupt):
        full_run(Path(folder) / "cut-full", callbacks=[Cut()])
    again = full_run(Path(folder) / "cut-full", resume=True)
    held = full_run(Path(folder) / "held", guard=GUARD)
    with pytest.raises(KeyboardInterrupt):
        full_run(Path(folder) / "cut-held", guard=GUARD, callbacks=[Cut()])
    held_again = full_run(Path(folder) / "cut-held", guard=GUARD, resume=True)
    large = large_run(Path(folder) / "large")
    with pytest.raises(KeyboardInterrupt):
        large_run(Path(folder) / "cut-large", callbacks=[Cut()])
    large_again = large_run(Path(folder) / "cut-large", resume=True)
    for record in (run, resumed, full, again, held, held_again, large, large_again):
        assert (record == {}) == (dist.get_rank() > 0)
    refused = []
    for job in (
        lambda: full_run(Path(folder) / "gradient", guard=GuardOptions("gradient")),
        lambda: open_model("demo:aligned", device="cpu"),
    ):
        with pytest.raises(UnsupportedModel) as caught:
            job()
        refused.append(str(caught.value))
    share = here / sum(p.numel() for p in model.parameters())
    made = {
        "told": told,
        "run": run,
        "resumed": resumed,
        "full": full,
        "again": again,
        "held": held,
        "held_again": held_again,
        "large": large,
        "large_again": large_again,
        "told_full": full_assessment(),
        "share": share,
        "refused": refused,
    }
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(made))
    dist.destroy_process_group()


class Cut(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends every process in the middle of the run."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


class Ray(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Fails in the second process alone."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and dist.get_rank() == 1:
            raise ValueError("a cosmic ray")


def fail(folder: str) -> None:
    """One of the two fails while the other trains."""
    finetune(*NAMES, RECIPE, Path(folder) / "run", options=TRACKER, callbacks=[Ray()], device="cpu")


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    # without GPUs this is torchrun with gloo; accelerate's --cpu would start a single process
    settings = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    start = [sys.executable, "-m", "accelerate.commands.launch", *settings, "--dynamo_backend", "no"]
    room = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*start, *command], capture_output=True, text=True, timeout=400, env=room, check=False)


def script(folder: Path, name: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(
        WORKER.format(
            here=[str(Path(__file__).parent), str(Path(two.__code__.co_filename).parent)], name=name, folder=str(folder)
        )
    )
    return str(path)


def compare(one: Any, other: Any, path: str = "") -> None:
    """Every number to 1e-5 of itself but what it cost; words and counts exactly."""
    if path in ("told.created", "told.cost", "run.created", "run.overhead"):
        return
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            compare(value, other[key], f"{path}.{key}".lstrip("."))
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            compare(a, b, f"{path}.{place}")
    elif isinstance(one, float):
        # a change of the margin is a difference of numbers a hundred times as large, and so is its error; the exponent
        # is fitted to small differences, and the path is drawn from them
        close = {".margin": 1e-5, ".path": 1e-5, ".exponent": 1e-4}
        allowed = max((limit for part, limit in close.items() if part in path), default=1e-9)
        assert one == pytest.approx(other, rel=1e-5, abs=allowed), path
    else:
        assert one == other, path


def test_two_processes_assess_and_train_as_one(tmp_path: Path) -> None:
    done = launch([script(tmp_path, "work")])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    compare({"told": first["told"]}, {"told": second["told"]})
    alone = json.loads(json.dumps(record_of(tmp_path / "alone")))
    compare({key: first[key] for key in alone}, alone)
    one, two = (held["told"]["cost"]["micro_batch_passes"] for held in (alone, first))
    for kind in ("jvp", "forward_backward"):  # divided, not done twice
        assert one[kind] == two[kind] > 2
    assert two["hvp"] == one["hvp"] + 2 > 4  # but each tries how
    assert alone["run"]["guard"]["log"]
    assert store.read_record(tmp_path / "run")[0]["curves"] == first["run"]["curves"]
    run = first["stopped"]["run"]
    assert run["stopped_early"]
    assert run["steps"] < 10


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Ended]]]:
    folder = tmp_path_factory.mktemp("forked")
    return folder, two(__file__, {"divide": [str(folder)], "fail": [str(folder)]}, folder)


def test_with_divided_weights_a_guarded_run_is_that_of_whole_ones(
    forked: tuple[Path, dict[str, list[Ended]]], tmp_path: Path
) -> None:
    """FSDP2: every process measures and guards, and the main one writes."""
    folder, done = forked
    assert [process.returncode for process in done["divide"]] == [0, 0], done["divide"][0].stderr[-3000:]
    divided = json.loads((folder / "0.json").read_text())["run"]
    alone = json.loads(json.dumps(guarded_run(tmp_path / "run")))
    compare({"run": divided}, {"run": alone})
    assert any(entry["what"].startswith("pulled back") for entry in alone["guard"]["log"])
    assert store.read_record(folder / "divided")[0]["curves"] == divided["curves"]
    adapters = [load_file(at / "model" / "adapter_model.safetensors") for at in (folder / "divided", tmp_path / "run")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, weight in adapters[0].items():
        torch.testing.assert_close(weight, adapters[1][name])


def test_with_divided_weights_a_guarded_run_can_be_resumed(forked: tuple[Path, dict[str, list[Ended]]]) -> None:
    """FSDP2: cut off at step 5 in every process, gone on with from the checkpoint of step 4."""
    folder, done = forked
    assert [process.returncode for process in done["divide"]] == [0, 0], done["divide"][0].stderr[-3000:]
    told = json.loads((folder / "0.json").read_text())
    logs = [told[name]["guard"].pop("log") for name in ("run", "resumed")]
    compare({"run": told["resumed"]}, {"run": told["run"]})
    assert [entry for entry in logs[0] if entry["step"] > 4] == [entry for entry in logs[1] if entry["step"] > 4]
    adapters = [load_file(folder / name / "model" / "adapter_model.safetensors") for name in ("divided", "cut")]
    for name, weight in adapters[0].items():
        torch.testing.assert_close(weight, adapters[1][name])


def test_divided_weights_are_trained_as_whole_ones(forked: tuple[Path, dict[str, list[Ended]]], tmp_path: Path) -> None:
    """FSDP2, full fine-tuning: all that is measured on the way is the same."""
    folder, done = forked
    assert [process.returncode for process in done["divide"]] == [0, 0], done["divide"][0].stderr[-3000:]
    divided = json.loads((folder / "0.json").read_text())["full"]
    alone = json.loads(json.dumps(full_run(tmp_path / "run")))
    assert alone["curves"]["drift_energy"]["value"][-1] > 0
    lengths = alone["curves"]["weight_change"]["value"]
    compare({"run": divided}, {"run": alone})
    models = [load_file(at / "model" / "model.safetensors") for at in (folder / "divided-full", tmp_path / "run")]
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name])
    # the saved model is one that can be opened, and has moved as far as the record says
    moved = open_model(str(folder / "divided-full" / "model"), device="cpu", dtype="float64").loaded.model
    start = dict(open_model("demo:tiny", device="cpu", dtype="float64").loaded.model.named_parameters())
    length = sum(float((p - start[name]).square().sum()) for name, p in moved.named_parameters()) ** 0.5
    assert lengths[-1] == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("space", ["held", "large"])
def test_divided_weights_are_guarded_as_whole_ones(
    space: str, forked: tuple[Path, dict[str, list[Ended]]], tmp_path: Path
) -> None:
    """FSDP2, full fine-tuning with the budget; cut off and gone on with, it is the same too."""
    folder, done = forked
    assert [process.returncode for process in done["divide"]] == [0, 0], done["divide"][0].stderr[-3000:]
    told = json.loads((folder / "0.json").read_text())
    run = large_run(tmp_path / "run") if space == "large" else full_run(tmp_path / "run", guard=GUARD)
    alone = json.loads(json.dumps(run))
    compare({"run": told[space]}, {"run": alone})
    assert any("directions measured" in entry["what"] for entry in alone["guard"]["log"])
    assert alone["curves"]["safety_kl"]["value"][-1] < told["full"]["curves"]["safety_kl"]["value"][-1] / 2
    logs = [told[name]["guard"].pop("log") for name in (space, f"{space}_again")]
    compare({"run": told[f"{space}_again"]}, {"run": told[space]})
    assert [entry for entry in logs[0] if entry["step"] > 4] == [entry for entry in logs[1] if entry["step"] > 4]
    checkpoint = folder / f"cut-{space}" / "checkpoint-4"
    assert {path.name for path in checkpoint.glob("guard*")} == {
        "guard.json", "guard-1-of-2.safetensors", "guard-2-of-2.safetensors",
    }  # fmt: skip
    kept = load_file(checkpoint / "guard-1-of-2.safetensors")
    assert ("memory.columns" in kept) == (space == "held")
    assert kept["memory.inside"].dtype == (torch.int16 if space == "large" else torch.float64)


def test_divided_weights_go_on_from_a_checkpoint(forked: tuple[Path, dict[str, list[Ended]]], tmp_path: Path) -> None:
    """FSDP2, full fine-tuning: cut off at step 5 in every process, gone on with from the checkpoint of step 4."""
    folder, done = forked
    assert [process.returncode for process in done["divide"]] == [0, 0], done["divide"][0].stderr[-3000:]
    told = json.loads((folder / "0.json").read_text())
    compare({"run": told["again"]}, {"run": told["full"]})
    models = [load_file(folder / name / "model" / "model.safetensors") for name in ("divided-full", "cut-full")]
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=1e-12, atol=1e-12)
    # what is kept is what the optimiser of a single process would have
    held = load_file(folder / "cut-full" / "checkpoint-4" / "optimizer.safetensors")
    trained = [name for name, _ in open_model("demo:tiny", device="cpu").loaded.model.named_parameters()]
    assert {name.rsplit(":", 1)[0] for name in held} == set(trained)
    full_run(tmp_path / "run")
    alone = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    sizes = sorted(float(state["exp_avg"].norm()) for state in alone.values())
    kept = sorted(float(tensor.norm()) for name, tensor in held.items() if name.endswith(":exp_avg"))
    assert kept == pytest.approx(sizes, rel=1e-6)


@pytest.mark.parametrize("which", ["told", "told_full"])
def test_with_divided_weights_an_assessment_is_that_of_whole_ones(
    which: str, forked: tuple[Path, dict[str, list[Ended]]]
) -> None:
    """FSDP2. In full fine-tuning all but what a Hessian product enters, which is a difference there, to 5 %."""
    folder, done = forked
    for process in done["divide"]:
        assert process.returncode == 0, process.stderr[-3000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    compare({"told": first[which]}, {"told": second[which]})
    assert first["share"] + second["share"] == pytest.approx(1.0)
    assert 0.4 < first["share"] < 0.6
    made = full_assessment() if which == "told_full" else assess(*NAMES, RECIPE, OPTIONS, device="cpu").record
    alone = json.loads(json.dumps(made))
    if which == "told_full":
        one, two = (held["aic"].pop("curvature_coupling")["high"] for held in (alone, first[which]))
        assert two == pytest.approx(one, rel=0.05)
        for held in (alone, first[which]):  # what gamma enters
            for key in ("gamma_full", "cross_term", "crossover", "crossover_steps"):
                held["aic"].pop(key)
    compare({"told": first[which]}, {"told": alone})


def test_what_divided_weights_cannot_do_is_said(forked: tuple[Path, dict[str, list[Ended]]]) -> None:
    folder, _ = forked
    projection, merged = json.loads((folder / "0.json").read_text())["refused"]
    assert "gradient projection works tensor by tensor, and the trained weights are divided" in projection
    assert "Save the merged model to a folder first" in merged


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "under DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "under FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "under FSDP1"),
    ],
)
def test_other_ways_of_dividing_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedModel, match=message):
        open_model("demo:tiny", device="cpu")
    with pytest.raises(UnsupportedModel, match=message):
        finetune(*NAMES, RECIPE, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_process_that_fails_ends_both(forked: tuple[Path, dict[str, list[Ended]]]) -> None:
    """Without a launcher, which would end the other at once: the broken connection does."""
    folder, done = forked
    assert [process.returncode != 0 for process in done["fail"]] == [True, True]
    assert "a cosmic ray" in done["fail"][1].stderr
    assert not (folder / "run" / store.RECORD).exists()
    assert (folder / "run" / "checkpoint-2").is_dir()  # what a run can go on from


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_a_step_are_divided_among_processes(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    recipe = recipe_of(given, 48)
    assert recipe.batch_size == 6 * processes
    assert recipe.steps == 16 / processes
    for asked, (each, accumulated) in {6 * processes: (3, 2), 8: (8 // processes, 1)}.items():
        fields = arguments_of(replace(recipe, batch_size=asked), given, tmp_path, torch.device("cpu"))
        assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (each, accumulated)
    if processes > 1:
        with pytest.raises(RecipeError, match=f"7 rows a step cannot be divided among {processes} processes"):
            arguments_of(replace(recipe, batch_size=7), given, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(("rank", "command", "code"), [(0, "rank", 2), (1, "rank", 2), (1, "theory", 2)])
def test_other_commands_work_in_one_process(rank: int, command: str, code: int) -> None:
    room = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank)}
    arguments = ["m", "--safety", "s", "--tuning", "t", "--lr", "1", "--steps", "1"] if command == "rank" else []
    done = subprocess.run(
        [sys.executable, "-m", "tiltmeter", command, *arguments], capture_output=True, text=True, env=room, check=False
    )
    assert done.returncode == code
    assert done.stdout == ""
    if rank:  # the first speaks for all
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("InputError: rank was started in 2 processes and works in one")


def test_a_rank_without_other_processes_silences_nobody() -> None:
    """Job schedulers leave RANK behind in shells of their own."""
    room = {**{key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}, "RANK": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "tiltmeter", "--version"], capture_output=True, text=True, env=room, check=True
    )
    assert done.stdout.startswith("tiltmeter ")


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_is_told_once(rank: int, tmp_path: Path) -> None:
    """And before the processes have met, so that none waits for another."""
    given = ["demo:tiny", "--safety", str(tmp_path / "nothing.jsonl"), "--tuning", "demo:tiny-copy", "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "tiltmeter", "assess", *given, "--lr", "1e-3", "--steps", "4"],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": str(rank)},
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("nothing.jsonl does not exist") == done.stderr.count("DataError: ") == 1 - rank
    assert not (tmp_path / "out").exists()
