"""What one assessment of the 135 M model costs: passes counted, time, and memory stage by stage.

Run: python benchmarks/assess_cost.py [full|lora]

64 safety prompts and 64 tuning rows of at most 128 tokens, on one thread. Writes
benchmarks/results/assess-cost-REGIME.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tiltmeter.jobs.assess import assess
from tiltmeter.jobs.demo import MODEL, RECIPES
from tiltmeter.jobs.provenance import provenance
from tiltmeter.jobs.subject import Options
from tiltmeter.store import write_text

RESULTS = Path(__file__).parent / "results"
OPTIONS = Options(max_safety=64, max_tuning=64, max_length=128, response_tokens=24)


def memory(key: str) -> float:
    """A line of /proc/self/status in GB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1e6 for line in status.splitlines() if line.startswith(key + ":"))


class Stages:
    """Time and peak memory of every stage; the kernel's high-water mark is set back at each."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.name, self.began = "start", time.perf_counter()

    def __call__(self, stage: str) -> None:
        """End the stage before, and begin this one."""
        seconds = round(time.perf_counter() - self.began, 1)
        row = {"stage": self.name, "seconds": seconds, "peak_gb": memory("VmHWM"), "after_gb": memory("VmRSS")}
        self.done.append(row)
        print(row, flush=True)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.name, self.began = stage, time.perf_counter()


def main() -> None:
    """Assess once."""
    regime = sys.argv[1] if len(sys.argv) > 1 else "full"
    torch.set_num_threads(1)
    stages = Stages()
    result = assess(MODEL, "demo:strongreject", "demo:gsm8k", RECIPES[regime], OPTIONS, report=stages)
    stages("end")
    out = {
        **provenance("cpu"),
        "threads": 1,
        "regime": regime,
        "options": result.record["options"],
        "supervised_and_context_tokens": result.record["cost"]["data_tokens"],
        "peak_gb": max(row["peak_gb"] for row in stages.done),
        "cost": {k: v for k, v in result.record["cost"].items() if k != "peak_memory_gb"},
        "stages": stages.done,
        "verdict": result.record["verdict"],
    }
    write_text(RESULTS / f"assess-cost-{regime}.json", json.dumps(out, indent=2) + "\n")
    print(json.dumps(out["cost"], indent=1), out["peak_gb"])


if __name__ == "__main__":
    main()
