"""Run the demo's recipes for real and put the measured curves beside the forecasts.

Run: python benchmarks/check_forecast.py DEMO_FOLDER [--kept] [REGIME-SET ...]

For every assessment in DEMO_FOLDER (as `tiltmeter demo` leaves it) the recipe is run with torch's own AdamW on the
whole tuning set, shuffled with the recipe's seed, and margin and KL are measured on the same safety prompts at the
forecast's steps. One JSON a run goes to benchmarks/results/check/. With --kept the runs that are there are not run
again: they are only laid beside the forecasts of DEMO_FOLDER, which must speak of the same steps and aligned model.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltmeter.jobs.demo import MODEL, OPTIONS, RECIPES, SAFETY
from tiltmeter.jobs.inputs import open_model, open_rows
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.subject import Subject, measure_subject, with_lora
from tiltmeter.lm.conversation import batches, encode
from tiltmeter.lm.forward import negative_log_likelihood
from tiltmeter.store import read_record, write_text

RESULTS = Path(__file__).parent / "results" / "check"
SHOWN = ("margin", "margin_change", "safety_kl")


def train(subject: Subject, record: dict[str, Any], regime: str) -> dict[str, list[float]]:
    """Run the recipe; margin and KL at the forecast's steps."""
    recipe = RECIPES[regime]
    rows = open_rows(record["tuning"]["name"]).rows
    tokenizer = subject.loaded.tokenizer
    examples = encode(rows, tokenizer, min(OPTIONS.max_length, recipe.max_length)).examples
    forward = subject.forward
    parameters = list(forward.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    measured: dict[str, list[float]] = {"margin": [], "safety_kl": [], "task_loss": []}
    rates = recipe.clock().rates.tolist()
    for step, rate in enumerate(rates, 1):
        if len(order) < recipe.batch_size:
            order = torch.randperm(len(examples), generator=generator).tolist()
        chosen = [examples[order.pop()] for _ in range(recipe.batch_size)]
        count = sum(example.supervised for example in chosen)
        loss = torch.zeros(())
        for _, batch in batches(chosen, tokenizer.pad_token_id, OPTIONS.max_tokens):
            logits, labels = forward.logits(dict(forward.parameters), batch)
            loss = loss + negative_log_likelihood(logits, labels).sum() / count
        optimizer.zero_grad()
        loss.backward()
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if step in record["forecast"]["steps"]:
            measured["margin"].append(float(-subject.negative_margin.losses().mean()))
            measured["safety_kl"].append(float(subject.divergence.losses().mean()))
            measured["task_loss"].append(float(loss.detach()))
    return measured


def kept(name: str, forecast: dict[str, Any]) -> dict[str, list[float]]:
    """The curves measured in an earlier run of this recipe."""
    held = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    same = math.isclose(held["anchor_margin"], forecast["margin"]["anchor"], rel_tol=1e-5)
    if held["steps"] != forecast["steps"] or not same:
        sys.exit(f"{name}: the run that is there was measured on other prompts or steps; leave --kept out")
    measured: dict[str, list[float]] = held["measured"]
    return measured


def main() -> None:
    """Check the named assessments, or all of them."""
    again = "--kept" not in sys.argv
    given = [word for word in sys.argv[1:] if word != "--kept"]
    folder = Path(given[0])
    names = given[1:] or sorted(path.parent.name for path in folder.glob("*/record.json"))
    for name in names:
        regime = name.partition("-")[0]
        record, _ = read_record(folder / name)
        forecast = record["forecast"]
        if again:
            torch.manual_seed(record["seed"])
            opened = with_lora(open_model(MODEL), RECIPES[regime].lora, record["seed"])
            subject = measure_subject(
                opened, open_rows(SAFETY), RECIPES[regime].lora, replace(OPTIONS, seed=record["seed"])
            )
        found = train(subject, record, regime) if again else kept(name, forecast)
        predicted = {key: {k: forecast[key][k] for k in ("value", "low", "high")} for key in SHOWN}
        out = {
            **provenance("cpu"),
            "name": name,
            "steps": forecast["steps"],
            "horizon_steps": forecast["horizon_steps"],
            "anchor_margin": forecast["margin"]["anchor"],
            "predicted": {**predicted, "paths": forecast["paths"]},
            "measured": found,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(RESULTS / f"{name}.json", json.dumps(out, indent=2) + "\n")
        print(name, "steps", forecast["steps"], "horizon", forecast["horizon_steps"])
        for key in ("margin", "safety_kl"):
            print(f"  {key:<10} measured  {[round(x, 5) for x in found[key]]}")
            print(f"  {'':<10} predicted {[None if x is None else round(x, 5) for x in forecast[key]['value']]}")
            for path, values in forecast["paths"].items():
                print(f"  {'':<10} {path:<9} {[round(x, 5) for x in values[key]]}", flush=True)


if __name__ == "__main__":
    main()
