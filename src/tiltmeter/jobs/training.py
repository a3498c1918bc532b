"""The one place that starts a trainer: transformers' own, or TRL's, on the rows and the recipe that assess reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tiltmeter.errors import InputError, RecipeError
from tiltmeter.jobs.checkpoints import DIVIDED_OPTIMIZER, OPTIMIZER, SCHEDULER
from tiltmeter.jobs.recipe import OPTIMIZERS, Recipe
from tiltmeter.lm.conversation import Example, collate
from tiltmeter.lm.model import Loaded
from tiltmeter.lm.processes import largest_of_all, launched
from tiltmeter.lm.sharding import let_go, split_like, whole

TrainerName = Literal["transformers", "trl"]

#: Keys of a recipe file that are not fields of TrainingArguments.
OURS = ("lora", "max_length", "momentum")

#: Checkpoints of a run whose recipe does not say when to save.
CHECKPOINTS = 4


@dataclass(frozen=True)
class Collator:
    """Rows side by side, padded on the right, as everywhere in tiltmeter.

    Attributes:
        pad_id: token to pad with; never looked at.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Token ids, attention mask and labels, [b, T]."""
        examples = [Example(tuple(row["input_ids"]), tuple(row["labels"]), 0) for row in rows]
        batch = collate(examples, self.pad_id)
        sizes = torch.tensor([len(example.tokens) for example in examples])
        mask = (torch.arange(batch.tokens.shape[1]) < sizes[:, None]).long()
        return {"input_ids": batch.tokens, "attention_mask": mask, "labels": batch.labels}


def arguments_of(recipe: Recipe, given: Mapping[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
    """Fields of TrainingArguments for a run.

    What the recipe holds is taken from it, so that a changed learning rate is changed here too; all other fields of the
    file go through as they are.

    Args:
        recipe: what is run.
        given: the fields of the recipe's file; empty without one.
        folder: of checkpoints and logs.
        device: where the model is.

    Raises:
        RecipeError: the rows of a step cannot be divided among the processes.
    """
    fields = {key: value for key, value in given.items() if key not in OURS}
    rows = int(fields.get("per_device_train_batch_size", 8)), int(fields.get("gradient_accumulation_steps", 1))
    if launched() * math.prod(rows) != recipe.batch_size:
        if recipe.batch_size % launched():
            raise RecipeError(
                f"{recipe.batch_size} rows a step cannot be divided among {launched()} processes; give a batch size "
                "that can, or start fewer processes"
            )
        rows = recipe.batch_size // launched(), 1
    asked = str(getattr(fields.get("optim"), "value", fields.get("optim")))
    optim = asked if OPTIMIZERS.get(asked) == recipe.optimizer else recipe.optimizer
    usual = {
        "save_strategy": "steps",
        "save_steps": max(1, math.ceil(recipe.steps / CHECKPOINTS)),
        "logging_steps": max(1, recipe.steps // 20),
        "report_to": "none",
        "disable_tqdm": True,
    }
    return {
        **usual,
        **fields,
        "output_dir": str(folder),
        "optim": "adamw_torch" if optim == "adamw" else optim,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "lr_scheduler_kwargs": dict(recipe.schedule_settings) or None,
        "warmup_steps": recipe.warmup_steps,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": rows[0],
        "gradient_accumulation_steps": rows[1],
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "adam_epsilon": recipe.epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "seed": recipe.seed,
        "remove_unused_columns": False,
        **({"use_cpu": True, "dataloader_pin_memory": False} if device.type == "cpu" else {}),
    }


def check_precision(arguments: Mapping[str, Any], device: torch.device) -> None:
    """Refuse bfloat16 where the device has none, before the trainer does so in its own words.

    Raises:
        RecipeError: says which device it is.
    """
    if arguments.get("bf16") and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RecipeError(f"the recipe asks for bf16, which {torch.cuda.get_device_name(device)} does not have")


def build_trainer(
    loaded: Loaded,
    examples: Sequence[Example],
    recipe: Recipe,
    arguments: Mapping[str, Any],
    *,
    kind: TrainerName = "transformers",
) -> Any:
    """A trainer over the tokenised rows, in the order of its own seeded sampler.

    Args:
        loaded: the model with its trainable parameters marked.
        examples: all rows of the tuning set.
        recipe: for the momentum of SGD, which TrainingArguments cannot say.
        arguments: fields of TrainingArguments.
        kind: whose trainer; both get the same tokens and masks, so they take the same steps.

    Raises:
        RecipeError: TrainingArguments refuses a field.
        InputError: TRL is asked for and not installed.
    """
    data = Dataset.from_dict(
        {"input_ids": [list(e.tokens) for e in examples], "labels": [list(e.labels) for e in examples]}
    )
    more: dict[str, Any] = {}
    if recipe.momentum:
        more["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": recipe.learning_rate, "momentum": recipe.momentum})
    given = {
        "model": loaded.model,
        "train_dataset": data,
        "data_collator": Collator(loaded.tokenizer.pad_token_id),
        "processing_class": loaded.tokenizer,
    }
    try:
        if kind == "trl":
            return _sft_trainer({**given, **more}, arguments)
        return Trainer(args=TrainingArguments(**arguments), **given, **more)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the trainer refuses the recipe: {str(error).splitlines()[0]}") from error


def _sft_trainer(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError("--trainer trl needs TRL: pip install 'tiltmeter[trl]'") from error
    plain = TrainingArguments(**arguments)
    # TRL's configuration switches on what TrainingArguments leaves off; a recipe means the same under both
    same = {name: getattr(plain, name) for name in ("bf16", "gradient_checkpointing", "logging_steps", "learning_rate")}
    config = SFTConfig(
        **{**arguments, **same},
        max_length=None,
        packing=False,
        loss_type="nll",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(args=config, **given)


class StopTogether(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends the run in all processes where one of them wants it ended, and saves where one wants that.

    Put it last. Without it the others would wait for ever for the gradients of the one that stopped.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the others."""
        control.should_training_stop = bool(largest_of_all(int(control.should_training_stop)))
        control.should_save = bool(largest_of_all(int(control.should_save)))


