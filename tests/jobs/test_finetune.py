"""The real run: killed and resumed, with either trainer, against a forecast, and with checkpoints that are bad."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tiltmeter import store
from tiltmeter.commands_finetune import lines
from tiltmeter.errors import InputError, ModelError, OutputExists, RecipeError
from tiltmeter.guards.names import GUARDS
from tiltmeter.jobs.assess import assess
from tiltmeter.jobs.checkpoints import check_checkpoint, check_optimizer, last_checkpoint
from tiltmeter.jobs.finetune import finetune
from tiltmeter.jobs.guarding import GuardOptions
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.recipe import Lora, Recipe, recipe_of
from tiltmeter.jobs.subject import Options, with_lora
from tiltmeter.jobs.track import check_same_run
from tiltmeter.jobs.training import arguments_of
from tiltmeter.report.track_page import render_track_page
from tiltmeter.tracking.alarm import Budgets
from tiltmeter.tracking.anchor import TrackerOptions

FULL = Recipe(learning_rate=5e-4, steps=10, batch_size=4, max_length=64)
LORA = replace(FULL, learning_rate=2e-3, lora=Lora(4, 8.0, ("q_proj", "v_proj")))
SMALL = TrackerOptions(max_safety=6, rank=2, every=4)
SAVING = {"save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

#: Imports once and forks: a process may not fork when it has trained.
KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from transformers import TrainerCallback
from test_finetune import FULL, LORA, run

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:  # row 8 is written; the last checkpoint is that of step 6
            os.kill(os.getpid(), signal.SIGKILL)

for name, recipe in dict(FULL=FULL, LORA=LORA).items():
    child = os.fork()
    if not child:
        try:
            run(recipe, Path({out!r}) / name, callbacks=[Kill()])
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(recipe: Recipe, out: Path, **given: Any) -> Any:
    more = {"arguments": SAVING, "options": SMALL, **given}
    return finetune("demo:tiny", "demo:tiny-safety", "demo:tiny-copy", recipe, out, device="cpu", **more)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("-")] == ["-9", "-9"], done.stderr
    return out


@pytest.mark.parametrize("name", ["FULL", "LORA"])
def test_killed_and_resumed_gives_the_rows_of_an_uninterrupted_run(killed: Path, tmp_path: Path, name: str) -> None:
    recipe = {"FULL": FULL, "LORA": LORA}[name]
    whole, broken = tmp_path / "whole", killed / name
    run(recipe, whole)
    rows = broken / "track" / "rows.jsonl"
    steps = [json.loads(line)["step"] for line in rows.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 6, 8]
    with open(rows, "ab") as file:
        file.write(b'{"step":9,"flow_ti')  # as if the kill had come in the middle of a row
    assert last_checkpoint(broken) == broken / "checkpoint-6"
    run(recipe, broken, resume=True)
    for file in ("rows.jsonl", "rates.jsonl"):
        assert (broken / "track" / file).read_bytes() == (whole / "track" / file).read_bytes()
    weights = "model.safetensors" if recipe.lora is None else "adapter_model.safetensors"
    first, second = (load_file(folder / "model" / weights) for folder in (whole, broken))
    assert all(torch.equal(first[key], second[key]) for key in first)
    one, two = (store.read_record(folder) for folder in (whole, broken))
    assert one[0]["curves"] == two[0]["curves"]
    assert one[0]["path"] == two[0]["path"]
    assert all(torch.equal(one[1][key], two[1][key]) for key in one[1])
    with pytest.raises(OutputExists, match="finished run"):
        run(recipe, broken, resume=True)


class Cut(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends the run after the checkpoint of step 6."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", sorted(set(GUARDS) - {"none", "safe_lora", "lox"}))  # two need another model as base
def test_a_guarded_run_is_resumed_with_its_guard(tmp_path: Path, name: str) -> None:
    guard = GuardOptions(name, budget_kl=1e-3)
    whole = run(LORA, tmp_path / "whole", guard=guard).record
    with pytest.raises(KeyboardInterrupt):
        run(LORA, tmp_path / "cut", guard=guard, callbacks=[Cut()])
    resumed = run(LORA, tmp_path / "cut", guard=guard, resume=True).record
    assert resumed["curves"] == whole["curves"]
    late = [[entry for entry in told["guard"]["log"] if entry["step"] > 6] for told in (whole, resumed)]
    assert late[0] == late[1]
    run(LORA, tmp_path / "free")
    first, second, free = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "cut", "free")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], free[key]) for key in first)


class CutAtTheEnd(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends the run after the checkpoint of its last step, before the record is written."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", [None, "ema", "budget"])
def test_a_run_that_was_cut_off_after_its_last_step_takes_no_other(tmp_path: Path, name: str | None) -> None:
    """At a constant rate, where another step would be seen; the guard has finished, and does not again."""
    recipe = replace(LORA, schedule="constant", steps=9)
    guard = None if name is None else GuardOptions(name, budget_kl=1e-3)
    whole = run(recipe, tmp_path / "whole", guard=guard).record
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut", guard=guard, callbacks=[CutAtTheEnd()])
    resumed = run(recipe, tmp_path / "cut", guard=guard, resume=True).record
    assert resumed["run"] == whole["run"]
    assert resumed["curves"] == whole["curves"]
    assert resumed["guard"] == whole["guard"]
    first, second = (load_file(tmp_path / cut / "model" / "adapter_model.safetensors") for cut in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_without_what_callbacks_add_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-2" / "guard.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path, ["guard.json"]) == tmp_path / "checkpoint-2"
    assert (
        last_checkpoint(tmp_path, ["optimizer.pt"]) == tmp_path / "checkpoint-4"
    )  # what reads it says what is missing


def test_the_last_row_is_of_the_model_that_is_saved(tmp_path: Path) -> None:
    """The average takes the place of the weights after the last step, and before it is measured."""
    told = run(FULL, tmp_path / "run", guard=GuardOptions("ema")).record
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    start = dict(open_model("demo:tiny", device="cpu").loaded.model.named_parameters())
    length = sum(float((value - start[name].detach()).square().sum()) for name, value in saved.items()) ** 0.5
    lengths = told["curves"]["weight_change"]["value"]
    assert lengths[-1] == pytest.approx(length, rel=1e-5)
    assert lengths[-1] < 0.9 * max(lengths)
    [*_, last] = told["guard"]["log"]
    assert (last["step"], last["what"]) == (FULL.steps, "weights replaced by their average")


def test_trl_takes_the_same_steps_as_transformers(tmp_path: Path) -> None:
    recipe = replace(FULL, steps=4)
    rows = {}
    for trainer in ("transformers", "trl"):
        rows[trainer] = run(recipe, tmp_path / trainer, trainer=trainer).record["curves"]
    for key in ("task_loss", "margin", "weight_change", "flow_time"):
        plain, sft = (rows[trainer][key]["value"] for trainer in ("transformers", "trl"))
        assert plain[1:] == pytest.approx(sft[1:], rel=1e-4)
    assert rows["trl"]["task_loss"]["value"][1] > 1


def test_the_task_loss_is_that_of_the_whole_batch_over_accumulation(tmp_path: Path) -> None:
    """Two micro-batches of two rows, or one of four: the same mean over supervised tokens."""
    recipe = replace(FULL, steps=2, schedule="constant")
    split = run(recipe, tmp_path / "split").record["curves"]
    joined = run(recipe, tmp_path / "joined", arguments={}).record["curves"]
    assert split["task_loss"]["value"][1:] == pytest.approx(joined["task_loss"]["value"][1:], rel=1e-5)
    assert split["margin"]["value"] == pytest.approx(joined["margin"]["value"], rel=1e-4)


def test_a_forecast_is_laid_beside_the_run_it_speaks_of(tmp_path: Path) -> None:
    options = Options(max_safety=6, max_tuning=12, rank=2, grid=3, groups=3)
    told = assess("demo:tiny", "demo:tiny-safety", "demo:tiny-copy", FULL, options, device="cpu")
    with store.new_folder(tmp_path / "told") as folder:
        store.write_record(folder, told.record, told.arrays)
    track = run(FULL, tmp_path / "run", assessment=tmp_path / "told", options=TrackerOptions(rank=2, every=64))
    compared, curves = track.record["comparison"], track.record["curves"]
    assert track.record["safety"]["used"] == told.record["safety"]["used"]
    assert curves["margin"]["anchor"] == pytest.approx(told.record["forecast"]["margin"]["anchor"], rel=1e-5)
    assert compared["steps"] == told.record["forecast"]["steps"]
    for key in ("margin_change", "safety_kl"):
        assert compared[key]["predicted"] == told.record["forecast"][key]["value"]
        assert compared[key]["low"] == told.record["forecast"]["same_prompts"][key]["low"]
        at = [curves["steps"].index(step) for step in compared["steps"]]
        assert compared[key]["measured"] == [curves[key]["value"][place] for place in at]
        ends = zip(compared[key]["low"], compared[key]["high"], compared[key]["measured"], strict=True)
        assert compared[key]["inside"] == [low <= seen <= high for low, high, seen in ends]
    page = render_track_page([track.record], "A run")
    assert "foretold before the run" in page
    assert page == render_track_page([store.read_record(tmp_path / "run")[0]], "A run")
    with pytest.raises(InputError, match=r"another run: recipe\.learning_rate was 0\.0005, here it is 0\.001"):
        run(replace(FULL, learning_rate=1e-3), tmp_path / "other", assessment=tmp_path / "told")


def test_a_screening_laid_beside_a_run_claims_nothing(tmp_path: Path) -> None:
    options = Options(max_safety=6, max_tuning=12, grid=2, looks=3, screen=True)
    told = assess("demo:tiny", "demo:tiny-safety", "demo:tiny-copy", FULL, options, device="cpu")
    with store.new_folder(tmp_path / "told") as folder:
        store.write_record(folder, told.record, told.arrays)
    track = run(FULL, tmp_path / "run", assessment=tmp_path / "told", options=TrackerOptions(rank=2, every=64))
    compared = track.record["comparison"]
    assert compared["margin_change"]["predicted"] == told.record["forecast"]["margin_change"]["value"]
    assert None not in compared["margin_change"]["measured"]
    assert compared["horizon_steps"] is None
    assert track.record["reasons"]["comparison.horizon_steps"] == "left out (--screen)"
    assert "forecast    claims no horizon, and no interval" in lines(track.record)
    page = render_track_page([track.record], "A run")
    assert page.count("no horizon: not claimed") == 2 * len(compared["steps"])


def test_a_forecast_read_from_disk_is_of_the_same_run() -> None:
    here = {part: {"digest": part} for part in ("model", "safety", "tuning")} | {"recipe": LORA.as_dict()}
    check_same_run(json.loads(json.dumps(here)), here)
    other = json.loads(json.dumps(here))
    other["recipe"]["lora"]["targets"] = ["q_proj"]
    with pytest.raises(InputError, match=r"recipe\.lora was"):
        check_same_run(other, here)
    other = {**here, "tuning": {"digest": "another"}}
    with pytest.raises(InputError, match=r"tuning\.digest was 'another', here it is 'tuning'"):
        check_same_run(other, here)


def test_the_alarm_stops_the_run_and_names_the_checkpoint(tmp_path: Path) -> None:
    recipe = replace(FULL, learning_rate=2e-3, steps=24, schedule="constant")
    track = run(recipe, tmp_path / "run", budgets=Budgets(margin=6.0), stop_on_budget=True)
    alarm, margins = track.record["alarm"], track.record["curves"]["margin"]["value"]
    assert track.over_budget
    assert track.record["run"]["stopped_early"]
    assert margins[-1] < 6.0 <= min(margins[:-1])
    assert track.record["run"]["steps"] == alarm["step"] == track.record["curves"]["steps"][-1] < 24
    inside = [int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")]
    before = [step for step in inside if step < alarm["step"]]
    assert alarm["checkpoint"] == (f"checkpoint-{max(before)}" if before else None)
    page = render_track_page([track.record], "A run")
    assert "Over the budget" in page
    assert "No forecast" not in page


def test_only_weights_that_cannot_run_code_are_saved(tmp_path: Path) -> None:
    run(replace(LORA, steps=3), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any(name.endswith(".bin") and "model" in name for name in names)
    extra = tmp_path / "extra"
    called: list[str] = []

    class Guard(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            called.append("shaped")

    run(replace(LORA, steps=3), extra, callbacks=[Guard()])
    assert called == ["shaped"] * 3


def test_a_run_is_only_resumed_as_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        run(FULL, tmp_path / "run", resume=True)
    run(replace(FULL, steps=3), tmp_path / "run")
    (tmp_path / "run" / "record.json").unlink()
    with pytest.raises(OutputExists, match="--resume"):
        run(FULL, tmp_path / "run")
    with pytest.raises(InputError, match="belongs to another run: recipe"):
        run(FULL, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="belongs to another run: max_safety was 6 and is 5"):
        run(replace(FULL, steps=3), tmp_path / "run", resume=True, options=replace(SMALL, max_safety=5))


@pytest.fixture(scope="module")
def lora_model() -> Any:
    return with_lora(open_model("demo:tiny", device="cpu"), LORA.lora, 0).loaded.model


def test_a_checkpoint_of_weights_alone_is_not_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="saved without its optimiser"):
        check_optimizer(tmp_path)
    (tmp_path / "optimizer.pt").touch()
    check_optimizer(tmp_path)


def spoil(folder: Path, how: str, model: Any) -> None:
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    if how == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
        return
    if how == "nothing":
        return
    model.save_pretrained(folder)
    weights = load_file(file)
    name = sorted(weights)[0]
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return
    if how == "shape":
        weights[name] = torch.zeros(3, 5)
    if how == "architecture":
        weights = {key.replace("q_proj", "c_attn"): value for key, value in weights.items()}
    if how == "missing":
        del weights[name]
    save_file(weights, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged or cut off"),
        ("shape", r"lora_A.weight is \(3, 5\), expected \(4, 64\)"),
        ("architecture", "is of another model: it has .*c_attn"),
        ("missing", r"incomplete: .*lora_A.weight is missing \(1 such"),
        ("pickle", "only pickle files, which run code"),
        ("nothing", "holds no weights"),
    ],
)
def test_bad_checkpoints_are_told(tmp_path: Path, lora_model: Any, how: str, message: str) -> None:
    spoil(tmp_path / "checkpoint-3", how, lora_model)
    with pytest.raises(ModelError, match=message):
        check_checkpoint(tmp_path / "checkpoint-3", lora_model)


def test_a_good_checkpoint_passes_with_tied_weights_too(tmp_path: Path, lora_model: Any, make_llama: Any) -> None:
    lora_model.save_pretrained(tmp_path / "lora")
    check_checkpoint(tmp_path / "lora", lora_model)
    for tied in (False, True):
        model = make_llama(tied=tied)
        model.save_pretrained(tmp_path / f"full-{tied}")
        check_checkpoint(tmp_path / f"full-{tied}", model)
    with pytest.raises(ModelError, match="another model"):
        check_checkpoint(tmp_path / "full-True", lora_model)


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((3, {"global_step": 3}), (6, {"global_step": 6}), (9, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(json.dumps(state))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert last_checkpoint(tmp_path / "checkpoint-3") is None


def test_every_field_of_the_recipe_reaches_the_trainer(tmp_path: Path) -> None:
    given = {
        "learning_rate": 3e-4, "max_steps": 12, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "optim": "adamw_torch_fused", "weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95, "dataloader_drop_last": True, "data_seed": 5, "logging_steps": 7, "save_steps": 4,
        "bf16": True, "max_length": 99, "lora": {"r": 4},
    }  # fmt: skip
    fields = arguments_of(recipe_of(given), given, tmp_path, torch.device("cpu"))
    for key, value in given.items():
        if key not in ("max_length", "lora"):
            assert fields[key] == value, key
    assert not {"max_length", "lora"} & fields.keys()
    other = arguments_of(replace(recipe_of(given), batch_size=5, optimizer="sgd"), given, tmp_path, torch.device("cpu"))
    assert (other["per_device_train_batch_size"], other["gradient_accumulation_steps"]) == (5, 1)
    assert other["optim"] == "sgd"


def test_a_field_the_trainer_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the trainer refuses the recipe"):
        run(replace(FULL, steps=1), tmp_path / "run", arguments={"save_strategy": "sometimes"})
