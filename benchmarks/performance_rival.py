"""The Fisher subspace by alignment-risk, in its own environment: `performance.py fisher` starts this file there.

    python performance_rival.py INPUTS METHOD

INPUTS is a folder that `performance.py` wrote: a model, and tokens and labels of its examples. Prints one line of JSON.
Nothing of tiltmeter is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time

import torch
from alignment_risk.fisher import FisherConfig, FisherSubspaceAnalyzer
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

torch.set_num_threads(1)


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of -log p over supervised tokens of one sequence, as tiltmeter's score."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return -(picked * (labels != -100)).sum()


def peak_gb() -> float:
    """Largest memory this process has had, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


model = LlamaForCausalLM.from_pretrained(sys.argv[1])
batch = load_file(f"{sys.argv[1]}/batch.safetensors")
settings = FisherConfig(
    top_rank=16,
    target_explained_variance=None,
    max_parameters=10**9,
    device="cpu",
    subspace_method=sys.argv[2],
)
loss(model, {name: tensor[:1] for name, tensor in batch.items()}).backward()  # kernels are chosen, gradients exist
before = peak_gb()
start = time.process_time()
found = FisherSubspaceAnalyzer(settings).analyze(model, [batch], loss)
spent = time.process_time() - start
print(
    json.dumps(
        {
            "cpu_s": spent,
            "extra_peak_gb": peak_gb() - before,
            "eigenvalues": found.fisher_eigenvalues.tolist(),
            "version": importlib.metadata.version("alignment-risk"),
        }
    )
)
