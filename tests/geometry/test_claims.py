"""The measurements and paths against dense float64 derivatives, at sharpness 1e-2, 1 and 1e2: at 1 a factor hides."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch.testing import assert_close

from tiltmeter.errors import SpaceMismatch
from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.motion import (
    between_groups,
    measure_acceleration,
    measure_coupling,
    measure_krylov,
    measure_slope,
)
from tiltmeter.geometry.objective import FunctionObjective
from tiltmeter.geometry.path import CurvedPath, KrylovPath, LinearPath, TaylorPath
from tiltmeter.geometry.projection import project_update
from tiltmeter.geometry.sensitivity import measure_sensitivity
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, batches, rotation, score_objective
from tiltmeter.geometry.systems_saddle import LopsidedCoin, Saddle

SCALES = [1e-2, 1.0, 1e2]
EIGENVALUES = [2.0, 1.0, -0.5, 0.3, 0.0, 1.5]
few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def measured(tuning, safety):
    slope = measure_slope(tuning, batches(tuning.m))
    acceleration = measure_acceleration(tuning, slope)
    return slope, acceleration, measure_coupling(safety, slope, acceleration)


def random_system(seed, scale=1.0):
    slope = rotation(6, seed)[0]
    tuning = Quadratic.with_spectrum(slope, EIGENVALUES, seed + 1)
    return tuning, CurvedSoftmax.random(3, 4, 6, seed + 2, scale)


@few
@given(seed=seeds, exponent=st.integers(-2, 2))
def test_coupling_against_dense_derivatives(seed, exponent):
    scale = 10.0**exponent
    tuning, model = random_system(seed, scale)
    slope, acceleration, coupling = measured(tuning.objective, model.safety)
    g, h = tuning.slope, tuning.hessian @ tuning.slope
    assert_close(slope.mean, g)
    assert_close(acceleration.value, h)
    p = model.probability
    hessian = torch.func.hessian(model.safety.log_probability)(torch.zeros(6, dtype=DOUBLE))
    scores = torch.func.jacrev(model.safety.log_probability)(torch.zeros(6, dtype=DOUBLE))
    first = -(scores @ g)
    second = scores @ h + torch.einsum("i,myij,j->my", g, hessian, g)
    second = second - (p * second).sum(-1, keepdim=True)
    tolerance = {"rtol": 1e-8, "atol": 1e-9 * scale}
    assert_close(coupling.overlap, (p * first**2).sum(-1), **tolerance)
    assert_close(coupling.cross, (p * first * second).sum(-1), **tolerance)
    assert_close(coupling.full, (p * second**2).sum(-1), **tolerance)
    assert_close(coupling.coupling, (p * (scores @ h) ** 2).sum(-1), **tolerance)


@pytest.mark.parametrize("sharpness", SCALES)
def test_quartic_law_on_a_system_solved_by_hand(sharpness):
    """L = y + c x y from the origin gives x(t) = (cosh ct - 1) / c exactly."""
    system = Saddle(curvature=2.0, sharpness=sharpness)
    t = 1e-3 / math.sqrt(max(1.0, sharpness))
    coupling = measured(system.tuning.objective, system.safety)[2]
    x = (math.cosh(2 * t) - 1) / 2
    law = coupling.polynomial(torch.tensor([t], dtype=DOUBLE))
    assert_close(float(law[0, 0]), sharpness * x**2 / 2, rtol=1e-4, atol=0)
    assert_close(float(coupling.coupling), 4 * sharpness)


@pytest.mark.parametrize("overlap", SCALES)
@pytest.mark.parametrize("angle", [0.3, 2.8])
def test_low_order_law_with_overlap_of_both_signs(overlap, angle):
    system = Saddle(curvature=1.0, sharpness=1e4, overlap=overlap, angle=angle)
    coupling = measured(system.tuning.objective, system.safety)[2]
    assert float(coupling.cross) * math.cos(angle) < 0
    t = 1e-3 * min(1.0, 1 / overlap)
    law = coupling.polynomial(torch.tensor([t], dtype=DOUBLE))
    assert_close(float(law[0, 0]), system.kl(t), rtol=2e-3, atol=0)


@pytest.mark.parametrize("slope", SCALES)
def test_what_the_law_leaves_out_is_the_third_moment(slope):
    coin = LopsidedCoin(0.85, slope)
    coupling = measured(coin.tuning.objective, coin.safety)[2]
    t = 1e-3 / slope
    missing = coin.kl(t) - float(coupling.polynomial(torch.tensor([t], dtype=DOUBLE))[0, 0])
    assert_close(missing, coin.cubic * t**3, rtol=2e-3, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_noisy_coupling_is_a_product_of_two_estimates_that_share_no_batch(scale):
    """By dense algebra on four batches that differ in gradient and Hessian."""
    quiet, model = random_system(7)
    noise = scale * rotation(6, 1)[:4]
    turned = scale * torch.stack([rotation(6, k) + rotation(6, k).T for k in range(4)])
    coupling = measured(Quadratic(quiet.slope, quiet.hessian, noise, turned).objective, model.safety)[2]
    g, h = quiet.slope + noise, quiet.hessian + turned
    first, second = (h[0] @ g[1] + h[1] @ g[0]) / 2, (h[2] @ g[3] + h[3] @ g[2]) / 2
    fisher = model.fisher(torch.zeros(6, dtype=DOUBLE))
    assert_close(coupling.coupling, torch.einsum("i,mij,j->m", first, fisher, second))
    pairs = [g[i] @ fisher @ g[j] for i in range(4) for j in range(4) if i != j]
    assert_close(coupling.overlap, torch.stack(pairs).mean(0))


def test_products_of_different_groups_by_hand():
    forms = torch.tensor([[[4.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 25.0]]])
    assert_close(between_groups(forms), torch.tensor([2.0]))
    assert_close(between_groups(forms[:, :1, :1]), torch.tensor([4.0]))


@pytest.mark.parametrize("scale", SCALES)
def test_energy_is_the_second_order_kl(scale):
    model = CurvedSoftmax.random(2, 4, 6, 3, scale)
    sensitivity = measure_sensitivity(score_objective(model.safety), 4)
    fisher = model.fisher(torch.zeros(6, dtype=DOUBLE)).mean(0)
    assert_close(sensitivity.eigenvalues, torch.linalg.eigvalsh(fisher).flip(0)[:4])
    z = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=DOUBLE)
    x = sensitivity.lift(z)
    assert_close(float(sensitivity.energy(sensitivity.coordinates(x))), float(x @ fisher @ x) / 2)
    assert_close(model.safety.hvp(x), fisher @ x)


@few
@given(seed=seeds, momentum=st.sampled_from([0.0, 0.5, 0.9]), nesterov=st.booleans())
def test_sgd_coefficients_against_torch(seed, momentum, nesterov):
    """Position, and its first two orders in the loss, of torch.optim.SGD under a random schedule."""
    nesterov = nesterov and momentum > 0
    rates = torch.rand(8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * 0.3
    metric, clock = Sgd(momentum, nesterov), Clock(rates)

    def end(curvature):
        theta = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
        optimiser = torch.optim.SGD([theta], lr=0.0, momentum=momentum, nesterov=nesterov)
        for rate in rates.tolist():
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            (theta + curvature * theta**2 / 2).sum().backward()
            optimiser.step()
        return theta.item()

    assert_close(float(metric.response(clock, torch.tensor([0.7], dtype=DOUBLE))[-1]), end(0.7))
    assert_close(float(metric.flow_time(clock)[-1]), -end(0.0))
    slope = (end(1e-4) - end(-1e-4)) / 2e-4
    assert_close(float(metric.second_order(clock)[-1]), slope, rtol=1e-5, atol=1e-9)
    assert_close(float(clock.flow_time[-1]), float(rates.sum()))
    assert_close(float(clock.squared_rates[-1]), float((rates**2).sum()))


@few
@given(seed=seeds, size=st.sampled_from([1.0, 30.0, 1000.0]))
def test_krylov_path_is_exact_on_few_eigenvalues(seed, size):
    system = Quadratic.with_spectrum(2.5 * rotation(9, seed)[0], [size] * 3 + [1.0] * 3 + [-0.2] * 3, seed + 1)
    clock = Clock.constant(10 / size / 40, 40)
    krylov = measure_krylov(system.objective, measure_slope(system.objective, batches(4)), 5)
    assert_close(KrylovPath(Sgd(0.6), clock, krylov).displacement(40), system.descent(clock.rates.tolist(), 0.6)[-1])
    assert_close(KrylovPath(Sgd(), clock, krylov).displacement(13), system.descent(clock.rates.tolist())[13])


def test_clipped_krylov_path_stops_growing():
    system = Quadratic.with_spectrum(rotation(4, 0)[0], [3.0, 1.0, 0.5, -2.0], 1)
    krylov = measure_krylov(system.objective, measure_slope(system.objective, batches(4)), 4)
    clock = Clock.constant(0.01, 300)
    frame = torch.linalg.eigh(system.hessian)
    held = Quadratic.quiet(system.slope, (frame[1] * frame[0].clamp_min(0)) @ frame[1].T)
    assert_close(
        KrylovPath(Sgd(), clock, krylov, clipped=True).displacement(300), held.descent(clock.rates.tolist())[-1]
    )


@pytest.mark.parametrize("scale", SCALES)
def test_taylor_and_curved_paths_have_the_right_second_order(scale):
    system = Quadratic.with_spectrum(rotation(6, 0)[0], [scale * e for e in EIGENVALUES], 1)
    slope = measure_slope(system.objective, batches(4))
    acceleration = measure_acceleration(system.objective, slope).value
    clock = Clock.constant(1e-3 / scale / 10, 10)
    dense = system.descent(clock.rates.tolist())[-1]
    taylor = TaylorPath(Sgd(), clock, slope.mean, acceleration).displacement(10)
    linear = LinearPath(Sgd(), clock, slope)
    curved = CurvedPath(linear, measure_slope(system.objective, batches(4), displacement=linear.displacement(10)), 10)
    bend = (dense - linear.displacement(10)).norm()
    assert (taylor - dense).norm() < 2e-3 * bend
    flow = system.displacement(1e-3 / scale)
    assert (curved.displacement(10) - flow).norm() < 2e-3 * (flow - linear.displacement(10)).norm()


@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
def test_adam_paths_against_the_integrated_bounded_rule(noise):
    base = Quadratic.with_spectrum(torch.tensor([1.0, -0.5, 0.3, 0.8], dtype=DOUBLE), [2.0, 1.0, -0.5, 0.3], 1)
    sigma = noise * torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=DOUBLE)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=DOUBLE)[:, None]
    tuning = Quadratic(base.slope, base.hessian, signs * sigma, base.hessian_noise).objective
    slope = measure_slope(tuning, batches(4))
    assert_close(slope.spread, sigma)
    expected = 1 / ((base.slope**2 + sigma**2).sqrt() + 1e-8)
    assert_close(Adam().preconditioner(slope.mean, slope.spread), expected)
    assert_close(Adam().direction(slope.mean, slope.spread), expected * base.slope)
    linear = LinearPath(Adam(), Clock.constant(1e-2, 10), slope)
    probe = measure_slope(tuning, batches(4), displacement=linear.displacement(10))
    hessian, g, s = base.hessian.numpy(), base.slope.numpy(), sigma.numpy()

    def rule(_, x):
        mean = g + hessian @ x
        return -mean / (np.sqrt(mean**2 + s**2) + 1e-8)

    end = torch.from_numpy(solve_ivp(rule, (0, 0.1), np.zeros(4), rtol=1e-10, atol=1e-13).y[:, -1])
    assert_close(CurvedPath(linear, probe, 10).displacement(10), end, rtol=5e-3, atol=5e-5)


@pytest.mark.parametrize("metric", [Sgd(momentum=0.5, weight_decay=0.2), Adam(weight_decay=0.2)])
def test_weight_decay_pulls_with_decay_times_theta(metric):
    slope = measure_slope(Quadratic.quiet(rotation(3, 0)[0], torch.zeros(3, 3, dtype=DOUBLE)).objective, batches(4))
    theta, clock = torch.tensor([3.0, -2.0, 1.0], dtype=DOUBLE), Clock.constant(0.1, 5)
    pulled = LinearPath(metric, clock, slope, theta).displacement(5) - LinearPath(metric, clock, slope).displacement(5)
    assert_close(pulled, -0.2 * float(metric.flow_time(clock)[5]) * theta)


@few
@given(seed=seeds, rank=st.integers(1, 4), repeat=st.booleans())
def test_projection_against_dense_least_squares(seed, rank, repeat):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 6, dtype=DOUBLE, generator=generator) * 10.0 ** torch.arange(rank)[:, None]
    columns = list(basis) + ([basis.sum(0)] if repeat else [])
    update = torch.randn(6, dtype=DOUBLE, generator=generator)
    d = torch.rand(6, dtype=DOUBLE, generator=generator) + 0.1
    kept = update.clone()
    found = project_update(update, columns, d)
    expected = update - torch.diag(d) @ basis.T @ torch.linalg.solve(basis @ torch.diag(d) @ basis.T, basis @ update)
    assert_close(found, expected)
    assert_close(update, kept)
    assert_close(project_update(found, columns, d), found)
    assert_close(project_update(update, columns), update - torch.linalg.pinv(basis) @ basis @ update)


def test_projection_without_columns_and_with_wrong_shapes():
    update = torch.arange(3.0)
    assert_close(project_update(update, []), update)
    assert_close(project_update(update, [torch.zeros(3)]), update)
    with pytest.raises(SpaceMismatch):
        project_update(update, [torch.ones(4)])
    with pytest.raises(SpaceMismatch):
        project_update(update, [torch.ones(3)], torch.ones(2))


def test_projection_refreshed_leaves_less_by_the_square_of_the_count():
    """Flow under a projection is piecewise linear, so `expm` is exact."""
    tuning, model = random_system(5)
    model = CurvedSoftmax(model.bias[:1], model.slopes[:1], model.bends[:1])

    def kl(time, refreshes):
        x = torch.zeros(6, dtype=DOUBLE)
        for _ in range(refreshes):
            scores = list(model.scores(x)[0])
            motion = torch.stack([project_update(-e, scores) for e in torch.eye(6, dtype=DOUBLE)], 1)
            affine = torch.zeros(7, 7, dtype=DOUBLE)
            affine[:6, :6], affine[:6, 6] = motion @ tuning.hessian, motion @ tuning.slope
            end = torch.from_numpy(expm((affine * time / refreshes).numpy()))
            x = end[:6, :6] @ x + end[:6, 6]
        return float(model.kl(x).mean())

    base = kl(2e-3, 1)
    for n in (2, 4, 8):
        assert_close(base / kl(2e-3, n), float(n**2), rtol=0.02, atol=0)


def test_mean_gradient_and_hessian_are_means_over_examples():
    slopes = torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 8.0]], dtype=DOUBLE)
    objective = FunctionObjective(lambda x: slopes @ x + (slopes @ x) ** 2 / 2, torch.zeros(2, dtype=DOUBLE))
    assert_close(objective.gradient(), slopes.mean(0))
    v = torch.tensor([0.3, -0.7], dtype=DOUBLE)
    assert_close(objective.hvp(v), slopes.T @ slopes @ v / 3)
    slope = measure_slope(objective, batches(3), groups=3)
    assert_close(slope.spread, slopes.std(0, unbiased=False))
    assert_close(torch.stack(slope.groups), slopes)
