"""Losses and products of a language model, against plain autograd over unpadded sequences in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiltmeter.errors import NumericalError, SpaceMismatch
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.difference import ATTEMPTS
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.model import Loaded, add_lora, trainable
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective, negative_margin_objective

VOCABULARY = 40
PAD = 2  # also a token of the data
MODELS = ["untied", "tied", "lora, B = 0", "lora, B != 0"]


@pytest.fixture(autouse=True)
def norms_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own goes through float32 even in a float64 model, which would hide errors below 1e-6."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def forward_of(make_llama: Any, kind: str, dtype: torch.dtype = torch.float64) -> Forward:
    model: Any = make_llama(tied=kind == "tied", vocab_size=VOCABULARY, layers=2)
    if kind.startswith("lora"):
        loaded = add_lora(Loaded(model, None, "small", "", 64), r=2, alpha=3.0, targets=["q_proj", "up_proj"], seed=1)
        model = loaded.model
        if "!=" in kind:
            generator = torch.Generator().manual_seed(2)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.data.normal_(0, 0.2, generator=generator)
    model = model.to(dtype)
    return Forward(model, trainable(model))


def drawn(seed: int = 0, lengths: Sequence[int] = (9, 4, 12, 7, 4)) -> list[Example]:
    """Sequences of several lengths; some tokens in the middle and at the end are not supervised.

    Without token 0: it is the padding index of the embedding, whose gradient PyTorch drops on the way back but not on
    the way forward. (Its row is all zero, so the norm behind it bends without bound there.)
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        labels = [-100 if i < 2 or (i == 5 and row == 2) or (i == 8 and row == 0) else t for i, t in enumerate(tokens)]
        out.append(Example(tuple(tokens), tuple(labels), row))
    return out


