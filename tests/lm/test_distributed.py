"""Two processes (gloo) give the numbers of one; what cannot work on a divided model refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from two import Ended, two

from tiltmeter.errors import UnsupportedModel
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.distributed import sharded
from tiltmeter.lm.divergence import DivergenceObjective, divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.model import trainable
from tiltmeter.lm.objective import likelihood_objective, negative_margin_objective


def examples(seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 40, (length,), generator=generator).tolist() for length in (9, 4, 12, 7, 4, 11, 5)]
    return [Example(tuple(row), (-100, -100, *row[2:]), i) for i, row in enumerate(rows)]


def objectives() -> dict[str, Any]:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(settings).eval()
    forward = Forward(model, trainable(model))
    return {
        "likelihood": likelihood_objective(forward, examples(0), 2, 24, per="token"),
        "difference": likelihood_objective(forward, examples(0), 2, 24, per="root", hessian="difference"),
        "margin": negative_margin_objective(forward, examples(1), examples(2), 2, 24),
        "kl": divergence_objective(forward, examples(0), 2, 24),
    }


def products(name: str, objective: Any) -> dict[str, Tensor]:
    """Every product, away from the anchor where the KL has a gradient."""
    generator = torch.Generator().manual_seed(3)
    v, shift = (torch.randn(objective.space.size, generator=generator) * 0.01 for _ in range(2))
    weights = torch.zeros(objective.m, dtype=torch.float64)
    weights[2] = 1.5  # one example: one of the processes has nothing to do
    found = {
        "losses": objective.losses(shift),
        "directional": objective.directional(v, shift),
        "gradient": objective.gradient(displacement=shift),
        "weighted": objective.gradient(weights, shift),
        "hvp": objective.hvp(v),
    }
    if name == "kl":
        found |= {"fisher": objective.fisher_form([v, shift]), "path": objective.path_form(v, shift)}
    return found


def work(folder: str, fail: bool = False) -> None:
    """What one of the two processes does."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for name, objective in objectives().items():
        part = sharded(objective)
        inner = part.mine.inner if isinstance(part.mine, DivergenceObjective) else part.mine
        assert 0 < inner.work < part.work == objective.work
        if fail and rank == 1:
            raise_in(inner)
        found |= {f"{name}.{key}": value for key, value in products(name, part).items()}
    save_file(found, f"{folder}/{rank}.safetensors")


def fail(folder: str) -> None:
    """The same, with a fault in the second."""
    work(folder, fail=True)


def raise_in(inner: Any) -> None:
    def broken(*args: Any) -> Tensor:
        raise ValueError("a cosmic ray")

    object.__setattr__(inner, "reading", broken)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Ended]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, two(__file__, {"work": [str(folder)], "fail": [str(folder / "lost")]}, folder)


def test_two_processes_give_the_numbers_of_one(ended: tuple[Path, dict[str, list[Ended]]]) -> None:
    folder, done = ended
    for process in done["work"]:
        assert process.returncode == 0, process.stderr
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    expected = {f"{n}.{key}": value for n, o in objectives().items() for key, value in products(n, o).items()}
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        size = float(value.abs().max())
        assert size > 1e-9, key
        tolerance = 5e-3 if key == "difference.hvp" else 1e-5  # a difference magnifies the rounding of both
        assert_close(first[key], value, rtol=0, atol=tolerance * size, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(first[key], second[key]), key


def test_a_failure_in_one_process_ends_both_with_a_clear_error(ended: tuple[Path, dict[str, list[Ended]]]) -> None:
    healthy, failing = ended[1]["fail"]
    assert failing.returncode != 0
    assert "a cosmic ray" in failing.stderr
    assert healthy.returncode != 0
    assert "TiltmeterError: process 1 failed; its own message says why" in healthy.stderr


def test_a_model_that_is_divided_among_processes_is_refused(llama: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    assert len(trainable(llama)) == 21
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(llama, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(UnsupportedModel, match=r"divided among processes \(a DTensor.*Give a LoRA recipe"):
            trainable(llama)
    finally:
        dist.destroy_process_group()
