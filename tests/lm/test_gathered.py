"""Weights divided among two processes (gloo, FSDP2): every product is that of one process, and each keeps its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel
from two import Ended, two

from tiltmeter.errors import UnsupportedModel
from tiltmeter.geometry.sensitivity import measure_sensitivity
from tiltmeter.geometry.space import dot, norm, products
from tiltmeter.lm import gathered
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.divergence import divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.gathered import (
    Part,
    as_part,
    evenly_spread,
    own_part,
    own_vector,
    parts_together,
    standard_normal,
    whole_vector,
)
from tiltmeter.lm.gram import combine, gram
from tiltmeter.lm.model import trainable
from tiltmeter.lm.objective import likelihood_objective, negative_margin_objective
from tiltmeter.lm.scores import score_loss


def model() -> Any:
    """Odd numbers of rows; tied embeddings, biases, layer norms; float64 throughout, as few models are."""
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=37, n_positions=16, n_embd=10, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(settings).double().eval()


def examples(seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 37, (length,), generator=generator).tolist() for length in (9, 4, 12, 7, 4)]
    return [Example(tuple(row), (-100, -100, *row[2:]), i) for i, row in enumerate(rows)]


def everything(net: Any) -> dict[str, Tensor]:
    """All that is formed of divided weights; vectors whole."""
    forward = Forward(net, trainable(net, parts=True))
    parameters = forward.parameters
    likelihood = likelihood_objective(forward, examples(0), 2, 24, per="token")
    difference = likelihood_objective(forward, examples(0), 2, 24, per="root", hessian="difference")
    margin = negative_margin_objective(forward, examples(1), examples(2), 2, 24)
    kl = divergence_objective(forward, examples(0), 2, 24, hessian="difference")
    v, w, shift = (forward.random(seed).mul_(0.01) for seed in (1, 2, 3))
    weights = torch.tensor([0.0, 0.5, 0.0, -1.5, 0.0], dtype=torch.float64)
    batches = [batch for _, batch in difference.chunks]
    products_of = gram(net, batches, score_loss, parameters)
    sums = combine(net, batches, score_loss, parameters, torch.eye(5, dtype=torch.float64)[:2])
    basis = measure_sensitivity(difference, 2).basis
    found = {
        "losses": likelihood.losses(shift),
        "slopes": torch.stack(likelihood.losses_and_slopes(v, shift)),
        "margin slopes": margin.directional(v),
        "fisher": kl.fisher_form([v, w, shift]),  # several tangents at once
        "path": kl.path_form(v, w),
        "gram": products_of.total,
        **{f"gram of {name}": block for name, block in products_of.by_parameter.items()},
        "coordinates": basis.coordinates(v),
        "inner": torch.tensor([dot(v, w), norm(v), difference.anchor_norm()], dtype=torch.float64),
        "products": products([v, w], [w, shift], diagonal=v.square()),
        "spread": evenly_spread(parameters, v, 100),
        "all": evenly_spread(parameters, v, 10**6),
    }
    vectors = {
        "random": v,
        "gradient": likelihood.gradient(weights, shift),
        "gradient of the margin": margin.gradient(),
        "gradient of the kl": kl.gradient(displacement=shift),
        "hvp": difference.hvp(v, weights, shift),
        "lift": basis.lift(torch.tensor([1.0, -2.0], dtype=torch.float64)),
        **{f"sum {k}": torch.cat([sums[name][k].reshape(-1) for name in parameters]) for k in range(2)},
    }
    found |= {name: whole_vector(vector, parameters) for name, vector in vectors.items()}
    assert all(torch.equal(own_vector(found[name], parameters), vector) for name, vector in vectors.items())
    return found


def divided() -> Any:
    from torch.distributed.fsdp import fully_shard

    net = model()
    for block in net.transformer.h:
        fully_shard(block)
    return fully_shard(net)


def work(folder: str) -> None:
    """What one of the two processes does."""
    dist.init_process_group("gloo")
    rank, net = dist.get_rank(), divided()
    parameters = trainable(net, parts=True)
    here = Forward(net, parameters)
    assert 0.4 < here.space.size / here.whole.size < 0.6
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()]
    with pytest.raises(UnsupportedModel, match="not moved elsewhere"):
        here.at(here.random(0))
    with parts_together(parameters):
        found = everything(net)
        most_kept(here)
        restored(here)
    # nothing is left behind: FSDP2 trains as before
    assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()]
    tokens = torch.tensor([examples(0)[2].tokens])
    net(input_ids=tokens, labels=tokens).loss.backward()
    name = "transformer.h.0.mlp.c_fc.weight"
    found["FSDP2's own"] = parameters[name].grad.full_tensor()
    mixed = {"whole": nn.Parameter(torch.zeros(2)), **parameters}
    with pytest.raises(UnsupportedModel, match="whole is whole in every process"):
        parts_together(mixed)
    p = parameters[name]
    assert_close(as_part(own_part(p), p).full_tensor(), p.detach().full_tensor())
    save_file({key: value.contiguous() for key, value in found.items()}, Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


def most_kept(here: Forward) -> None:
    """On the way back weights are gathered again: fewer than half of them are ever there at once."""
    alive: list[tuple[StorageWeakRef, int]] = []
    most = 0
    real = Part.gather

    def counted(part: Part, own: Tensor) -> Tensor:
        nonlocal most
        out = real(part, own)
        storage = out.untyped_storage()
        alive.append((StorageWeakRef(storage), storage.nbytes()))
        most = max(most, sum(size for held, size in alive if not held.expired()))
        return out

    Part.gather = counted  # type: ignore[method-assign]
    try:
        likelihood_objective(here, examples(0), 2, 24, per="token").gradient()
    finally:
        Part.gather = real  # type: ignore[method-assign]
    assert 0 < most < 8 * here.whole.size * 0.55, most / (8 * here.whole.size)


def restored(here: Forward) -> None:
    """A pass that fails half-way leaves the model's parameters where they were."""
    before = {name: id(p) for name, p in here.model.named_parameters()}
    handle = here.model.transformer.h[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError):
        likelihood_objective(here, examples(0), 2, 24, per="token").losses()
    handle.remove()
    assert before == {name: id(p) for name, p in here.model.named_parameters()}


