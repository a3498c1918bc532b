"""The commutator of two steps against dense Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian

from tiltmeter.errors import DegenerateError, SpaceMismatch
from tiltmeter.geometry.objective import FunctionObjective
from tiltmeter.geometry.sensitivity import DenseBasis
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.tracking.probe import measure_commutator

ANCHOR = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)


def safety(theta: Tensor) -> Tensor:
    return (theta[0] * theta[1].exp() + theta[2] ** 3)[None]


def task(theta: Tensor) -> Tensor:
    return ((theta[1] * theta[2]).sin() + 2 * theta[0] ** 2 * theta[2])[None]


def scaled(function, factor: float) -> FunctionObjective:
    return FunctionObjective(lambda theta: factor * function(theta), ANCHOR)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.01, 1.0), (3.0, 20.0)])
def test_it_is_what_the_hessians_say(a: float, b: float) -> None:
    first, second = scaled(safety, a), scaled(task, b)
    one, other = (lambda x: safety(x)[0]), (lambda x: task(x)[0])
    g_s, g_t = a * grad(one)(ANCHOR), b * grad(other)(ANCHOR)
    h_s, h_t = a * hessian(one)(ANCHOR), b * hessian(other)(ANCHOR)
    expected = h_t @ g_s - h_s @ g_t
    basis = DenseBasis(first.space, (torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),))
    found = measure_commutator(first, second, 1e-6 / max(a, b), basis)
    torch.testing.assert_close(found.vector, expected, rtol=1e-4, atol=1e-4 * float(expected.norm()))
    assert found.defect == pytest.approx(float(expected.norm() / (g_s.norm() * g_t.norm())), rel=1e-4)
    assert found.safety_share == pytest.approx(float(expected[1] ** 2 / expected.square().sum()), rel=1e-3)


def test_it_is_the_difference_of_the_two_orders() -> None:
    """Walk both ways: (theta_ST - theta_TS) / eta^2, at a step where higher orders show."""
    eta = 0.05
    one, other = (lambda x: safety(x)[0]), (lambda x: task(x)[0])
    after_s = ANCHOR - eta * grad(one)(ANCHOR)
    after_t = ANCHOR - eta * grad(other)(ANCHOR)
    st, ts = after_s - eta * grad(other)(after_s), after_t - eta * grad(one)(after_t)
    found = measure_commutator(scaled(safety, 1.0), scaled(task, 1.0), eta)
    torch.testing.assert_close(found.vector, (st - ts) / eta**2)
    assert found.safety_share is None


def test_losses_with_parallel_gradients_and_one_curvature_commute() -> None:
    same = scaled(task, 1.0)
    assert measure_commutator(same, scaled(task, 2.0), 1e-3).defect == pytest.approx(0.0, abs=1e-2)
    assert measure_commutator(same, same, 1e-3).defect == 0.0


def test_what_has_no_step_or_another_space_is_refused() -> None:
    flat = FunctionObjective(lambda theta: theta.new_zeros(1), ANCHOR)
    with pytest.raises(DegenerateError, match="two steps"):
        measure_commutator(flat, scaled(task, 1.0), 1e-3)
    other = FunctionObjective(task, ANCHOR, ParameterSpace(("x",), ((3,),)))
    with pytest.raises(SpaceMismatch):
        measure_commutator(scaled(safety, 1.0), other, 1e-3)
