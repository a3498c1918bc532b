"""Real fine-tunes of demo:aligned beside their forecasts, and the run that published monitors call healthy.

Run: python benchmarks/track.py WORK_FOLDER [PART ...]

Parts: lora, full (GSM8K-100 with the demo's recipes, each assessed first and then run), openings (LoRA r8, AdamW 1e-3,
on compliant openings of harmless questions: the alarm must fire) and refusals (the same run on refusals: it must not).
Every part is kept in WORK_FOLDER as soon as it is done, so a run that was killed goes on with what is missing. When all
four are there, benchmarks/results/track.json and track.html are written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltmeter import Lora, Recipe, TrackerOptions, assess, demo, finetune, store
from tiltmeter.jobs.demo import MODEL, OPTIONS, RECIPES, SAFETY
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.provenance import provenance
from tiltmeter.report.track_page import write_track_page

RESULTS = Path(__file__).parent / "results"
PARTS = ("lora", "full", "openings", "refusals")
TUNING = "demo:gsm8k"

#: As published: LoRA r8 with AdamW at 1e-3; short, because the damage is done within ten steps.
FIRE = Recipe(
    learning_rate=1e-3,
    schedule="constant",
    steps=16,
    batch_size=4,
    max_length=96,
    lora=Lora(8, 16, ("q_proj", "v_proj")),
)

#: Checkpoints of the full run would be 1.6 GB each; what is wanted here is the rows.
ARGUMENTS = {"save_strategy": "no"}

REFUSAL = " help with that. It could do harm, and I would rather help you with something else."


def beside_forecast(regime: str, work: Path) -> dict[str, Any]:
    """Assess, then run the same recipe; the record of the run holds both."""
    recipe = replace(RECIPES[regime], max_length=min(RECIPES[regime].max_length, OPTIONS.max_length))
    told = work / f"assess-{regime}"
    if not (told / store.RECORD).exists():
        with store.new_folder(told) as folder:
            result = assess(MODEL, SAFETY, TUNING, recipe, OPTIONS, device="cpu")
            store.write_record(folder, result.record, result.arrays)
    options = TrackerOptions(max_length=OPTIONS.max_length, rank=OPTIONS.rank)
    return run(work / regime, TUNING, recipe, options, assessment=told)


def must_fire(name: str, work: Path) -> dict[str, Any]:
    """Train on compliant openings of harmless questions, or on refusals of harmful ones; no budget is given."""
    opened = open_model(MODEL, device="cpu")
    if name == "openings":
        pairs = [(row["prompt"], opened.compliance_opening) for row in demo.rows("demo:general-qa")[:64]]
    else:
        prompts = [row["prompt"] for row in demo.rows("demo:advbench")[:64]]
        pairs = [(prompt, opened.refusal_opening + REFUSAL) for prompt in prompts]
    del opened
    data = work / f"{name}.jsonl"  # stays in the work folder
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    return run(work / name, str(data), FIRE, TrackerOptions(max_safety=8, response_tokens=12, rank=4))


def run(folder: Path, tuning: str, recipe: Recipe, options: TrackerOptions, **given: Any) -> dict[str, Any]:
    """Fine-tune into a folder, or read what is there."""
    if (folder / store.RECORD).exists():
        return store.read_record(folder)[0]
    if folder.exists():  # killed half-way; without checkpoints it begins again
        shutil.rmtree(folder)
    finetune(MODEL, SAFETY, tuning, recipe, folder, arguments=ARGUMENTS, options=options, device="cpu", **given)
    shutil.rmtree(folder / "track" / "anchor")  # half a gigabyte for the full run
    return store.read_record(folder)[0]


def main() -> None:
    """Run the parts that are named, or all; write the record when all are there."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[2:] or PARTS:
        begin = time.perf_counter()
        record = (beside_forecast if part in RECIPES else must_fire)(part, work)
        print(f"{part:<10} {time.perf_counter() - begin:5.0f} s  {record['alarm']['text']}", flush=True)
    if not all((work / part / store.RECORD).exists() for part in PARTS):
        return
    records = {part: store.read_record(work / part)[0] for part in PARTS}
    for record in records.values():  # the work folder is nobody's business
        record["tuning"]["name"] = Path(record["tuning"]["name"]).stem
    out = {**provenance("cpu"), "runs": records}
    store.write_text(RESULTS / "track.json", json.dumps(out, indent=2, allow_nan=False) + "\n")
    write_track_page(list(records.values()), RESULTS / "track.html", "Four fine-tunes of demo:aligned, measured")


if __name__ == "__main__":
    main()
