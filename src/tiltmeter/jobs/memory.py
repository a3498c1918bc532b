"""Memory of an assessment: what it takes, what there is, and the micro-batch that keeps it inside a budget."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from tiltmeter.errors import OutOfMemory
from tiltmeter.geometry.motion import LARGE

#: Vectors of n parameters alive at the fullest moment, besides what the subject holds: mean, spread, and for a Hessian
#: product its direction, the displaced parameters, the result and an earlier result.
VECTORS = 6

#: Activation memory of one token through one layer of width d, in units of 4 d bytes (measured on a 135 M Llama: 1.1 GB
#: for 512 tokens, logits apart).
ACTIVATIONS = 24

#: Graphs alive in an exact Hessian product.
GRAPHS = 3


def vectors_gb(n: int, groups: int) -> float:
    """Vectors of the parameter space, GB."""
    return n * (4 * VECTORS + (2 if n > LARGE else 4) * groups) / 1e9


def token_gb(config: Any, exact: bool) -> float:
    """Activations and logits of one token, GB; more where Hessian products are exact."""
    layers = 4 * config.hidden_size * config.num_hidden_layers * ACTIVATIONS
    return float((layers * (GRAPHS if exact else 1) + 4 * config.vocab_size * 4) / 1e9)


def tokens_within(budget_gb: float, held_gb: float, n: int, groups: int, config: Any, longest: int) -> int:
    """Tokens per micro-batch that keep an assessment inside a memory budget.

    Args:
        budget_gb: largest memory of the whole process (on a GPU: of the device).
        held_gb: what is held already.
        n: parameters to be trained.
        groups: groups of tuning batches.
        config: of the model.
        longest: tokens of the longest sequence, which no micro-batch can be shorter than.

    Raises:
        OutOfMemory: not even one sequence fits; says what is needed.
    """
    each = token_gb(config, exact=n <= LARGE)
    fixed = held_gb + vectors_gb(n, groups)
    tokens = int((budget_gb - fixed) / each)
    if tokens < longest:
        raise OutOfMemory(
            f"--memory {budget_gb:g}: this assessment needs about {fixed + longest * each:.2g} GB even with a sequence "
            "at a time. Give more, shorten the rows (--max-length), or assess with LoRA (--lora-r)."
        )
    return tokens


def memory_now(device: torch.device) -> tuple[float, float]:
    """What this process holds of the memory a job on `device` needs, and what is free, GB."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.memory_allocated(device) / 1e9, (free + cached) / 1e9
    return resident_bytes() / 1e9, psutil.virtual_memory().available / 1e9


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(psutil.Process().memory_info().rss)
