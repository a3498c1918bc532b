"""Every product against dense derivatives from torch.func in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacrev
from torch.testing import assert_close

from tiltmeter.errors import SpaceMismatch
from tiltmeter.geometry.objective import (
    FORWARD_BACKWARD,
    Counted,
    FunctionObjective,
    Passes,
    SoftmaxFunction,
    covariance_over_outcomes,
)
from tiltmeter.geometry.space import ParameterSpace

SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])


def cases(test: Callable[..., None]) -> Callable[..., None]:
    sizes = given(seed=st.integers(0, 999), n=st.integers(1, 6), m=st.integers(1, 5))
    return settings(max_examples=6, deadline=None)(sizes(test))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cubic(seed: int, m: int, n: int) -> Callable[[Tensor], Tensor]:
    """A nonlinear function with Jacobian and Hessian of every order."""
    a, b = normal(seed, m, n), normal(seed + 1, m, n)
    return lambda x: torch.sin(a @ x) + (b @ x) ** 3 / 6 + (a @ x) * (b @ x)


@SCALES
@cases
def test_products_against_dense(scale: float, seed: int, n: int, m: int) -> None:
    f = cubic(seed, m, n)
    objective = FunctionObjective(f, normal(seed + 2, n))
    v, w = scale * normal(seed + 3, n), scale * normal(seed + 4, m)
    for displacement in (None, normal(seed + 5, n)):
        at = objective.anchor if displacement is None else objective.anchor + displacement
        jacobian, curvature = jacrev(f)(at), hessian(f)(at)
        assert_close(objective.losses(displacement), f(at))
        assert_close(objective.directional(v, displacement), jacobian @ v)
        assert_close(objective.gradient(displacement=displacement), jacobian.mean(0))
        assert_close(objective.gradient(w, displacement), w @ jacobian)
        assert_close(objective.hvp(v, displacement=displacement), curvature.mean(0) @ v)
        assert_close(objective.hvp(v, w, displacement), torch.einsum("m,mij,j->i", w, curvature, v))
    assert objective.m == objective.work == m
    assert objective.space.size == n


def logits(seed: int, m: int, n: int, y: int = 4) -> Callable[[Tensor], Tensor]:
    a, b = normal(seed, m, y, n), normal(seed + 1, m, y, n)
    return lambda x: a @ x + (b @ x) ** 2 / 2


def scores(f: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [m, y], scores [m, y, n] and Hessians of log p [m, y, n, n]."""

    def log_p(x: Tensor) -> Tensor:
        return torch.log_softmax(f(x), -1)

    return log_p(at).exp(), jacrev(log_p)(at), hessian(log_p)(at)


@SCALES
@cases
def test_fisher_form_is_the_dense_fisher_matrix(scale: float, seed: int, n: int, m: int) -> None:
    f, anchor = logits(seed, m, n), normal(seed + 2, n)
    p, s, _ = scores(f, anchor)
    fisher = torch.einsum("my,myi,myj->mij", p, s, s)
    directions = [scale * normal(seed + 3, n), normal(seed + 4, n), anchor]
    stacked = torch.stack(directions)
    got = SoftmaxFunction(f, anchor).fisher_form(directions)
    assert_close(got, torch.einsum("ki,mij,lj->mkl", stacked, fisher, stacked))


@SCALES
@cases
def test_path_form_is_the_dense_covariance(scale: float, seed: int, n: int, m: int) -> None:
    """s.v and s.a + v'Av with A the dense Hessian of log p; a lost factor in t^2/2 shows."""
    f, anchor = logits(seed, m, n), normal(seed + 2, n)
    v, a = scale * normal(seed + 3, n), scale * normal(seed + 4, n)
    p, s, curvature = scores(f, anchor)
    derivatives = torch.stack([s @ v, s @ a + torch.einsum("i,myij,j->my", v, curvature, v)])
    centred = derivatives - (p * derivatives).sum(-1, keepdim=True)
    expected = torch.einsum("kmy,my,lmy->mkl", centred, p, centred)
    assert_close(SoftmaxFunction(f, anchor).path_form(v, a), expected)