def starved(folder: str) -> None:
    """Memory runs out in the second process alone, in the middle of a pass."""
    dist.init_process_group("gloo")
    net = divided()
    here = Forward(net, trainable(net, parts=True))
    if dist.get_rank() == 1:
        net.transformer.h[1].mlp.register_forward_pre_hook(full)
    likelihood_objective(here, examples(0), 2, 24, per="token").losses()


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory left")


def broken(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    folder = tmp_path_factory.mktemp("divided")
    return folder, two(__file__, {"work": [str(folder)]}, folder)["work"]


def test_every_product_is_that_of_one_process(done: tuple[Path, list[Ended]]) -> None:
    folder, ended = done
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-3000:] + ended[1].stderr[-3000:]
    both = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    net = model()
    alone = everything(net)
    tokens = torch.tensor([examples(0)[2].tokens])
    net(input_ids=tokens, labels=tokens).loss.backward()
    alone["FSDP2's own"] = net.transformer.h[0].mlp.c_fc.weight.grad
    assert both[0].keys() == alone.keys()
    for name, value in alone.items():
        assert float(value.abs().max()) > 0, name
        assert_close(both[0][name], both[1][name], rtol=0, atol=0)
        # differences of gradients and slopes lose half of the digits
        close = 1e-6 if name in ("hvp", "path") else 1e-10
        assert_close(
            both[0][name], value, rtol=close, atol=close * float(value.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_where_memory_runs_out_in_one_process_both_end(tmp_path: Path) -> None:
    """The others are waiting for its part: trying again in smaller pieces would leave them waiting for ever."""
    waiting, failed = two(__file__, {"starved": [str(tmp_path)]}, tmp_path, timeout=100)["starved"]
    assert waiting.returncode == failed.returncode == 1
    assert "tiltmeter.errors.PartLost: memory ran out in one of the processes" in failed.stderr
    assert "PartLost" not in waiting.stderr


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 1000, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_drawn_in_blocks_are_those_drawn_at_once(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered, "BLOCK", 32)
    whole = torch.randn(size, generator=torch.Generator().manual_seed(4), dtype=dtype)
    assert_close(standard_normal({"p": nn.Parameter(torch.zeros(size))}, 4, dtype), whole)
    monkeypatch.setattr(gathered, "is_part", lambda p: True)
    for begin, end in ((0, size), (0, size // 2), (size // 2, size)):
        part = Part((size,), begin, end, size, None)
        monkeypatch.setattr(gathered.Part, "of", classmethod(lambda cls, p, part=part: part))
        assert_close(
            standard_normal({"p": nn.Parameter(torch.zeros(size))}, 4, dtype), whole[begin:end], rtol=0, atol=0
        )
