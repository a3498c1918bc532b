"""One Hessian product by another library, in an environment of its own: `performance.py peers` starts this file there.

    python performance_peers.py INPUTS LIBRARY

INPUTS is a folder that `performance.py` wrote: a model, tokens and labels of its examples, and a vector. LIBRARY is
curvlinops or hessian-eigenthings. Writes the product to INPUTS/LIBRARY.safetensors and prints one line of JSON. Nothing
of tiltmeter is imported. The loss is the mean of -log p over all supervised tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
PACKAGES = {"curvlinops": "curvlinops-for-pytorch", "hessian-eigenthings": "hessian-eigenthings"}


class Flat(torch.nn.Module):
    """A language model as curvlinops wants it: one score vector a token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of a batch."""
        return flat(self.model, inputs["tokens"])


def flat(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of every position but the last, [m (T - 1), vocabulary]."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return logits.flatten(0, 1)


def by_curvlinops(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Their jvp over a gradient."""
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        Flat(model),
        torch.nn.CrossEntropyLoss(),
        [*model.parameters()],
        [({"tokens": tokens}, labels)],
        check_deterministic=False,
        batch_size_fn=lambda inputs: inputs["tokens"].shape[0],
    )
    return lambda v: operator @ v


def by_eigenthings(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Their double backward."""
    from hessian_eigenthings import HessianOperator

    def loss(held: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(flat(held, batch["tokens"]), batch["labels"].flatten())

    operator = HessianOperator(model, [{"tokens": tokens, "labels": labels}], loss)
    return operator.matvec


def main() -> None:
    """One product, timed."""
    folder, library = sys.argv[1:]
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    held = load_file(f"{folder}/batch.safetensors")
    tokens, labels = held["tokens"], held["labels"][:, 1:].flatten()
    product = {"curvlinops": by_curvlinops, "hessian-eigenthings": by_eigenthings}[library](model, tokens, labels)
    torch.nn.functional.cross_entropy(flat(model, tokens), labels).backward()  # kernels are chosen
    model.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.process_time()
    found = product(held["vector"])
    spent = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    save_file({"product": found.detach().float().contiguous()}, f"{folder}/{library}.safetensors")
    version = importlib.metadata.version(PACKAGES[library])
    print(json.dumps({"cpu_s": spent, "extra_peak_gb": after - before, "version": version}))


if __name__ == "__main__":
    main()
