"""Safety KL and its derivatives, against a naive KL over unpadded sequences in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacfwd, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiltmeter.lm import divergence as divergence_module
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.difference import ATTEMPTS
from tiltmeter.lm.divergence import DivergenceObjective, divergence_objective
from tiltmeter.lm.forward import Forward, divergence, per_sequence
from tiltmeter.lm.model import Loaded, add_lora, trainable

VOCABULARY = 40
PAD = 2


@pytest.fixture(autouse=True)
def norms_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own goes through float32 even in a float64 model."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def forward_of(make_llama: Any, kind: str = "untied", dtype: torch.dtype = torch.float64) -> Forward:
    model: Any = make_llama(tied=kind == "tied", vocab_size=VOCABULARY)
    if kind == "lora":
        model = add_lora(Loaded(model, None, "", "", 64), r=2, alpha=3.0, targets=["v_proj", "up_proj"], seed=1).model
    model = model.to(dtype)
    return Forward(model, trainable(model))


def drawn(lengths: Sequence[int] = (9, 5, 12)) -> list[Example]:
    """Sequences without token 0, the padding index of the embedding; a gap in the second, one token in the first."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        first = length - 1 if row == 0 else 2
        labels = [-100 if i < first or (i == 3 and row == 1) else t for i, t in enumerate(tokens)]
        out.append(Example(tuple(tokens), tuple(labels), row))
    return out


def plain(forward: Forward, examples: Sequence[Example]) -> Callable[[Tensor], list[Tensor]]:
    """Log-probabilities [tokens, vocabulary] at the supervised tokens of each sequence, of a flat vector."""
    model = copy.deepcopy(forward.model)

    def log_probability(theta: Tensor) -> list[Tensor]:
        out = []
        for example in examples:
            inputs = {"input_ids": torch.tensor([example.tokens]), "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                logits = functional_call(model, forward.space.split(theta), (), inputs, tie_weights=True).logits[0]
            held = [t for t, label in enumerate(example.labels[1:]) if label != -100]
            out.append(torch.log_softmax(logits[held], -1))
        return out

    return log_probability


def anchor_of(forward: Forward) -> Tensor:
    return forward.space.flatten(forward.at())


def vector(forward: Forward, seed: int, length: float) -> Tensor:
    v = torch.randn(forward.space.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v * length / v.norm()


def naive_kl(reference: list[Tensor], moved: list[Tensor]) -> Tensor:
    pairs = zip(reference, moved, strict=True)
    return torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs])


def objective_of(forward: Forward, max_tokens: int = 20, **more: Any) -> DivergenceObjective:
    return divergence_objective(forward, drawn(), PAD, max_tokens, **more)


