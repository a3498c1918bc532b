"""Lanczos against dense eigendecompositions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import NumericalError
from tiltmeter.geometry.krylov import Krylov, lanczos


def symmetric(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = values.numel()
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return q @ torch.diag(values.double()) @ q.T


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(function_values: Tensor, vectors: Tensor, b: Tensor) -> Tensor:
    return vectors @ (function_values * (vectors.T @ b))


def run(a: Tensor, b: Tensor, k: int) -> Krylov:
    return lanczos(lambda v: a @ v, b, k)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 9), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_basis_is_orthonormal_and_makes_the_matrix_tridiagonal(scale: float, n: int, k: int, seed: int) -> None:
    a = scale * symmetric(torch.linspace(-1, 2, n), seed)
    b = scale * vector(n, seed + 1)
    krylov = run(a, b, k)
    q = torch.stack(krylov.basis, 1)
    assert q.shape[1] == min(n, k)
    assert_close(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64))
    assert_close(q.T @ a @ q, krylov.tridiagonal, rtol=1e-7, atol=1e-9 * scale)
    assert_close(q[:, 0] * krylov.start_norm, b)
    tail = a @ q - q @ krylov.tridiagonal
    assert_close(float(tail.norm()), krylov.residual, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 8), seed=st.integers(0, 99))
def test_apply_is_exact_on_a_full_space(scale: float, n: int, seed: int) -> None:
    a = scale * symmetric(torch.linspace(-1, 2, n), seed)
    b = vector(n, seed + 1)
    values, vectors = torch.linalg.eigh(a)
    got = run(a, b, n).apply(lambda x: torch.exp(-x / scale))
    assert_close(got, dense(torch.exp(-values / scale), vectors, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_distinct_eigenvalues_take_three_vectors(dtype: torch.dtype) -> None:
    a = symmetric(torch.tensor([3.0] * 4 + [1.0] * 5 + [-2.0] * 3), 3).to(dtype)
    krylov = run(a, vector(12, 4).to(dtype), 8)
    assert len(krylov.basis) == 3
    values, weights = krylov.ritz()
    assert_close(values, torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_ritz_weights_are_the_squared_components() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    b = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    values, weights = run(a, b, 3).ritz()
    assert_close(values, torch.diagonal(a).clone())
    assert_close(weights, b.square() / 9)


def test_moments_match_to_order_2k_minus_1() -> None:
    a = symmetric(torch.linspace(-1, 3, 10), 0)
    b = vector(10, 1)
    values, weights = run(a, b, 3).ritz()
    for power in range(6):
        exact = b @ torch.linalg.matrix_power(a, power) @ b / (b @ b)
        assert_close((weights * values**power).sum(), exact)
    assert abs(float((weights * values**6).sum() - b @ torch.linalg.matrix_power(a, 6) @ b / (b @ b))) > 1e-3


def test_zero_matrix_and_no_vectors_asked_for_end() -> None:
    assert len(run(torch.zeros(4, 4, dtype=torch.float64), vector(4, 0), 3).basis) == 1
    assert len(run(symmetric(torch.arange(4), 0), vector(4, 0), 0).basis) == 1


def test_start_is_left_alone() -> None:
    b = vector(5, 0)
    before = b.clone()
    lanczos(lambda v: v, b, 3).basis[0].mul_(2)
    assert_close(b, before)


@pytest.mark.parametrize("start", [torch.zeros(3), torch.full((3,), math.nan)])
def test_useless_start(start: Tensor) -> None:
    with pytest.raises(NumericalError, match="starting vector"):
        lanczos(lambda v: v, start, 2)


def test_product_that_is_not_finite() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        lanczos(lambda v: v * math.nan, torch.ones(3), 2)
