"""Optimisers near the anchor against real runs of torch.optim in float64."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Adam, Sgd

RATES = torch.tensor([0.0, 0.02, 0.05, 0.05, 0.04, 0.03, 0.01], dtype=torch.float64)
SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
KINDS = pytest.mark.parametrize(
    ("momentum", "nesterov"),
    [(0.0, False), (0.9, False), (0.9, True), (0.5, False)],
    ids=["plain", "0.9", "nag", "0.5"],
)


def descend(rates: Tensor, curvature: Tensor, slope: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """Positions after every step of torch.optim.SGD on slope x + curvature x^2 / 2 from 0, [steps + 1, k]."""
    x = torch.zeros_like(curvature, requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
    out = [x.detach().clone()]
    for rate in rates.tolist():
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        (slope * x + curvature * x**2 / 2).sum().backward()
        optimiser.step()
        out.append(x.detach().clone())
    return torch.stack(out)


@SCALES
@KINDS
def test_response_is_a_real_run_on_a_parabola(scale: float, momentum: float, nesterov: bool) -> None:
    curvature = torch.tensor([-3.0, 0.0, 0.5, 7.0], dtype=torch.float64) / scale
    rates = RATES * scale
    got = Sgd(momentum, nesterov).response(Clock(rates), curvature)
    assert_close(got, descend(rates, curvature, torch.ones_like(curvature), momentum, nesterov))


@SCALES
@KINDS
def test_first_and_second_order_are_those_of_a_real_run(scale: float, momentum: float, nesterov: bool) -> None:
    """x_k = -a_k + b_k h + O(h^2): a from a flat loss, b by a central difference in h (exact up to h^2)."""
    rates, h = RATES * scale, 1e-4 / scale
    metric, clock = Sgd(momentum, nesterov), Clock(RATES * scale)
    one = torch.ones(3, dtype=torch.float64)
    runs = descend(rates, torch.tensor([0.0, h, -h], dtype=torch.float64), one, momentum, nesterov)
    assert_close(metric.flow_time(clock), -runs[:, 0])
    assert_close(metric.second_order(clock), (runs[:, 1] - runs[:, 2]) / (2 * h), rtol=1e-6, atol=1e-9 * scale**2)


@SCALES
def test_second_order_at_constant_rate(scale: float) -> None:
    k = torch.arange(6, dtype=torch.float64)
    clock = Clock.constant(scale, 5)
    assert_close(Sgd().second_order(clock), scale**2 * k * (k - 1) / 2)
    assert_close(Sgd().flow_time(clock), scale * k)


def test_momentum_multiplies_flow_time_once_up_to_speed() -> None:
    covered = Sgd(0.9).flow_time(Clock.constant(0.1, 300)).diff()
    assert_close(covered[0], torch.tensor(0.1, dtype=torch.float64))
    assert_close(covered[-1], torch.tensor(1.0, dtype=torch.float64))


def test_sgd_direction_ignores_noise() -> None:
    mean = torch.tensor([1.0, -2.0])
    assert_close(Sgd(0.9).direction(mean, torch.ones(2)), mean)


@SCALES
def test_adam_direction_is_the_settled_update_of_a_real_run(scale: float) -> None:
    """Two batches in turn have mean mu and standard deviation sigma; the run's own average update settles there."""
    mean = torch.tensor([1.0, -0.3, 0.05, 0.0, 2.0], dtype=torch.float64) * scale
    spread = torch.tensor([0.0, 0.4, 1.0, 1.0, 0.1], dtype=torch.float64) * scale
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([x], lr=1.0, weight_decay=0.0, eps=1e-3 * scale)
    before = torch.zeros(5, dtype=torch.float64)
    for step in range(3000):
        if step == 1000:
            before = x.detach().clone()
        x.grad = mean + (spread if step % 2 else -spread)
        optimiser.step()
    adam = Adam(epsilon=1e-3 * scale)
    direction = adam.direction(mean, spread)
    assert_close((x.detach() - before) / 2000, -direction, rtol=1e-3, atol=1e-4)
    assert_close(adam.preconditioner(mean, spread) * mean, direction)
    assert float(direction.abs().max()) <= 1


def test_adam_without_noise_is_sign_descent_and_leaves_its_arguments_alone() -> None:
    mean, spread = torch.tensor([3.0, -1e-3, 0.0]), torch.zeros(3)
    assert_close(Adam().direction(mean, spread), torch.tensor([1.0, -1.0, 0.0]), rtol=1e-4, atol=0)
    assert_close(mean, torch.tensor([3.0, -1e-3, 0.0]))
    assert_close(spread, torch.zeros(3))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.95, 0.95)])
def test_adam_has_no_lag_on_a_constant_gradient(betas: tuple[float, float]) -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([x], lr=1.0, weight_decay=0.0, betas=betas)
    covered = [0.0]
    for rate in RATES.tolist():
        optimiser.param_groups[0]["lr"] = rate
        x.grad = torch.tensor([5.0, -0.2], dtype=torch.float64)
        optimiser.step()
        covered.append(-float(x.detach()[0]))
    assert_close(Adam(betas).flow_time(Clock(RATES)), torch.tensor(covered, dtype=torch.float64), rtol=1e-6, atol=1e-12)
