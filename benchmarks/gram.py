"""Cost of the Gram matrix of per-example gradients, in forward+backward passes over the same data.

    python benchmarks/gram.py                  print the figures
    python benchmarks/gram.py --write          and write benchmarks/results/gram.json

Every case runs in a process of its own on one thread: first what is measured, for its peak memory, then forward and
backward passes before and after a second run, for the ratio of CPU times. Tokens are random; a length of 64 has 45 to
64 of them, the last 24 supervised.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import tiltmeter
from tiltmeter.demo.models import model as embedded
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.gram import gram, gram_bytes

RESULT = Path(__file__).parent / "results" / "gram.json"
LENGTH = 64
GB = 1e9
#: Case -> examples, batches they come in, parameters, memory for factors.
CASES: dict[str, tuple[int, int, str, int]] = {
    "8 examples": (8, 1, "all", 8 * 2**30),
    "16 examples": (16, 1, "all", 8 * 2**30),
    "32 examples": (32, 1, "all", 8 * 2**30),
    "32 examples in 4 batches": (32, 4, "all", 8 * 2**30),
    "32 examples in 4 batches, 1 GiB of factors": (32, 4, "all", 2**30),
    "32 examples, gradient checkpointing": (32, 1, "checkpointing", 8 * 2**30),
    "32 examples, LoRA rank 8": (32, 1, "lora", 8 * 2**30),
}


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over supervised tokens of -log p(token), nats."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return -(chosen * (labels != -100)).sum(-1)


def random_batch(examples: int, vocabulary: int) -> Batch:
    """Right-padded random tokens."""
    tokens = torch.randint(3, vocabulary, (examples, LENGTH))
    length = torch.randint(45, LENGTH + 1, (examples, 1))
    length[0] = LENGTH
    place = torch.arange(LENGTH)
    tokens = tokens.masked_fill(place >= length, 2)
    return Batch(tokens, tokens.masked_fill((place >= length) | (place < length - 24), -100))


def peak_gb() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def prepared(case: str) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The model of a case and its trainable parameters, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    which = CASES[case][2]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(embedded("demo:base").folder, dtype=torch.float32)
    if which == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if which == "lora":
        config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, parameters


def measure(case: str) -> dict[str, Any]:
    """Figures of one case, in this process."""
    model, parameters = prepared(case)
    examples, batches, _, store = CASES[case]
    whole = random_batch(examples, model.config.vocab_size)
    step = examples // batches
    parts = [Batch(whole.tokens[i : i + step], whole.labels[i : i + step]) for i in range(0, examples, step)]

    def products() -> None:
        gram(model, parts, loss, parameters, store_bytes=store)

    def passes() -> None:
        for part in parts:
            losses = loss(model(input_ids=part.tokens, use_cache=False).logits, part.labels)
            losses.sum().backward()
        model.zero_grad()

    model(input_ids=whole.tokens[:1], use_cache=False)
    loaded = peak_gb()
    cpu_seconds(products)
    gram_peak = peak_gb() - loaded
    before, taken, after = cpu_seconds(passes), cpu_seconds(products), cpu_seconds(passes)
    return {
        "cpu_s": round(taken, 2),
        "forward_backward_cpu_s": [round(before, 2), round(after, 2)],
        "ratio": round(2 * taken / (before + after), 2),
        "extra_peak_gb": round(gram_peak, 2),
        "estimated_factors_gb": round(gram_bytes(model, whole.tokens.numel(), 24 * examples, parameters) / GB, 2),
    }


def measure_passes(case: str) -> dict[str, Any]:
    """Peak memory of plain forward+backward passes, in this process."""
    model, _ = prepared(case)
    examples, batches, _, _ = CASES[case]
    part = random_batch(examples // batches, model.config.vocab_size)
    model(input_ids=part.tokens[:1], use_cache=False)
    loaded = peak_gb()
    loss(model(input_ids=part.tokens, use_cache=False).logits, part.labels).sum().backward()
    return {"forward_backward_extra_peak_gb": round(peak_gb() - loaded, 2)}


def alone(case: str, what: str) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--what", what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure every case, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--what", choices=("gram", "passes"), default="gram")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case) if options.what == "gram" else measure_passes(options.case)))
        return
    figures = {}
    for case in CASES:
        figures[case] = alone(case, "gram") | alone(case, "passes")
        print(case, figures[case], flush=True)
    record = {
        "what": "Gram matrix of per-example gradients of SmolLM2-135M-Instruct in float32, T = 64, one thread",
        "command": "python benchmarks/gram.py --write",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            "tiltmeter": tiltmeter.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "figures": figures,
    }
    if options.write:
        RESULT.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