def covariances(log_probability: list[Tensor], first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Covariance over the vocabulary, averaged over the tokens of each sequence, [m]."""
    out = []
    for lp, a, b in zip(log_probability, first, second, strict=True):
        p = lp.exp()
        mean = (p * a).sum(-1) * (p * b).sum(-1)
        out.append(((p * a * b).sum(-1) - mean).mean())
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_losses_and_slopes_of_the_kl(make_llama: Any, kind: str, max_tokens: int) -> None:
    forward = forward_of(make_llama, kind)
    objective, reference = objective_of(forward, max_tokens), plain(forward, drawn())
    theta = anchor_of(forward)
    anchor = [lp.detach() for lp in reference(theta)]
    assert objective.m == 3
    assert_close(objective.losses(), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(objective.gradient(), torch.zeros_like(theta), atol=1e-12, rtol=0)
    at, v = vector(forward, 1, 0.7), vector(forward, 2, 1.0)
    kl = naive_kl(anchor, reference(theta + at)).detach()
    assert float(kl.min()) > 1e-5
    assert_close(objective.losses(at), kl)

    def moved(x: Tensor) -> Tensor:
        return naive_kl(anchor, reference(x))

    assert_close(objective.directional(v, at), jvp(moved, (theta + at,), (v,))[1])
    weights = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    assert_close(objective.gradient(weights, at), vjp(moved, theta + at)[1](weights)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("opening", [1, 2, 50])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_an_opening_counts_where_its_mean_is_more(make_llama: Any, opening: int, max_tokens: int) -> None:
    forward = forward_of(make_llama)
    objective, reference = objective_of(forward, max_tokens, opening=opening), plain(forward, drawn())
    theta = anchor_of(forward)
    anchor = [lp.detach() for lp in reference(theta)]

    def moved(x: Tensor) -> Tensor:
        now = reference(x)
        first = naive_kl([p[:opening] for p in anchor], [q[:opening] for q in now])
        return torch.maximum(naive_kl(anchor, now), first)

    sides = set()
    for seed in range(4):
        at = vector(forward, seed, 0.7)
        told, whole = objective.losses(at), naive_kl(anchor, reference(theta + at)).detach()
        assert_close(told, moved(theta + at).detach())
        sides |= set((told > whole + 1e-9).tolist())
        weights = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
        wanted = vjp(moved, theta + at)[1](weights)[0]
        assert_close(objective.gradient(weights, at), wanted, rtol=1e-8, atol=1e-10)
        v = vector(forward, 9, 1.0)
        assert_close(objective.directional(v, at), jvp(moved, (theta + at,), (v,))[1])
        part = objective.only(range(len(objective.inner.chunks)))
        assert_close(part.losses(at), told)
    assert sides == ({True, False} if opening < 50 else {False})
    if len(objective.inner.chunks) == 1:
        objective.halve()
        assert_close(objective.losses(at), told)


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-3])
def test_small_divergences_keep_their_digits_in_float32(make_llama: Any, scale: float) -> None:
    """The usual sum of p (log p - log q) is lost in rounding at 1e-9 nats; this one is not."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    moved = logits + scale * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    labels = torch.ones(2, 4, dtype=torch.long)
    before, after = logits.log_softmax(-1), moved.log_softmax(-1)
    exact = (before.exp() * (before - after)).sum(-1).mean(-1)
    single = divergence(before.float().flatten(0, 1), after.float(), labels)
    assert float(exact.max()) < 1e-5
    assert_close(single.double(), exact, rtol=0.05 if scale < 1e-4 else 5e-3, atol=0)
    assert bool((divergence(before.float().flatten(0, 1), logits.float(), labels) >= 0).all())


@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_curvature_at_the_anchor_is_the_fisher_matrix(make_llama: Any, kind: str) -> None:
    forward = forward_of(make_llama, kind)
    objective, reference = objective_of(forward), plain(forward, drawn())
    theta, v, w = anchor_of(forward), vector(forward, 2, 1.0), vector(forward, 3, 4.0)
    lp, along_v = jvp(lambda x: tuple(reference(x)), (theta,), (v,))
    _, along_w = jvp(lambda x: tuple(reference(x)), (theta,), (w,))
    vv, vw = covariances(lp, along_v, along_v), covariances(lp, along_v, along_w)
    ww = covariances(lp, along_w, along_w)
    expected = torch.stack([torch.stack([vv, vw], -1), torch.stack([vw, ww], -1)], -1)
    assert float(vv.min()) > 1e-6
    assert_close(objective.fisher_form([v, w]), expected)
    product = objective.hvp(v)
    assert_close(product @ w, vw.mean())
    # F v whole: pull (diag(p) - p p') J v back through the log-probabilities, position by position
    cotangents = []
    for p, d in zip(lp, along_v, strict=True):
        pd = p.exp() * d
        cotangents.append((pd - p.exp() * pd.sum(-1, keepdim=True)) / len(p) / len(lp))
    dense = vjp(lambda x: tuple(reference(x)), theta)[1](tuple(cotangents))[0]
    assert_close(product, dense, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("speed", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("kind", ["untied", "lora"])
def test_path_form_against_derivatives_in_time(make_llama: Any, kind: str, speed: float) -> None:
    forward = forward_of(make_llama, kind)
    reference, theta = plain(forward, drawn()), anchor_of(forward)
    v, a = vector(forward, 4, speed), vector(forward, 5, speed**2)

    def along(t: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference(theta + t * v + t**2 / 2 * a))

    zero = torch.zeros((), dtype=torch.float64)
    lp, first, second = along(zero), jacfwd(along)(zero), jacfwd(jacfwd(along))(zero)
    expected = torch.stack(
        [covariances(lp, x, y) for x, y in ((first, first), (first, second), (second, first), (second, second))], -1
    ).view(-1, 2, 2)
    exact = objective_of(forward).path_form(v, a)
    assert float(expected.abs().min()) > 0
    assert_close(exact, expected, rtol=1e-6, atol=1e-12 * speed**2)
    difference = objective_of(forward, hessian="difference").path_form(v, a)
    assert_close(difference, expected, rtol=1e-4, atol=1e-7 * speed**2)


def test_passes_are_counted_and_the_model_left_alone(make_llama: Any) -> None:
    forward = forward_of(make_llama, dtype=torch.float32)
    before, state = copy.deepcopy(forward.model.state_dict()), torch.get_rng_state()
    objective = objective_of(forward)
    work = objective.work
    assert forward.passes.tokens == {"forward": work}
    v = vector(forward, 1, 1.0).float()
    objective.fisher_form([v, v, v])
    assert forward.passes.tokens == {"forward": work, "jvp": work, "tangent": 2 * work}
    objective.path_form(v, v)
    assert forward.passes.tokens["path"] == work
    objective_of(forward, hessian="difference").path_form(v, v)
    # two JVPs, taken again while the step is not a good one
    assert forward.passes.tokens["jvp"] - work in (2 * work, 4 * work, 2 * ATTEMPTS * work)
    assert forward.passes.tokens["forward"] == 2 * work
    assert forward.passes.tokens["path"] == work
    assert all(torch.equal(before[name], value) for name, value in forward.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in forward.model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_the_first_step_along_a_path_is_sought_on_the_smallest_micro_batch(make_llama: Any) -> None:
    forward = forward_of(make_llama)
    sequences = drawn((9, 5, 12, 11, 8, 10, 12, 9))
    exact = divergence_objective(forward, sequences, PAD, 14)
    least = min(batch.tokens.numel() for _, batch in exact.inner.chunks)
    assert 4 * least <= exact.work
    v, a = vector(forward, 4, 1.0), vector(forward, 5, 1.0)
    expected = exact.path_form(v, a)
    for scale in (1.0, 1e-6):
        difference = divergence_objective(forward, sequences, PAD, 14, hessian="difference")
        forward.passes.tokens.clear()
        assert_close(difference.path_form(v * scale, a * scale**2), expected * _orders(scale), rtol=1e-4, atol=0)
        spent = forward.passes.tokens["jvp"]
        times = range(1, ATTEMPTS + 1)
        assert spent in {2 * (least * few + exact.work) for few in times}
        difference.path_form(v * scale, a * scale**2)
        assert forward.passes.tokens["jvp"] == spent + 2 * exact.work


def _orders(scale: float) -> Tensor:
    """What a slower clock does to the covariance of first and second derivatives."""
    return torch.tensor([[scale**2, scale**3], [scale**3, scale**4]], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
@pytest.mark.parametrize("why", ["a large space", "an operation that cannot be batched"])
def test_directions_apart_give_what_they_give_together(
    make_llama: Any, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    forward = forward_of(make_llama, kind)
    directions = [vector(forward, seed, 10.0 ** (seed - 2)) for seed in range(1, 4)]
    objective = objective_of(forward)
    together = objective.fisher_form(directions)
    before = dict(forward.passes.tokens)
    if why == "a large space":
        monkeypatch.setattr(divergence_module, "LARGE", 0)
    else:

        def no_rule(*args: Any) -> Any:
            raise RuntimeError("vmap: there is no batching rule for this operation")

        monkeypatch.setattr(divergence_module, "vmap", no_rule)
    apart = objective.fisher_form(directions)
    assert_close(apart, together, rtol=1e-9, atol=0.0)
    assert forward.passes.tokens["jvp"] == before["jvp"] + 3 * objective.work
    assert forward.passes.tokens["tangent"] == before["tangent"]


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_responses_without_weight_cost_nothing(make_llama: Any, max_tokens: int) -> None:
    forward = forward_of(make_llama, dtype=torch.float32)
    objective = objective_of(forward, max_tokens)
    objective.gradient(torch.tensor([0.0, 1.0, 0.0]))
    assert forward.passes.tokens["forward_backward"] == 5


def test_mean_over_each_sequences_own_positions() -> None:
    supervised = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]])
    assert_close(per_sequence(values, supervised), torch.tensor([[2.0, 4.0], [0.0, 0.0], [5.0, 7.0]]))