@cases
def test_kl_vanishes_to_first_order_and_curves_like_the_fisher_matrix(seed: int, n: int, m: int) -> None:
    f, anchor = logits(seed, m, n), normal(seed + 2, n)
    kl = SoftmaxFunction(f, anchor)
    p, s, _ = scores(f, anchor)
    fisher = torch.einsum("my,myi,myj->ij", p, s, s) / m
    v, w, step = normal(seed + 3, n), normal(seed + 4, m), normal(seed + 5, n)
    zero = torch.zeros(m, dtype=torch.float64)
    assert_close(kl.losses(), zero)
    assert_close(kl.directional(v), zero, rtol=0, atol=1e-10)
    assert_close(kl.gradient(), torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(kl.hvp(v), fisher @ v)

    def loss(x: Tensor) -> Tensor:
        return (p * (p.log() - torch.log_softmax(f(x), -1))).sum(-1)

    at = anchor + step
    assert_close(kl.losses(step), loss(at))
    assert_close(kl.directional(v, step), jacrev(loss)(at) @ v)
    assert_close(kl.gradient(w, step), w @ jacrev(loss)(at))
    assert_close(kl.hvp(v, w, step), torch.einsum("m,mij,j->i", w, hessian(loss)(at), v))
    assert (kl.m, kl.work, kl.space.size) == (m, m, n)


def test_covariance_does_not_see_constants_and_weights_by_probability() -> None:
    p = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    x = torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
    expected = torch.tensor([[[0.2 * 0.8 * 4]]], dtype=torch.float64)
    assert_close(covariance_over_outcomes(x, p.log()), expected)
    assert_close(covariance_over_outcomes(x + 100, p.log()), expected)


def test_wrong_lengths_are_refused() -> None:
    objective = FunctionObjective(cubic(0, 3, 2), normal(0, 2))
    with pytest.raises(SpaceMismatch, match="expected 3 weights"):
        objective.gradient(torch.ones(2))
    for call in (objective.directional, objective.hvp, objective.losses):
        with pytest.raises(SpaceMismatch, match="vector of 2"):
            call(torch.ones(3, dtype=torch.float64))


def test_named_space_is_kept() -> None:
    space = ParameterSpace(("a", "b"), ((1,), (1,)))
    assert FunctionObjective(cubic(0, 3, 2), normal(0, 2), space).space is space


def test_counted_counts_every_kind_once_and_changes_nothing() -> None:
    inner = FunctionObjective(cubic(0, 3, 2), normal(0, 2))
    counted = Counted(inner)
    v, w, d = normal(1, 2), normal(2, 3), normal(3, 2)
    assert_close(counted.losses(d), inner.losses(d))
    assert_close(counted.directional(v, d), inner.directional(v, d))
    assert_close(counted.directional(v), inner.directional(v))
    for _ in range(3):
        assert_close(counted.gradient(w, d), inner.gradient(w, d))
    for _ in range(4):
        assert_close(counted.hvp(v, w, d), inner.hvp(v, w, d))
    assert dict(counted.passes.calls) == {"forward": 1, "jvp": 2, "forward_backward": 3, "hvp": 4}
    assert dict(counted.passes.tokens) == {"forward": 3, "jvp": 6, "forward_backward": 9, "hvp": 12}
    assert (counted.m, counted.work, counted.space) == (3, 3, inner.space)
    assert_close(counted.passes.equivalents(3), 1 / 3 + 2 * 1.1 + 3 * 1.0 + 4 * 3.5)
    assert_close(counted.passes.equivalents(6), (1 / 3 + 2 * 1.1 + 3 * 1.0 + 4 * 3.5) / 2)


def test_passes_weigh_by_tokens_not_by_calls() -> None:
    passes = Passes()
    passes.add("path", 100)
    passes.add("gram", 50, calls=5)
    assert (passes.calls["path"], passes.calls["gram"]) == (1, 5)
    assert_close(passes.equivalents(100), FORWARD_BACKWARD["path"] + FORWARD_BACKWARD["gram"] / 2)