def plain_losses(forward: Forward, examples: Sequence[Example]) -> Callable[[Tensor], Tensor]:
    """Sum of -log p(token) of each sequence by itself, without padding, as a function of a flat parameter vector."""
    model = copy.deepcopy(forward.model)

    def losses(theta: Tensor) -> Tensor:
        out = []
        for example in examples:
            inputs = {"input_ids": torch.tensor([example.tokens]), "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                logits = functional_call(model, forward.space.split(theta), (), inputs, tie_weights=True).logits[0]
            nlp = -torch.log_softmax(logits, -1)
            held = [(t, label) for t, label in enumerate(example.labels[1:]) if label != -100]
            out.append(torch.stack([nlp[t, label] for t, label in held]).sum())
        return torch.stack(out)

    return losses


def anchor_of(forward: Forward) -> Tensor:
    return forward.space.flatten(forward.at())


def vector(forward: Forward, seed: int, length: float, dtype: torch.dtype = torch.float64) -> Tensor:
    v = torch.randn(forward.space.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (v * length / v.norm()).to(dtype)


@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_all_products_against_plain_autograd(make_llama: Any, kind: str, displaced: bool) -> None:
    forward, examples = forward_of(make_llama, kind), drawn()
    objective = likelihood_objective(forward, examples, PAD, 20, per="response")
    at = vector(forward, 1, 0.5) if displaced else None
    theta = anchor_of(forward) + (0 if at is None else at)
    reference = plain_losses(forward, examples)
    v = vector(forward, 2, 1.0)
    weights = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.5], dtype=torch.float64)

    assert objective.space == forward.space
    assert_close(objective.losses(at), reference(theta).detach())
    assert_close(objective.directional(v, at), jvp(reference, (theta,), (v,))[1])
    pulled = vjp(reference, theta)[1]
    assert_close(objective.gradient(weights, at), pulled(weights)[0], rtol=1e-9, atol=1e-9)
    assert_close(objective.gradient(None, at), pulled(torch.full_like(weights, 0.2))[0], rtol=1e-9, atol=1e-9)
    product = jvp(grad(lambda x: (weights * reference(x)).sum()), (theta,), (v,))[1]
    assert float(product.norm()) > 1e-3
    assert_close(objective.hvp(v, weights, at), product, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("max_tokens", [1, 12, 24, 1000])
def test_the_size_of_micro_batches_does_not_matter(make_llama: Any, max_tokens: int) -> None:
    forward, examples = forward_of(make_llama, "untied"), drawn()
    reference = likelihood_objective(forward, examples, PAD, 30, per="token")
    objective = likelihood_objective(forward, examples, PAD, max_tokens, per="token")
    assert all(b.tokens.numel() <= max(max_tokens, 12) for _, b in objective.chunks)
    v = vector(forward, 3, 1.0)
    assert_close(objective.losses(), reference.losses())
    assert_close(objective.directional(v), reference.directional(v))
    assert_close(objective.gradient(), reference.gradient())
    assert_close(objective.hvp(v), reference.hvp(v))


def test_groups_are_never_mixed_and_zero_weights_cost_nothing(make_llama: Any) -> None:
    forward, examples = forward_of(make_llama, "tied"), drawn()
    groups = [[3, 0], [4, 1, 2]]
    objective = likelihood_objective(forward, examples, PAD, 1000, per="response", groups=groups)
    assert sorted(sorted(members.tolist()) for members, _ in objective.chunks) == [[0, 3], [1, 2, 4]]
    weights = torch.tensor([1.0, 0, 0, 2.0, 0], dtype=torch.float64)
    expected = vjp(plain_losses(forward, examples), anchor_of(forward))[1](weights)[0]
    forward.passes.tokens.clear()
    assert_close(objective.gradient(weights), expected, rtol=1e-9, atol=1e-9)
    assert forward.passes.tokens == {"forward_backward": 18}
    only = torch.tensor([0, 1.0, 0, 0, 0], dtype=torch.float64)  # the padding that its neighbours needed goes too
    expected = vjp(plain_losses(forward, examples), anchor_of(forward))[1](only)[0]
    assert_close(objective.gradient(only), expected, rtol=1e-9, atol=1e-9)
    assert forward.passes.tokens == {"forward_backward": 18 + 4}
    assert_close(objective.gradient(0 * only), torch.zeros_like(expected))
    assert forward.passes.tokens == {"forward_backward": 22}


def test_passes_are_counted(make_llama: Any) -> None:
    forward = forward_of(make_llama, "untied", torch.float32)
    objective = likelihood_objective(forward, drawn(), PAD, 20, per="token", hessian="exact")
    v = vector(forward, 1, 1.0, torch.float32)
    heard = []
    forward.passes.listener = lambda: heard.append(1)
    objective.losses()
    objective.directional(v)
    objective.gradient()
    objective.hvp(v)
    work, chunks = objective.work, len(objective.chunks)
    assert work == sum(batch.tokens.numel() for _, batch in objective.chunks) >= 36
    kinds = ("forward", "jvp", "forward_backward", "hvp")
    # the first Hessian product is tried both ways on one sequence before
    tried = min(objective.chunks, key=lambda chunk: chunk[1].tokens.numel())[1].only(torch.arange(1))[1].tokens.numel()
    assert forward.passes.tokens == {**dict.fromkeys(kinds, work), "hvp": work + 2 * tried}
    assert forward.passes.calls == {**dict.fromkeys(kinds, chunks), "hvp": chunks + 2}
    assert len(heard) == 4 * chunks + 2
    objective.hvp(v)
    assert forward.passes.tokens["hvp"] == 2 * work + 2 * tried
    likelihood_objective(forward, drawn(), PAD, 20, per="token", hessian="difference").hvp(v)
    # two gradients, of one example of twelve tokens and then of all, each taken again while the step is not a good one
    times = range(1, ATTEMPTS + 1)
    expected = {2 * (12 * few + work * every) for few in times for every in times}
    assert forward.passes.tokens["forward_backward"] - work in expected


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_differences_of_gradients_in_float32_agree_with_the_exact_product(make_llama: Any, length: float) -> None:
    forward = forward_of(make_llama, "untied", torch.float32)
    exact = likelihood_objective(forward, drawn(), PAD, 40, per="token")
    difference = likelihood_objective(forward, drawn(), PAD, 40, per="token", hessian="difference")
    v = vector(forward, 4, length, torch.float32)
    at = vector(forward, 5, 0.1, torch.float32)
    for displacement in (None, at):
        want = exact.hvp(v, None, displacement)
        error = (difference.hvp(v, None, displacement) - want).norm() / want.norm()
        assert 0 < float(error) < 0.04  # 0.002 on a 135 M model, whose rounding averages out
    assert_close(difference.hvp(torch.zeros_like(v)), torch.zeros_like(v))


def many(count: int) -> list[Example]:
    return [example for seed in range(math.ceil(count / 5)) for example in drawn(seed)][:count]


@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_the_first_step_is_sought_on_few_examples(make_llama: Any, length: float) -> None:
    """Of 32 examples on two: however bad the first guess, all are differentiated at two points once."""
    forward = forward_of(make_llama, "untied", torch.float32)
    examples = many(32)
    difference = likelihood_objective(forward, examples, PAD, 40, per="token", hessian="difference")
    v = vector(forward, 4, length, torch.float32)
    difference.learned["gradient"] = 0.3  # so long that the first product has to take several
    found = difference.hvp(v)
    assert forward.passes.tokens["forward_backward"] >= 4 * difference.work
    good = difference.learned.pop("gradient")
    forward.passes.tokens.clear()
    again = difference.hvp(v)
    spent = forward.passes.tokens["forward_backward"] - 2 * difference.work
    assert 0 < spent <= 2 * ATTEMPTS * 2 * max(len(example.tokens) for example in examples)
    assert 0.1 < difference.learned["gradient"] / good < 10
    want = likelihood_objective(forward, examples, PAD, 40, per="token").hvp(v)
    for one in (found, again):
        assert float((one - want).norm() / want.norm()) < 0.04


@pytest.mark.parametrize("away", [0.2, 5.0])
def test_a_pilot_that_tells_the_step_is_made_once(make_llama: Any, away: float) -> None:
    """Near the window one pair of gradients of two examples tells the step, and all examples find it good."""
    forward = forward_of(make_llama, "untied", torch.float32)
    difference = likelihood_objective(forward, many(32), PAD, 40, per="token", hessian="difference")
    v = vector(forward, 4, 1.0, torch.float32)
    difference.hvp(v)
    good = difference.learned.pop("gradient")
    patched = good * away / difference.anchor_norm()
    forward.passes.tokens.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiltmeter.lm.objective.FIRST", patched)
        difference.hvp(v)
    spent = forward.passes.tokens["forward_backward"] - 2 * difference.work
    assert 0 < spent <= 2 * 2 * max(len(example.tokens) for example in many(32))
    assert 0.1 < difference.learned["gradient"] / good < 10


def test_a_process_without_examples_learns_no_step(make_llama: Any) -> None:
    forward = forward_of(make_llama, "untied", torch.float32)
    difference = likelihood_objective(forward, many(32), PAD, 40, per="token", hessian="difference")
    mine = replace(difference, chunks=(), learned={})
    v = vector(forward, 4, 1.0, torch.float32)
    assert not mine.hvp(v).any()
    assert "gradient" not in mine.learned
    half = replace(difference, chunks=difference.chunks[::2], learned={})
    want = replace(half, hessian="exact").hvp(v)
    assert float((half.hvp(v) - want).norm() / want.norm()) < 0.04


def test_scales_per_token_response_and_root(make_llama: Any) -> None:
    forward, examples = forward_of(make_llama, "untied"), drawn()
    sums = plain_losses(forward, examples)(anchor_of(forward)).detach()
    counts = torch.tensor([6.0, 2, 9, 5, 2], dtype=torch.float64)
    assert [example.supervised for example in examples] == counts.int().tolist()

    def losses(per: Any) -> Tensor:
        return likelihood_objective(forward, examples, PAD, 30, per=per).losses()

    assert_close(losses("response"), sums)
    assert_close(losses("root"), sums / counts.sqrt())
    assert_close(losses("token").mean(), sums.sum() / counts.sum())
    assert_close(losses("token"), sums / counts.mean())


@pytest.mark.parametrize("max_tokens", [1, 25, 1000])
def test_negative_margin_is_the_difference_of_the_openings(make_llama: Any, max_tokens: int) -> None:
    forward = forward_of(make_llama, "untied")
    refusals, compliances = drawn(1, (8, 11, 6)), drawn(2, (7, 12, 6))
    objective = negative_margin_objective(forward, refusals, compliances, PAD, max_tokens)
    refuse, comply = plain_losses(forward, refusals), plain_losses(forward, compliances)

    def margin(x: Tensor) -> Tensor:
        return refuse(x) - comply(x)

    theta, v = anchor_of(forward), vector(forward, 3, 1.0)
    assert objective.m == 3
    assert_close(objective.losses(), margin(theta).detach())
    assert_close(objective.directional(v), jvp(margin, (theta,), (v,))[1])
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert_close(objective.gradient(weights), vjp(margin, theta)[1](weights)[0], rtol=1e-9, atol=1e-9)
    mean = jvp(grad(lambda x: margin(x).mean()), (theta,), (v,))[1]
    assert_close(objective.hvp(v), mean, rtol=1e-8, atol=1e-9)


def all_products(objective: LanguageObjective) -> None:
    v = vector(objective.forward, 1, 1.0, torch.float32)
    for call in (objective.losses, objective.gradient):
        call()
        call(displacement=v)
    objective.directional(v, v)
    objective.hvp(v, None, v)


def test_the_model_is_left_as_it_was(make_llama: Any) -> None:
    model = make_llama(vocab_size=VOCABULARY)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    forward = Forward(model, trainable(model))
    for hessian in ("exact", "difference"):
        all_products(likelihood_objective(forward, drawn(), PAD, 20, per="token", hessian=hessian))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.lm_head.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert not first.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not first)
    assert not model.training


def test_half_precision_is_displaced_and_read_in_float32(make_llama: Any) -> None:
    forward = forward_of(make_llama, "untied", torch.bfloat16)
    assert {p.dtype for p in forward.at().values()} == {torch.float32}
    objective = likelihood_objective(forward, drawn(), PAD, 40, per="token")
    small = vector(forward, 1, 1e-2, torch.float32)  # every entry is below the resolution of bfloat16
    change = (objective.losses(small) - objective.losses(-small)) / 2
    assert_close(change, objective.directional(small), rtol=0.05, atol=2e-5)
    assert objective.gradient().dtype == torch.float32


def test_wrong_weights_and_losses_that_are_no_numbers(make_llama: Any) -> None:
    forward = forward_of(make_llama, "untied", torch.float32)
    objective = likelihood_objective(forward, drawn(), PAD, 40, per="token")
    with pytest.raises(SpaceMismatch, match=r"5 weights.*\(4,\)"):
        objective.gradient(torch.ones(4))
    with pytest.raises(SpaceMismatch, match="expected a vector"):
        objective.directional(torch.ones(3))
    forward.model.lm_head.weight.data[3, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"loss of example 0 \(and 4 more\)"):
        objective.losses()
