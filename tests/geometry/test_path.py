"""Predicted displacements against real optimiser runs and integrated gradient flow."""

import pytest
import torch
from bent import G, H, N, gradient, normal, slope
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.krylov import lanczos
from tiltmeter.geometry.metric import Adam, Metric, Sgd
from tiltmeter.geometry.path import CurvedPath, KrylovPath, LinearPath, TaylorPath

SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])


def real_run(
    optimiser: torch.optim.Optimizer, x: Tensor, rates: Tensor, batches: tuple[Tensor, ...], cubic: float
) -> Tensor:
    """Displacement after following the gradient plus one batch's own constant gradient after the other."""
    start = x.detach().clone()
    for step, rate in enumerate(rates.tolist()):
        optimiser.param_groups[0]["lr"] = rate
        x.grad = gradient(x.detach() - start, cubic) + batches[step % len(batches)]
        optimiser.step()
    return x.detach() - start


def test_linear_path_is_a_real_run_on_a_linear_loss() -> None:
    rates = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    for metric, make in [
        (Sgd(0.9, True), lambda x: torch.optim.SGD([x], lr=1.0, momentum=0.9, nesterov=True)),
        (Sgd(), lambda x: torch.optim.SGD([x], lr=1.0)),
        (Adam(), lambda x: torch.optim.AdamW([x], lr=1.0, weight_decay=0.0)),
    ]:
        x = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        optimiser = make(x)
        path = LinearPath(metric, Clock(rates), slope(G))
        for step in range(1, 5):
            optimiser.param_groups[0]["lr"] = float(rates[step - 1])
            x.grad = G.clone()
            optimiser.step()
            assert_close(path.displacement(step), x.detach(), rtol=1e-6, atol=0)
        assert_close(path.displacement(0), torch.zeros(N, dtype=torch.float64))


@SCALES
@pytest.mark.parametrize("metric", [Adam(weight_decay=0.1), Sgd(weight_decay=0.1)], ids=["adamw", "sgd"])
def test_decay_is_right_to_first_order(scale: float, metric: Metric) -> None:
    """Halving the rate quarters what is left; both optimisers decay a large anchor."""
    anchor = 50 * normal(3, N) * scale

    def miss(rate: float) -> float:
        x = anchor.clone().requires_grad_()
        rates = torch.full((4,), rate, dtype=torch.float64)
        kind = torch.optim.AdamW if isinstance(metric, Adam) else torch.optim.SGD
        optimiser = kind([x], lr=1.0, weight_decay=0.1)
        for _ in range(4):
            optimiser.param_groups[0]["lr"] = rate
            x.grad = G.clone()
            optimiser.step()
        path = LinearPath(metric, Clock(rates), slope(G), anchor)
        # without decay the path would miss at first order already
        assert float(
            (LinearPath(metric, Clock(rates), slope(G)).displacement(4) - x.detach() + anchor).norm()
        ) > 0.3 * (rate * 4 * 0.1 * float(anchor.norm()))
        return float((path.displacement(4) - (x.detach() - anchor)).norm())

    assert miss(0.02) / miss(0.01) == pytest.approx(4.0, rel=0.02)


def test_adam_path_with_noisy_batches_in_turn() -> None:
    """Coordinates where noise drowns the mean hardly move, and the path knows by how much."""
    spread = torch.tensor([0.0, 0.5, 2.0, 8.0, 30.0], dtype=torch.float64)
    steps = 1500
    x = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([x], lr=0.01, weight_decay=0.0)
    for step in range(steps):
        x.grad = G + (spread if step % 2 else -spread)
        optimiser.step()
    path = LinearPath(Adam(), Clock.constant(0.01, steps), slope(G, spread))
    assert_close(path.displacement(steps), x.detach(), rtol=0.01, atol=0.02)


@SCALES
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_krylov_path_is_exact_once_every_eigenvalue_is_there(scale: float, momentum: float) -> None:
    """Three distinct eigenvalues among eight, three vectors; against a real run of torch.optim.SGD."""
    q = torch.linalg.qr(normal(5, 8, 8))[0]
    values = torch.tensor([4.0, 4, 4, 1, 1, 1, -0.5, -0.5], dtype=torch.float64) * scale
    curvature, g = q @ torch.diag(values) @ q.T, normal(6, 8)
    rates = torch.linspace(0.05, 0.3, 12, dtype=torch.float64) / scale
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=1.0, momentum=momentum)
    for rate in rates.tolist():
        optimiser.param_groups[0]["lr"] = rate
        x.grad = g + curvature @ x.detach()
        optimiser.step()
    path = KrylovPath(Sgd(momentum), Clock(rates), lanczos(lambda v: curvature @ v, g, 3))
    assert_close(path.displacement(12), x.detach(), rtol=1e-7, atol=1e-9 / scale)
    short = KrylovPath(Sgd(momentum), Clock(rates), lanczos(lambda v: curvature @ v, g, 2))
    assert float((short.displacement(12) - x.detach()).norm()) > 1e-3 * float(x.detach().norm())
    # clipped: the same run on the loss without its negative part
    positive = q @ torch.diag(values.clamp_min(0)) @ q.T
    clipped = KrylovPath(Sgd(momentum), Clock(rates), path.krylov, clipped=True).displacement(12)
    exact = KrylovPath(Sgd(momentum), Clock(rates), lanczos(lambda v: positive @ v, g, 3)).displacement(12)
    assert_close(clipped, exact, rtol=1e-7, atol=1e-9 / scale)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_taylor_path_misses_a_real_run_by_third_order(momentum: float, nesterov: bool) -> None:
    def miss(rate: float) -> float:
        rates = rate * torch.tensor([0.5, 1.0, 1.0, 0.7, 0.3], dtype=torch.float64)
        x = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
        moved = real_run(optimiser, x, rates, (torch.zeros(N, dtype=torch.float64),), 1.0)
        path = TaylorPath(Sgd(momentum, nesterov), Clock(rates), G, H @ G)
        return float((path.displacement(5) - moved).norm())

    assert miss(2e-3) / miss(1e-3) == pytest.approx(8.0, rel=0.1)


