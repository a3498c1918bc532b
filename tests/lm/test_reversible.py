"""Hessian products as gradients of directional derivatives, in several kinds of models, and where that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import KINDS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from tiltmeter.lm import objective as products
from tiltmeter.lm import reversible
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.model import trainable
from tiltmeter.lm.objective import TWICE, LanguageObjective, likelihood_objective


def made(kind: str, frozen: bool = False) -> tuple[LanguageObjective, Tensor]:
    """A small model in double precision, all of it trained or one matrix, and a direction."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval().double()
    if frozen:
        model.requires_grad_(False)
        first = next(n for n, p in model.named_parameters() if p.ndim == 2 and ("q_proj" in n or "c_attn" in n))
        model.get_parameter(first).requires_grad_()
    drawn = torch.randint(1, 40, (2, 5, 9))
    examples = [Example(tuple(a.tolist()), tuple(b.tolist()), i) for i, (a, b) in enumerate(drawn.unbind(1))]
    objective = likelihood_objective(Forward(model, trainable(model)), examples, 0, 30, per="token")
    return objective, torch.randn(objective.space.size, dtype=torch.float64)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_come_to_the_same_product(kind: str, frozen: bool) -> None:
    """Norms of some models calculate in float32 whatever they are given: so many digits, and no more."""
    objective, v = made(kind, frozen)
    before = getattr(objective.forward.model.config, "_attn_implementation", None)
    weights = torch.tensor([0.3, 0.0, -1.0, 2.0, 0.5])
    place = 0.01 * torch.randn_like(v)
    want = objective._backward_twice(v, objective._shares(weights, "hvp"), place)
    found = objective.hvp(v, weights, place)
    assert objective.learned[TWICE] == 0.0
    assert_close(found, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    # and the independent route: a difference of gradients, coarser where float32 drowns that of a single matrix
    exact = kind in ("gpt2", "opt")
    step = 1e-3 if frozen and not exact else 1e-5
    ahead, behind = (objective.gradient(weights, place + sign * step * v) for sign in (1, -1))
    error = float(((ahead - behind) / (2 * step) - found).norm() / found.norm())
    assert error < (1e-5 if exact else 2e-3)
    assert getattr(objective.forward.model.config, "_attn_implementation", None) == before


def test_a_product_that_is_silently_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own layer norm, whose tangent has lost what mean and variance depend on."""
    objective, v = made("gpt2")
    monkeypatch.setattr(reversible, "layer_norm", torch.layer_norm)
    shares = objective._shares
    want = objective._backward_twice(v, shares(None, "hvp"), None)
    wrong = objective._forward_then_backward(v, shares(None, "hvp"), None)
    assert float((wrong - want).norm() / want.norm()) > 0.1
    assert_close(objective.hvp(v), want)
    assert objective.learned[TWICE] == 1.0


@pytest.mark.parametrize("told", ["does not support forward AD", "has been modified by an inplace operation"])
def test_a_model_without_tangents_is_differentiated_backwards_twice(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, v = made("llama")

    def fail(*_: Any) -> None:
        raise NotImplementedError(f"this operation {told}")

    monkeypatch.setattr(products, "duals", fail)
    assert_close(objective.hvp(v), objective._backward_twice(v, objective._shares(None, "hvp"), None))
    assert objective.learned[TWICE] == 1.0


def test_nothing_is_learned_from_a_direction_of_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, v = made("gpt2")
    monkeypatch.setattr(reversible, "layer_norm", torch.layer_norm)
    assert not objective.hvp(torch.zeros_like(v)).any()
    assert TWICE not in objective.learned
    objective.hvp(v)
    assert objective.learned[TWICE] == 1.0


def test_a_failure_after_the_trial_is_answered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding or another length may call an operation that the tried sequence did not."""
    objective, v = made("llama")
    objective.hvp(v)
    assert objective.learned[TWICE] == 0.0

    def fail(*_: Any) -> None:
        raise NotImplementedError("this operation does not support forward AD")

    monkeypatch.setattr(products, "duals", fail)
    assert_close(objective.hvp(v), objective._backward_twice(v, objective._shares(None, "hvp"), None))
    assert objective.learned[TWICE] == 1.0


def test_attention_of_every_part_is_put_back() -> None:
    """A setting of the whole is handed on to the parts, which may have had another."""
    model = KINDS["llama"]()
    parts = nn.ModuleList([model, KINDS["biases"]()])
    parts[1].config._attn_implementation = "eager"
    with reversible.plain_attention(parts):
        assert [each.config._attn_implementation for each in parts] == ["eager", "eager"]
    assert [each.config._attn_implementation for each in parts] == ["sdpa", "eager"]


def test_other_failures_are_not_taken_for_missing_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, v = made("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("a cosmic ray")

    monkeypatch.setattr(products, "duals", fail)
    with pytest.raises(RuntimeError, match="cosmic ray"):
        objective.hvp(v)
    assert objective.forward.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_what_is_put_together_is_what_torch_has(scale: float) -> None:
    torch.manual_seed(0)
    values = scale * torch.randn(3, 4, 6, dtype=torch.float64)
    masked = values.clone()
    masked[..., 4:] = torch.finfo(torch.float64).min
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    norm = nn.LayerNorm((4, 6), eps=1e-3).double()
    norm_of = nn.functional.layer_norm

    def calculated() -> list[Tensor]:
        out = [soft(given, dim=dim) for given in (values, masked) for dim in (-1, 1)
               for soft in (torch.softmax, nn.functional.log_softmax)]  # fmt: skip
        narrow = values.bfloat16()
        out += [narrow.softmax(-1, torch.float32), torch.log_softmax(narrow, -1, torch.float32), norm(values)]
        return [*out, norm_of(values, (6,), weight, bias), norm_of(narrow, (6,)), values.log_softmax(1)]

    outside = calculated()
    with reversible.reversible(nn.Linear(1, 1)):
        inside = calculated()
        wide = nn.functional.softmax(masked, dim=-1, dtype=torch.float32)
    assert_close(wide, masked.softmax(-1))  # never narrower than what is given
    for one, other in zip(inside, outside, strict=True):
        assert_close(one, other)


def test_tangents_of_what_is_put_together_can_be_differentiated() -> None:
    """The gradient of a directional derivative of sum softmax(x)^2 against double backward."""
    torch.manual_seed(0)
    x, v = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    [slope] = torch.autograd.grad(x.softmax(0).square().sum(), x, create_graph=True)
    [want] = torch.autograd.grad(slope @ v, x)
    with reversible.reversible(nn.Linear(1, 1)), forward_ad.dual_level():
        told = forward_ad.unpack_dual(forward_ad.make_dual(x, v).softmax(0).square().sum()).tangent
    told.backward()
    assert_close(x.grad, want)
