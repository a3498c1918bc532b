"""What the user will really run, in the words of transformers' TrainingArguments."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, get_scheduler

from tiltmeter.errors import RecipeError
from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.lm.processes import launched

#: Optimisers by the names of transformers (and torch's short ones).
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "sgd": "sgd",
}

#: Fields of TrainingArguments that bend the run and that no path knows; ignoring them would be a wrong forecast.
NO_FORECAST = ("optim_args", "label_smoothing_factor", "neftune_noise_alpha")


@dataclass(frozen=True)
class Lora:
    """A LoRA configuration, in the words of peft."""

    r: int
    alpha: float
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """A fine-tune that has not been run yet.

    Attributes:
        optimizer: "adamw" or "sgd".
        learning_rate: peak rate.
        schedule: name of a transformers schedule ("linear", "constant", "cosine", ...).
        schedule_settings: further settings of the schedule by name, as transformers' lr_scheduler_kwargs.
        warmup_steps: steps of warm-up.
        steps: optimiser steps.
        batch_size: rows per optimiser step, over devices and accumulation.
        weight_decay: decay coefficient.
        momentum: of SGD.
        betas: of Adam.
        epsilon: of Adam.
        max_grad_norm: gradient clipping; 0 for none.
        max_length: rows are cut to so many tokens.
        lora: LoRA, or None for full fine-tuning.
        seed: of the run.
    """

    optimizer: str = "adamw"
    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup_steps: int = 0
    steps: int = 100
    batch_size: int = 8
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_length: int = 1024
    lora: Lora | None = None
    seed: int = 42
    schedule_settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise RecipeError(
                f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(sorted(OPTIMIZERS))}. "
                "Other update rules have no forecast yet; assess with the nearest of these."
            )
        object.__setattr__(self, "optimizer", OPTIMIZERS[self.optimizer])
        for name in ("learning_rate", "epsilon"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RecipeError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("steps", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (0 <= self.momentum < 1 and all(0 <= beta < 1 for beta in self.betas)):
            raise RecipeError(f"momentum and betas must be in [0, 1), got {self.momentum} and {self.betas}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise RecipeError(f"{name} must be a number and not negative, got {getattr(self, name)}")
        if self.lora is not None and (self.lora.r < 1 or not 0 < self.lora.alpha < math.inf):
            raise RecipeError(f"LoRA rank and alpha must be positive, got {self.lora.r} and {self.lora.alpha}")

    @property
    def metric(self) -> Adam | Sgd:
        """The optimiser near the anchor."""
        if self.optimizer == "sgd":
            return Sgd(self.momentum, weight_decay=self.weight_decay)
        return Adam(self.betas, self.epsilon, self.weight_decay)

    def clock(self) -> Clock:
        """Learning rate of every step, from transformers' own schedule.

        Raises:
            RecipeError: unknown schedule, or one that cannot be told beforehand.
        """
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        rates = []
        try:
            scheduler = get_scheduler(
                self.schedule,
                optimizer,
                num_warmup_steps=self.warmup_steps,
                num_training_steps=self.steps,
                scheduler_specific_kwargs=dict(self.schedule_settings),
            )
            for _ in range(self.steps):
                rates.append(float(optimizer.param_groups[0]["lr"]))
                optimizer.step()
                scheduler.step()
        except ValueError as error:
            raise RecipeError(f"unknown learning-rate schedule {self.schedule!r}: {error}") from error
        except TypeError as error:  # it follows the measured loss, or needs lr_scheduler_kwargs
            raise RecipeError(f"the schedule {self.schedule!r} cannot be told beforehand: {error}") from error
        return Clock(torch.tensor(rates, dtype=torch.float64))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record; adds `regime`."""
        out = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "lora"}
        lora = None if self.lora is None else {"r": self.lora.r, "alpha": self.lora.alpha, "targets": self.lora.targets}
        out |= {"betas": list(self.betas), "schedule_settings": dict(self.schedule_settings)}
        return {**out, "regime": "full" if lora is None else "lora", "lora": lora}


def read_recipe(path: str | Path, rows: int | None = None) -> Recipe:
    """Read a YAML file of TrainingArguments, as a trainer script takes them, with an optional section `lora`.

    Args:
        path: the file. Section `lora` takes peft's `r`, `lora_alpha` and `target_modules`; `max_length` is TRL's.
        rows: size of the tuning set, to turn epochs into steps.

    Raises:
        RecipeError: the file is missing or malformed, a key is unknown, or epochs are given without `rows`.
    """
    return recipe_of(read_arguments(path), rows)