def flow(t: float) -> Tensor:
    solution = solve_ivp(
        lambda _, x: -gradient(torch.tensor(x)).numpy(), (0, t), [0.0] * N, rtol=1e-11, atol=1e-13, method="DOP853"
    )
    return torch.tensor(solution.y[:, -1])


def curved(metric: Metric, rates: Tensor, probe_step: int) -> CurvedPath:
    linear = LinearPath(metric, Clock(rates), slope(G))
    return CurvedPath(linear, slope(gradient(linear.displacement(probe_step))), probe_step)


@pytest.mark.parametrize("probe_step", [2, 4])
def test_curved_path_misses_gradient_flow_by_third_order(probe_step: int) -> None:
    def miss(rate: float) -> float:
        path = curved(Sgd(), torch.full((4,), rate, dtype=torch.float64), probe_step)
        return float((path.displacement(4) - flow(4 * rate)).norm())

    assert miss(2e-3) / miss(1e-3) == pytest.approx(8.0, rel=0.1)


def test_curved_path_is_gradient_flow_and_not_its_first_steps() -> None:
    """Its curvature term is t^2/2 H g where k real steps have eta^2 k (k - 1) / 2: too much by k / (k - 1)."""
    rate = 1e-5
    for k in (2, 8):
        rates = torch.full((k,), rate, dtype=torch.float64)
        x = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        moved = real_run(torch.optim.SGD([x], lr=1.0), x, rates, (torch.zeros(N, dtype=torch.float64),), 1.0)
        path = curved(Sgd(), rates, k)
        turn, turned = path.displacement(k) - path.linear.displacement(k), moved - path.linear.displacement(k)
        assert_close(float(turn @ turned / (turned @ turned)), k / (k - 1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("betas", [(0.5, 0.9), (0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize(("rate", "steps"), [(5e-3, 60), (1e-3, 60)])
def test_curved_path_follows_real_adam_on_a_cubic_loss(betas: tuple[float, float], rate: float, steps: int) -> None:
    """The bounded rule with a changing gradient takes at least six tenths of the straight path's error away.

    What is left is Adam's memory of earlier squares; 0.013 of a move of 0.54 at the usual betas.
    """
    spread = torch.full((N,), 2.0, dtype=torch.float64)
    rates = torch.full((steps,), rate, dtype=torch.float64)
    x = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([x], lr=1.0, weight_decay=0.0, betas=betas)
    moved = real_run(optimiser, x, rates, (spread, -spread), 1.0)
    linear = LinearPath(Adam(betas), Clock(rates), slope(G, spread))
    probe_step = steps // 2
    probe = slope(gradient(linear.displacement(probe_step)), spread)
    straight = float((linear.displacement(steps) - moved).norm())
    bent = float((CurvedPath(linear, probe, probe_step).displacement(steps) - moved).norm())
    assert bent < 0.4 * straight
    assert bent < 0.03 * float(moved.norm())


@SCALES
def test_curved_path_with_an_unchanged_probe_is_the_linear_path(scale: float) -> None:
    linear = LinearPath(Adam(weight_decay=0.1), Clock.constant(scale, 6), slope(G, G.abs()), normal(7, N))
    assert_close(CurvedPath(linear, linear.slope, 3).displacement(5), linear.displacement(5))


@SCALES
@pytest.mark.parametrize("wide", [torch.float64, torch.bfloat16])
def test_curved_path_on_a_parabola_by_hand(scale: float, wide: torch.dtype) -> None:
    """T - h T^2 / 2 of g on h x^2 / 2, with the probe half-way; probes may be kept in bfloat16."""
    h, steps = 0.02 / scale, 8
    rates = torch.full((steps,), scale / steps, dtype=torch.float64)
    t, g = scale, torch.tensor([2.0, -3.0], dtype=torch.float64)
    linear = LinearPath(Sgd(), Clock(rates), slope(g))
    path = CurvedPath(linear, slope((g + h * linear.displacement(4)).to(wide)), 4)
    close = {"rtol": 1e-12, "atol": 0.0} if wide == torch.float64 else {"rtol": 2**-8, "atol": 0.0}
    assert_close(path.displacement(8), -g * (t - h * t**2 / 2), **close)
    assert_close(path.displacement(4), -g * (t / 2 - h * t**2 / 8), **close)


def test_spread_is_interpolated_and_never_negative() -> None:
    """A spread that shrinks to nothing by the probe stays at nothing beyond it: sign descent there."""
    one = torch.ones(1, dtype=torch.float64)
    linear = LinearPath(Adam(epsilon=0.0), Clock.constant(1.0, 8), slope(one, one))
    path = CurvedPath(linear, slope(one, 0 * one), 4, nodes=2000)
    # first half: integral of 1/sqrt(1 + (1 - s)^2), s from 0 to 1, four steps long; second half: four steps of size 1
    expected = -4 * torch.asinh(one) - 4
    assert_close(path.displacement(8), expected, rtol=1e-6, atol=0)


def test_probe_at_the_anchor_is_refused() -> None:
    rates = torch.tensor([0.0, 0.1], dtype=torch.float64)
    path = CurvedPath(LinearPath(Sgd(), Clock(rates), slope(G)), slope(G), 1)
    with pytest.raises(DegenerateError, match="later probe step"):
        path.displacement(2)
