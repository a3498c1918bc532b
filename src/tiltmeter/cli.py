"""The command line: parse, call one job, store, print ten lines. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tiltmeter import __version__
from tiltmeter.errors import InputError, TiltmeterError

app = typer.Typer(
    name="tiltmeter",
    help="Predict, watch and prevent the collapse of safety alignment under fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, highlight=False, soft_wrap=True)

#: Exit code when a budget is forecast or measured to be exceeded.
OVER_BUDGET = 3

#: Commands that know how to work in several processes.
PARALLEL = ("assess", "finetune")

#: Processes that a launcher started, and which of them this is.
PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if PROCESSES > 1 else 0


def main() -> None:
    """Entry point: every error that is raised on purpose becomes one line and its exit code.

    Of several processes the first speaks for all, unless something went wrong in another alone.
    """
    # PyTorch reads this once, when it first takes memory: vectors of all parameters then come in large pages, and a
    # tenth of the page faults is left
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # where it is installed, peft imports it, and it regrets on a CPU the lack of a kernel that is not used here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if RANK else sys.stdout):
            err.quiet = RANK > 0
            app()
    except TiltmeterError as error:
        err.quiet = RANK > 0 and isinstance(error, InputError)
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(" ".join(line.strip() for line in str(error).splitlines()), markup=False)
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Predict, watch and prevent the collapse of safety alignment under fine-tuning."""
    if version:
        print(f"tiltmeter {__version__}")
        raise typer.Exit
    if PROCESSES > 1 and context.invoked_subcommand not in PARALLEL:
        raise InputError(
            f"{context.invoked_subcommand} was started in {PROCESSES} processes and works in one; start it without "
            f"accelerate launch ({' and '.join(PARALLEL)} work in several)"
        )


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on stderr that follows the counted passes; yields an object with `report`, `announce` and `listener`."""
    from tiltmeter.commands import Ticker

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    shown = err.is_terminal  # elsewhere a bar is only an empty line
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True, disable=not shown) as progress:
        yield Ticker(progress, err)


@app.command()
def assess(
    model: Annotated[str, typer.Argument(help="Aligned model: hub id, folder, .gguf, adapter folder or demo:NAME.")],
    safety: Annotated[str, typer.Option(help="Safety prompts: file, hub id or demo:NAME.")],
    tuning: Annotated[str, typer.Option(help="Tuning data: file, hub id or demo:NAME.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for record, arrays and page.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML of TrainingArguments, with an optional section lora.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimiser step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Learning-rate schedule, as transformers names it.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA rank; full fine-tuning without it.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha; twice the rank by default.")] = None,
    lora_target: Annotated[list[str] | None, typer.Option(help="LoRA target modules; repeat the option.")] = None,
    max_safety: Annotated[int, typer.Option(help="Most safety prompts to use.")] = 32,
    max_tuning: Annotated[int, typer.Option(help="Most tuning rows to use.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longest sequence, tokens.")] = 512,
    response_tokens: Annotated[int, typer.Option(help="Length of the model's own answers.")] = 24,
    rank: Annotated[int, typer.Option(help="Sensitive directions to keep.")] = 8,
    score: Annotated[str, typer.Option(help="response, sampled, margin or gauss-newton.")] = "response",
    grid: Annotated[int, typer.Option(help="Steps at which the forecast is evaluated.")] = 5,
    looks: Annotated[int, typer.Option(help="Gradients that the rehearsal of the run measures.")] = 16,
    rehearsal_rows: Annotated[int, typer.Option(help="Tuning rows for all of these, at least.")] = 64,
    curved: Annotated[bool, typer.Option(help="Follow the curved path too.")] = False,
    krylov: Annotated[int, typer.Option(help="Hessian products for SGD's Krylov path.")] = 0,
    coupling: Annotated[bool, typer.Option(help="Measure gamma; the forecast does without it.")] = True,
    forecast_only: Annotated[
        bool, typer.Option("--forecast-only", help="Leave out what the forecast does without: about half the cost.")
    ] = False,
    screen: Annotated[
        bool, typer.Option("--screen", help="A forecast without interval and horizon, for a fraction of the cost.")
    ] = False,
    memory: Annotated[str | None, typer.Option(help="Largest memory to take, such as 6GB.")] = None,
    budget_kl: Annotated[float | None, typer.Option(help="Exit 3 if safety KL is forecast to exceed this.")] = None,
    budget_margin: Annotated[float | None, typer.Option(help="Exit 3 if the mean margin falls below this.")] = None,
    budget_refusal: Annotated[float | None, typer.Option(help="Exit 3 if the refusal rate falls below this.")] = None,
    refusal_opening: Annotated[str | None, typer.Option(help="How a refusal of this model begins.")] = None,
    compliance_opening: Annotated[str | None, typer.Option(help="How a compliant answer begins.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder to merge into the model first.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64, nf4 (LoRA only) or auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of LoRA's start and of all sampling.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that a hub model brings along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout and nothing else.")] = False,
) -> None:
    """Tell, before any training, how fast a data set will wear down a model's safety, and how sure that is."""
    from tiltmeter import commands

    given = {
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "schedule": schedule,
        "momentum": momentum,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_target": lora_target,
    }
    options = commands.options(
        score=score,
        max_safety=max_safety,
        max_tuning=max_tuning,
        max_length=max_length,
        response_tokens=response_tokens,
        rank=rank,
        grid=grid,
        looks=looks,
        rehearsal_rows=rehearsal_rows,
        curved=curved,
        krylov=krylov,
        coupling=coupling,
        forecast_only=forecast_only,
        screen=screen,
        memory_gb=commands.gigabytes(memory),
        budget_kl=budget_kl,
        budget_margin=budget_margin,
        budget_refusal=budget_refusal,
        refusal_opening=refusal_opening,
        compliance_opening=compliance_opening,
        seed=seed,
    )
    loading = {"adapter": adapter, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    with progress_bar() as ticker:
        result, folder = commands.assess(model, safety, tuning, recipe, given, options, loading, out, ticker)
    if as_json:
        print(json.dumps(result.record, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in commands.lines(result.record):
            print(line)
        if folder is not None:
            err.print(f"record and page: {folder / 'index.html'}", markup=False)
    if result.over_budget:
        raise typer.Exit(OVER_BUDGET)


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="Aligned model: hub id, folder, .gguf, adapter folder or demo:NAME.")],
    safety: Annotated[str, typer.Option(help="Safety prompts: file, hub id or demo:NAME.")],
    tuning: Annotated[str, typer.Option(help="Tuning data: file, hub id or demo:NAME.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("finetune-output"),
    recipe: Annotated[
        Path | None, typer.Option(help="YAML of TrainingArguments, with an optional section lora.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; three epochs by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimiser step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Learning-rate schedule, as transformers names it.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA rank; full fine-tuning without it.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha; twice the rank by default.")] = None,
    lora_target: Annotated[list[str] | None, typer.Option(help="LoRA target modules; repeat the option.")] = None,
    trainer: Annotated[str, typer.Option(help="transformers or trl.")] = "transformers",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    assessment: Annotated[Path | None, typer.Option(help="Assessment of this run, to lay beside it.")] = None,
    max_safety: Annotated[int | None, typer.Option(help="Most safety prompts to measure.")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="Length of the model's own answers.")] = None,
    rank: Annotated[int | None, typer.Option(help="Directions of the safety subspace; 0 for none.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between measurements; by default chosen by cost.")] = None,
    refusal_every: Annotated[int | None, typer.Option(help="Judge answers at every n-th measurement.")] = None,
    refresh_every: Annotated[int | None, typer.Option(help="Subspace again at every n-th measurement.")] = None,
    commutator_every: Annotated[
        int | None, typer.Option(help="Exchange a safety step and a task step at every n-th measurement.")
    ] = None,
    budget_kl: Annotated[
        float | None, typer.Option(help="Exit 3 if safety KL exceeds this; the limit of --guard budget.")
    ] = None,
    budget_margin: Annotated[float | None, typer.Option(help="Exit 3 if the mean margin falls below this.")] = None,
    budget_refusal: Annotated[float | None, typer.Option(help="Exit 3 if the refusal rate falls below this.")] = None,
    stop_on_budget: Annotated[bool, typer.Option("--stop-on-budget", help="Stop when the alarm fires.")] = False,
    guard: Annotated[str | None, typer.Option(help="Keep safety while training: budget, replay, ... (docs).")] = None,
    guard_strength: Annotated[float | None, typer.Option(help="Strength of the guard; 0 is off.")] = None,
    guard_base: Annotated[str | None, typer.Option(help="Model before alignment, for safe_lora and lox.")] = None,
    guard_tokens: Annotated[int, typer.Option(help="Tokens of each aligned answer that the guard looks at.")] = 24,
    guard_opening: Annotated[
        int | None,
        typer.Option(
            help="The guard's KL is that of so many first tokens where more; by default 3 for budget, else 0."
        ),
    ] = None,
    refusal_opening: Annotated[str | None, typer.Option(help="How a refusal of this model begins.")] = None,
    compliance_opening: Annotated[str | None, typer.Option(help="How a compliant answer begins.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder to merge into the model first.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64, nf4 (LoRA only) or auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of LoRA's start; that of the run is in the recipe.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that a hub model brings along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout and nothing else.")] = False,
) -> None:
    """Fine-tune for real, and measure at every turn what becomes of the model's safety."""
    from tiltmeter import commands_finetune as commands

    given = {
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "schedule": schedule,
        "momentum": momentum,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_target": lora_target,
    }
    tracking = {
        "max_safety": max_safety,
        "response_tokens": response_tokens,
        "rank": rank,
        "every": every,
        "refusal_every": refusal_every,
        "refresh_every": refresh_every,
        "commutator_every": commutator_every,
    }
    running = {
        "trainer": trainer,
        "resume": resume,
        "assessment": assessment,
        "stop_on_budget": stop_on_budget,
        "guard": None if guard is None else (guard, guard_strength, guard_base, guard_tokens, guard_opening),
        "refusal_opening": refusal_opening,
        "compliance_opening": compliance_opening,
        "adapter": adapter,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    limits = {"kl": budget_kl, "margin": budget_margin, "refusal": budget_refusal}
    with progress_bar() as ticker, results_only():
        result = commands.finetune(model, safety, tuning, recipe, given, tracking, limits, running, out, ticker)
    if RANK > 0:  # the main process alone has measured
        return
    if as_json:
        print(json.dumps(result.record, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in commands.lines(result.record):
            print(line)
        err.print(f"run, model and page: {out / 'index.html'}", markup=False)
    if result.over_budget:
        raise typer.Exit(OVER_BUDGET)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model: hub id, folder, .gguf, adapter folder or demo:NAME.")],
    safety: Annotated[str, typer.Option(help="Prompts to be refused: file, hub id or demo:NAME.")],
    harmless: Annotated[str | None, typer.Option(help="Prompts to be answered.")] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="Ability set (accuracy with choices, else perplexity); repeat the option.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model before tuning, to compare with.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for record, arrays and page.")] = None,
    judge: Annotated[str, typer.Option(help="rules, an address (https://host/v1) or a classifier's id.")] = "rules",
    judge_model: Annotated[str | None, typer.Option(help="Name of the judge model at the address.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    judge_requests: Annotated[int, typer.Option(help="Most requests to the address.")] = 2000,
    judge_tokens: Annotated[int, typer.Option(help="Most tokens at the address.")] = 2_000_000,
    judge_timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 60.0,
    judge_label: Annotated[str | None, typer.Option(help="Label of the classifier to read.")] = None,
    judge_means: Annotated[str | None, typer.Option(help="What that label means: refusal or harm.")] = None,
    max_safety: Annotated[int, typer.Option(help="Most safety prompts.")] = 64,
    max_harmless: Annotated[int, typer.Option(help="Most harmless prompts.")] = 64,
    max_capability: Annotated[int, typer.Option(help="Most rows of each ability set.")] = 100,
    response_tokens: Annotated[int, typer.Option(help="Length of answers.")] = 40,
    max_length: Annotated[int, typer.Option(help="Longest sequence, tokens.")] = 512,
    refusal_opening: Annotated[str | None, typer.Option(help="How a refusal of this model begins.")] = None,
    compliance_opening: Annotated[str | None, typer.Option(help="How a compliant answer begins.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder to merge into the model first.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64, nf4 (LoRA only) or auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that a hub model brings along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout and nothing else.")] = False,
) -> None:
    """Measure what a model refuses, what it wrongly refuses, and what it can do; and the change from a base."""
    from tiltmeter import commands_evaluate as commands

    options = commands.EvaluateOptions(
        max_safety=max_safety,
        max_harmless=max_harmless,
        max_capability=max_capability,
        response_tokens=response_tokens,
        max_length=max_length,
        seed=seed,
    )
    judging: dict[str, Any] = {
        "model": judge_model,
        "key_variable": judge_key_env,
        "requests": judge_requests,
        "tokens": judge_tokens,
        "timeout": judge_timeout,
        "label": judge_label,
        "means": judge_means,
    }
    given = {
        "safety": safety,
        "harmless": harmless,
        "capability": capability or [],
        "base": base,
        "refusal_opening": refusal_opening,
        "compliance_opening": compliance_opening,
        "adapter": adapter,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    with progress_bar() as ticker, results_only():
        chosen = commands.judge_of(judge, **judging)
        result = commands.evaluate(model, given, options, chosen, out, ticker)
    _show(result.record, commands.evaluation_lines, as_json, out)


@app.command()
def audit(
    base: Annotated[str, typer.Argument(help="Aligned model before tuning: folder, hub id, adapter or demo:NAME.")],
    tuned: Annotated[str, typer.Argument(help="Model after tuning, or the adapter that was trained.")],
    safety: Annotated[str, typer.Option(help="Prompts to be refused: file, hub id or demo:NAME.")],
    harmless: Annotated[str | None, typer.Option(help="Prompts to be answered.")] = None,
    unaligned: Annotated[str | None, typer.Option(help="Model before its alignment, for the LoX ratio.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for record, arrays and page.")] = None,
    max_safety: Annotated[int, typer.Option(help="Most safety prompts.")] = 32,
    max_harmless: Annotated[int, typer.Option(help="Most harmless prompts.")] = 32,
    response_tokens: Annotated[int, typer.Option(help="Length of answers.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longest sequence, tokens.")] = 512,
    rank: Annotated[int, typer.Option(help="Directions of the safety subspace; 0 leaves the overlap out.")] = 8,
    top: Annotated[int, typer.Option(help="Leading singular directions of every matrix.")] = 10,
    threshold: Annotated[float, typer.Option(help="Cosine below which a direction is an intruder.")] = 0.6,
    alpha: Annotated[list[float] | None, typer.Option(help="Point of the scaling curve; repeat the option.")] = None,
    localise: Annotated[bool, typer.Option("--localise/--no-localise", help="Put back every layer by itself.")] = True,
    budget_kl: Annotated[float | None, typer.Option(help="Exit 3 if safety KL exceeds this.")] = None,
    refusal_opening: Annotated[str | None, typer.Option(help="How a refusal of the base begins.")] = None,
    compliance_opening: Annotated[str | None, typer.Option(help="How a compliant answer begins.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that a hub model brings along.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout and nothing else.")] = False,
) -> None:
    """Tell, after a fine-tune, what it did to the base's safety, and in which layers."""
    from tiltmeter import commands_evaluate as commands

    options = commands.AuditOptions(
        max_safety=max_safety,
        max_harmless=max_harmless,
        response_tokens=response_tokens,
        max_length=max_length,
        rank=rank,
        top=top,
        threshold=threshold,
        alphas=tuple(alpha) if alpha else commands.AuditOptions.alphas,
        localise=localise,
        budget_kl=budget_kl,
        seed=seed,
    )
    given = {
        "safety": safety,
        "harmless": harmless,
        "unaligned": unaligned,
        "refusal_opening": refusal_opening,
        "compliance_opening": compliance_opening,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    with progress_bar() as ticker, results_only():
        result = commands.audit(base, tuned, given, options, commands.judge_of("rules"), out, ticker)
    _show(result.record, commands.audit_lines, as_json, out)
    if result.over_budget:
        raise typer.Exit(OVER_BUDGET)


def _show(record: Any, lines_of: Any, as_json: bool, out: Path | None) -> None:
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    for line in lines_of(record):
        print(line)
    if out is not None:
        err.print(f"record and page: {out / 'index.html'}", markup=False)


@contextmanager
def results_only() -> Iterator[None]:
    """Send to stderr what trainers print: stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield


@app.command()
def rank(
    model: Annotated[str, typer.Argument(help="Aligned model: hub id, folder, .gguf, adapter folder or demo:NAME.")],
    safety: Annotated[str, typer.Option(help="Safety prompts: file, hub id or demo:NAME.")],
    tuning: Annotated[list[str], typer.Option(help="Tuning data; repeat the option for every set.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for record, arrays and page.")] = None,
    per_example: Annotated[bool, typer.Option("--per-example", help="Rank the rows of one set instead.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --per-example: write the set without its worst rows.")
    ] = None,
    drop: Annotated[float, typer.Option(help="Share of rows that --write leaves out.")] = 0.1,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML of TrainingArguments, with an optional section lora.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimiser step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Learning-rate schedule, as transformers names it.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA rank; full fine-tuning without it.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="LoRA alpha; twice the rank by default.")] = None,
    lora_target: Annotated[list[str] | None, typer.Option(help="LoRA target modules; repeat the option.")] = None,
    max_safety: Annotated[int, typer.Option(help="Most safety prompts to use.")] = 32,
    max_tuning: Annotated[int, typer.Option(help="Most rows of each set to use; --per-example uses all.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longest sequence, tokens.")] = 512,
    response_tokens: Annotated[int, typer.Option(help="Length of the model's own answers.")] = 24,
    rank: Annotated[int, typer.Option(help="Sensitive directions to keep.")] = 8,
    score: Annotated[str, typer.Option(help="response, sampled, margin or gauss-newton.")] = "response",
    grid: Annotated[int, typer.Option(help="Steps at which the forecast is evaluated.")] = 5,
    looks: Annotated[int, typer.Option(help="Gradients that the rehearsal of the run measures.")] = 16,
    rehearsal_rows: Annotated[int, typer.Option(help="Tuning rows for all of these, at least.")] = 64,
    forecast_only: Annotated[
        bool, typer.Option("--forecast-only", help="Leave out what the forecast does without: about half the cost.")
    ] = False,
    screen: Annotated[
        bool, typer.Option("--screen", help="Forecasts without intervals and horizons, for a fraction of the cost.")
    ] = False,
    refusal_opening: Annotated[str | None, typer.Option(help="How a refusal of this model begins.")] = None,
    compliance_opening: Annotated[str | None, typer.Option(help="How a compliant answer begins.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder to merge into the model first.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, float64, nf4 (LoRA only) or auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of LoRA's start and of all sampling.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that a hub model brings along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout and nothing else.")] = False,
) -> None:
    """Order tuning sets, or the rows of one, by the harm they are predicted to do."""
    from tiltmeter import commands, commands_rank

    given = {
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "schedule": schedule,
        "momentum": momentum,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_target": lora_target,
    }
    options = commands.options(
        score=score,
        max_safety=max_safety,
        max_tuning=max_tuning,
        max_length=max_length,
        response_tokens=response_tokens,
        rank=rank,
        grid=grid,
        looks=looks,
        rehearsal_rows=rehearsal_rows,
        forecast_only=forecast_only,
        screen=screen,
        refusal_opening=refusal_opening,
        compliance_opening=compliance_opening,
        seed=seed,
    )
    loading = {"adapter": adapter, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    rows = (per_example, write, drop)
    with progress_bar() as ticker:
        result, left = commands_rank.rank(model, safety, tuning, recipe, given, options, loading, rows, out, ticker)
    if as_json:
        print(json.dumps(result.record, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in commands_rank.lines(result.record):
            print(line)
    if left is not None:
        err.print(f"left out {left} rows; the others are in {write}", markup=False)
    if out is not None:
        err.print(f"record and page: {out / 'index.html'}", markup=False)


@app.command()
def validate(
    plan: Annotated[Path, typer.Argument(help="YAML plan: model, prompts, sets, seeds, recipes.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the validation; finished cells in it are kept.")],
    limit: Annotated[int | None, typer.Option(help="Run at most so many cells now.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of earlier runs of the plan; only foretell again.")] = None,
    workers: Annotated[int | None, typer.Option(help="Run cells in so many processes on Ray (extra ray).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary on stdout and nothing else.")] = False,
) -> None:
    """Put the forecasts on trial: assess, fine-tune for real, compare, over many sets; goes on where it was stopped."""
    from tiltmeter import commands_validate as commands

    with progress_bar() as ticker, results_only():
        result = commands.validate(plan, out, limit, runs, workers, ticker)
    if as_json:
        print(json.dumps(result.record, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in commands.lines(result.record):
            print(line)
        err.print(f"summary and page: {out / 'index.html'}", markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("demo-output"),
    listing: Annotated[bool, typer.Option("--list", help="List the embedded models and data sets.")] = False,
    fetch: Annotated[bool, typer.Option("--fetch", help="Only download models and data.")] = False,
    full: Annotated[bool, typer.Option("--full/--no-full", help="Assess full fine-tuning besides LoRA.")] = True,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Run again though the results are there.")] = False,
) -> None:
    """Assess the embedded model on three real tuning sets; or list or fetch what is embedded."""
    from tiltmeter import commands_catalogue

    if listing:
        for line in commands_catalogue.catalogue_lines():
            print(line)
        return
    if fetch:
        print(f"models and data are in {commands_catalogue.fetch_demo()}")
        return
    from tiltmeter import commands_demo as commands

    with progress_bar() as ticker:
        page, lines = commands.demo(out, full, seed, force, ticker)
    for line in lines:
        print(line)
    print(f"page: {page}")


@app.command()
def theory(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the record.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout and nothing else.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random systems.")] = 0,
) -> None:
    """Check every claim of the theory on systems solved by hand."""
    from tiltmeter import commands_theory as commands

    check, folder = commands.theory(seed, out)
    if as_json:
        print(json.dumps(check.record(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in check.lines():
            print(line)
        if folder is not None:
            print(f"record: {folder / 'record.json'}")
    if not all(claim.holds for claim in check.claims):
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Result folders.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Page to write; .md gives a model-card snippet.")],
    title: Annotated[str, typer.Option(help="Title of the page.")] = "tiltmeter",
) -> None:
    """Put stored results on one self-contained page, or into Markdown for a model card."""
    from tiltmeter import commands_report as commands

    if out.exists():
        raise InputError(f"{out} exists already; give another name, results are never overwritten")
    commands.report(folders, out, title)
    print(f"wrote {out}")