def read_arguments(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file of TrainingArguments, as they stand there.

    Raises:
        RecipeError: the file is missing or malformed.
    """
    file = Path(path)
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {file} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {file} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"the recipe {file} must be a mapping of TrainingArguments, got {type(loaded).__name__}")
    return loaded


def recipe_of(given: Mapping[str, Any], rows: int | None = None) -> Recipe:
    """A recipe from TrainingArguments fields; what is not given has transformers' own default.

    `per_device_train_batch_size` counts the rows of each process, as it does for the trainer: a job that was launched
    in several speaks of a run in as many.

    Raises:
        RecipeError: as for `read_recipe`.
    """
    known = {field.name: field.default for field in fields(TrainingArguments)}
    ours = {"lora", "max_length", "momentum"}
    for key in given:
        if key not in known and key not in ours:
            near = difflib.get_close_matches(str(key), [*known, *ours], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"unknown key {key!r} in the recipe: expected fields of TrainingArguments or `lora`{hint}"
            )
    for key in NO_FORECAST:
        if given.get(key):
            raise RecipeError(f"{key} changes the run in a way that has no forecast yet; assess without it")
    args = {**known, **given}
    try:
        batch = launched() * int(args["per_device_train_batch_size"]) * int(args["gradient_accumulation_steps"])
        steps = _steps(args, rows)
        warmup = float(args["warmup_steps"] or 0)
        recipe = Recipe(
            optimizer=str(getattr(args["optim"], "value", args["optim"])) if "optim" in given else "adamw",
            learning_rate=float(args["learning_rate"]),
            schedule=str(getattr(args["lr_scheduler_type"], "value", args["lr_scheduler_type"])),
            # transformers reads a warm-up below one as a share of all steps
            warmup_steps=math.ceil(warmup * steps) if 0 < warmup < 1 else int(warmup),
            steps=steps,
            batch_size=batch,
            weight_decay=float(args["weight_decay"]),
            betas=(float(args["adam_beta1"]), float(args["adam_beta2"])),
            epsilon=float(args["adam_epsilon"]),
            max_grad_norm=float(args["max_grad_norm"] or 0),
            momentum=float(given.get("momentum", 0.0)),
            max_length=int(given.get("max_length", 1024)),
            seed=int(args["seed"]),
            schedule_settings=_settings(given.get("lr_scheduler_kwargs")),
        )
        return recipe if given.get("lora") is None else replace(recipe, lora=_lora(given["lora"]))
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"a value in the recipe is not a number: {error}") from error


def _settings(given: Any) -> tuple[tuple[str, Any], ...]:
    if not given:
        return ()
    if not isinstance(given, Mapping) or not all(isinstance(v, (str, int, float, bool)) for v in given.values()):
        raise RecipeError(f"lr_scheduler_kwargs must map names of settings to numbers or words, got {given!r}")
    return tuple(sorted((str(key), value) for key, value in given.items()))


def _steps(args: Mapping[str, Any], rows: int | None) -> int:
    """Optimiser steps as the Trainer counts them: the last batch of an epoch may be smaller, and is a step too."""
    if int(args["max_steps"]) > 0:
        return int(args["max_steps"])
    if rows is None:
        raise RecipeError("the recipe gives epochs, not max_steps, and the size of the tuning set is not known here")
    epochs = float(args["num_train_epochs"])
    if not epochs > 0:
        raise RecipeError(f"num_train_epochs must be positive where max_steps is not given, got {epochs}")
    batches = rows / max(1, launched() * int(args["per_device_train_batch_size"]))
    batches = math.floor(batches) if args["dataloader_drop_last"] else math.ceil(batches)
    return math.ceil(epochs * max(1, math.ceil(batches / max(1, int(args["gradient_accumulation_steps"])))))


def _lora(given: Any) -> Lora:
    if not isinstance(given, Mapping):
        raise RecipeError(f"section lora must have r, and may have lora_alpha and target_modules; got {given!r}")
    unknown = set(given) - {"r", "lora_alpha", "alpha", "target_modules", "lora_dropout", "task_type", "bias"}
    if unknown or "r" not in given:
        raise RecipeError(f"section lora must have r, and may have lora_alpha and target_modules; got {sorted(given)}")
    if given.get("lora_dropout"):
        raise RecipeError("lora_dropout changes the run in a way that has no forecast yet; give 0, or leave it out")
    targets = given.get("target_modules")
    names = None if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
    return Lora(int(given["r"]), float(given.get("lora_alpha", given.get("alpha", 2 * int(given["r"])))), names)