class KeepOptimizer(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Puts the optimiser and the schedule into every checkpoint, where the trainer refuses to.

    It does not keep them for models that were divided when they were loaded, since they might be divided too; LoRA's
    are whole. Files and format are the trainer's own, which reads them when it resumes. Random states are left out:
    dropout, where a model has any, goes on with other draws.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write them whole or not at all; the main process alone."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for name, held in ((SCHEDULER, kwargs["lr_scheduler"]), (OPTIMIZER, kwargs["optimizer"])):
            torch.save(held.state_dict(), folder / f".{name}.part")
            (folder / f".{name}.part").replace(folder / name)


class KeepDividedOptimizer(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """The same where the trained weights are divided among processes, which the trainer can neither save nor read.

    The optimiser's state is gathered tensor by tensor and kept whole; each process reads it tensor by tensor and keeps
    its part. Put it first.

    Args:
        checkpoint: to go on from, or None.
        write: whether to keep anything.
    """

    def __init__(self, checkpoint: Path | None, *, write: bool) -> None:
        self.checkpoint, self.write = checkpoint, write

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Gather in all processes, write in the main one; whole or not at all."""
        if not self.write:
            return
        let_go(kwargs["model"])
        optimizer, main = kwargs["optimizer"], state.is_world_process_zero
        held: dict[str, Tensor] = {}
        for name, p in kwargs["model"].named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                tensor = whole(torch.as_tensor(value))
                if main:
                    held[f"{name}:{key}"] = tensor.detach().cpu().contiguous()
        if not main:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(kwargs["lr_scheduler"].state_dict(), folder / f".{SCHEDULER}.part")
        (folder / f".{SCHEDULER}.part").replace(folder / SCHEDULER)
        save_file(held, folder / f".{DIVIDED_OPTIMIZER}.part")
        (folder / f".{DIVIDED_OPTIMIZER}.part").replace(folder / DIVIDED_OPTIMIZER)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read what the trainer did not: the weights it has read already."""
        if self.checkpoint is None:
            return
        let_go(kwargs["model"])
        optimizer, schedule = kwargs["optimizer"], kwargs["lr_scheduler"]
        with safe_open(self.checkpoint / DIVIDED_OPTIMIZER, "pt") as opened:
            keys: dict[str, list[str]] = {}
            for full in opened.keys():  # noqa: SIM118  # not a mapping
                name, key = full.rsplit(":", 1)
                keys.setdefault(name, []).append(key)
            # counts of steps are kept on the CPU but by these
            there = {id(p) for group in optimizer.param_groups if group.get("fused") or group.get("capturable")
                     for p in group["params"]}  # fmt: skip
            for name, p in kwargs["model"].named_parameters():
                for key in keys.get(name, ()):
                    tensor = opened.get_tensor(f"{name}:{key}")
                    if tensor.shape == p.shape:
                        tensor = split_like(tensor.to(p.device), p)
                    optimizer.state[p][key] = tensor.to(p.device) if id(p) in there else tensor
        schedule.load_state_dict(torch.load(self.checkpoint / SCHEDULER, map_location="cpu", weights_only=True))
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate


class _NothingLeft(Exception):
    """The checkpoint that a run is resumed from is that of its last step."""


class _StopAtTheEnd(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Ends a resumed run before a step that its recipe does not have: the trainer would take one."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights, optimiser and callbacks are as the checkpoint has them."""
        if state.max_steps > 0 and state.global_step >= state.max_steps:
            raise _NothingLeft


def train(trainer: Any, callbacks: Sequence[TrainerCallback], checkpoint: Path | None) -> None:
    """Run a trainer, from a checkpoint or from the start.

    Args:
        trainer: from `build_trainer`.
        callbacks: called in this order, after the trainer's own.
        checkpoint: folder to resume from.
    """
    if launched() > 1:
        callbacks = [*callbacks, StopTogether()]
    trainer.remove_callback(PrinterCallback)  # stdout is for results; reporters of the recipe still get every line
    for callback in [*callbacks, _StopAtTheEnd()]:
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except _NothingLeft:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
