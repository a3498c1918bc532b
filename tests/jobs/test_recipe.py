"""A recipe read from TrainingArguments runs as the Trainer would run it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiltmeter.errors import RecipeError
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.jobs.recipe import NO_FORECAST, Lora, Recipe, read_recipe, recipe_of

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "args.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def test_every_key_that_matters_is_read(write: Write) -> None:
    file = write(
        "output_dir: out\nper_device_train_batch_size: 3\ngradient_accumulation_steps: 4\nlearning_rate: 2e-4\n"
        "max_steps: 30\nlr_scheduler_type: cosine\nwarmup_steps: 0.1\nweight_decay: 0.01\nadam_beta1: 0.8\n"
        "adam_beta2: 0.95\nadam_epsilon: 1e-6\nmax_grad_norm: 0.5\noptim: adamw_torch\nseed: 7\nmax_length: 99\n"
        "bf16: true\nlora:\n  r: 4\n  lora_alpha: 12\n  target_modules: [q_proj, v_proj]\n"
    )
    assert read_recipe(file) == Recipe(
        optimizer="adamw", learning_rate=2e-4, schedule="cosine", warmup_steps=3, steps=30, batch_size=12,
        weight_decay=0.01, betas=(0.8, 0.95), epsilon=1e-6, max_grad_norm=0.5, max_length=99, seed=7,
        lora=Lora(4, 12.0, ("q_proj", "v_proj")),
    )  # fmt: skip
    assert read_recipe(file).metric == Adam((0.8, 0.95), 1e-6, 0.01)


def test_what_is_not_given_is_the_default_of_transformers(tmp_path: Path) -> None:
    ours, theirs = recipe_of({}, 24), TrainingArguments(output_dir=str(tmp_path), report_to=[])
    assert ours.learning_rate == theirs.learning_rate
    assert ours.schedule == theirs.lr_scheduler_type.value
    assert ours.batch_size == theirs.per_device_train_batch_size
    assert ours.betas == (theirs.adam_beta1, theirs.adam_beta2)
    assert (ours.epsilon, ours.weight_decay) == (theirs.adam_epsilon, theirs.weight_decay)
    assert (ours.max_grad_norm, ours.seed) == (theirs.max_grad_norm, theirs.seed)
    assert ours.steps == theirs.num_train_epochs * 3
    assert ours.optimizer == "adamw"
    assert ours.lora is None


def test_momentum_is_sgds() -> None:
    recipe = recipe_of({"optim": "sgd", "momentum": 0.9, "max_steps": 2, "weight_decay": 0.1})
    assert recipe.metric == Sgd(0.9, weight_decay=0.1)


def test_lora_defaults() -> None:
    assert recipe_of({"max_steps": 1, "lora": {"r": 3, "target_modules": "q_proj"}}).lora == Lora(3, 6.0, ("q_proj",))
    assert recipe_of({"max_steps": 1, "lora": {"r": 3, "alpha": 2}}).lora == Lora(3, 2.0, None)
    assert recipe_of({"max_steps": 1, "lora": None}).lora is None


BAD: dict[str, tuple[str, str]] = {
    "near miss": ("learning_rat: 1", r"'learning_rat'.*did you mean 'learning_rate'"),
    "no key of theirs": ("xqzw: 1", "unknown key 'xqzw'"),
    "a number as key": ("1: 2", "unknown key 1"),
    "optimizer": ("optim: adafactor\nmax_steps: 3", "unknown optimizer 'adafactor': expected one of adamw"),
    "negative rate": ("learning_rate: -1.0\nmax_steps: 3", "learning_rate must be a positive number"),
    "infinite rate": ("learning_rate: .inf\nmax_steps: 3", "learning_rate must be a positive number"),
    "no number": ("learning_rate: fast\nmax_steps: 3", "not a number"),
    "a list": ("learning_rate: [1]\nmax_steps: 3", "not a number"),
    "infinite steps": ("max_steps: .inf", "not a number"),
    "negative batch": ("per_device_train_batch_size: -2\nmax_steps: 3", "batch_size must be at least 1"),
    "negative decay": ("weight_decay: -0.1\nmax_steps: 3", "weight_decay must be a number and not negative"),
    "decay nan": ("weight_decay: .nan\nmax_steps: 3", "weight_decay must be a number and not negative"),
    "negative warm-up": ("warmup_steps: -1\nmax_steps: 3", "warmup_steps must be"),
    "negative clipping": ("max_grad_norm: -1\nmax_steps: 3", "max_grad_norm must be"),
    "beta": ("adam_beta1: 1.0\nmax_steps: 3", r"betas must be in \[0, 1\)"),
    "negative epochs": ("num_train_epochs: -1", "num_train_epochs must be positive"),
    "lora is a number": ("max_steps: 3\nlora: 8", "section lora must have r"),
    "lora is empty": ("max_steps: 3\nlora: {}", "section lora must have r"),
    "lora with another key": ("max_steps: 3\nlora: {r: 4, rank: 4}", "section lora must have r"),
    "lora r": ("max_steps: 3\nlora: {r: 0}", "LoRA rank and alpha must be positive"),
    "lora r is no number": ("max_steps: 3\nlora: {r: high}", "not a number"),
    "lora dropout": ("max_steps: 3\nlora: {r: 4, lora_dropout: 0.1}", "lora_dropout changes the run"),
    "not yaml": ("a: [1", "not valid YAML"),
    "a list at the top": ("- 1", "must be a mapping of TrainingArguments, got list"),
    "empty": ("", "must be a mapping of TrainingArguments, got NoneType"),
}


@pytest.mark.parametrize("case", BAD)
def test_recipes_that_cannot_be_used(write: Write, case: str) -> None:
    text, message = BAD[case]
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(text), 10)


@pytest.mark.parametrize("key", NO_FORECAST)
def test_what_no_path_knows_is_refused(key: str) -> None:
    recipe_of({key: None, "max_steps": 1})
    with pytest.raises(RecipeError, match=f"{key} changes the run"):
        recipe_of({key: 0.1, "max_steps": 1})


def test_settings_of_a_schedule_are_carried_to_it(write: Write) -> None:
    text = "max_steps: 8\nlearning_rate: 0.5\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0.1}"
    rates = read_recipe(write(text)).clock().rates
    assert_close(float(rates[0]), 0.5)
    by_hand = [0.1 + 0.4 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert_close(rates, torch.tensor(by_hand, dtype=torch.float64))
    with pytest.raises(RecipeError, match="must map names of settings"):
        recipe_of({"lr_scheduler_kwargs": [1], "max_steps": 1})
    with pytest.raises(RecipeError, match="cannot be told beforehand"):
        read_recipe(write(text.replace("min_lr: 0.1", "floor: 0.1"))).clock()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="size of the tuning set is not known"):
        recipe_of({"num_train_epochs": 2})


def test_schedules_that_are_unknown_or_follow_the_loss() -> None:
    with pytest.raises(RecipeError, match=r"unknown learning-rate schedule 'lineal'"):
        Recipe(schedule="lineal").clock()
    with pytest.raises(RecipeError, match="beforehand"):
        Recipe(schedule="reduce_lr_on_plateau").clock()


class Rates(TrainerCallback):
    """Keeps the rate that every optimiser step was made with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))


class Line(torch.nn.Module):
    """The least that a Trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": 9, "lr_scheduler_type": "linear", "warmup_steps": 3},
        {"max_steps": 9, "lr_scheduler_type": "cosine", "warmup_steps": 0.25, "optim": "sgd"},
        {"num_train_epochs": 3, "lr_scheduler_type": "constant"},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "dataloader_drop_last": True},
    ],
    ids=str,
)
def test_the_clock_is_that_of_a_real_trainer(tmp_path: Path, given: dict[str, Any]) -> None:
    """Ten rows in batches of four: the last batch of an epoch is smaller."""
    given = {"per_device_train_batch_size": 4, "learning_rate": 0.01, **given}
    rates = Rates()
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", **given,
    )  # fmt: skip
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(10)]
    Trainer(Line(), args, train_dataset=rows, callbacks=[rates]).train()
    assert_close(recipe_of(given, 10).clock().rates, torch.tensor(rates.rates, dtype=torch.float64))
