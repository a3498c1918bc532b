"""Every system solved by hand against an integrator or dense automatic differentiation."""

import math

import numpy as np
import pytest
import torch
from mpmath import mp
from scipy.integrate import solve_ivp
from torch.testing import assert_close

from tiltmeter.errors import DegenerateError, SpaceMismatch
from tiltmeter.geometry.systems import (
    DOUBLE,
    CurvedSoftmax,
    Quadratic,
    exact_kl,
    orthogonal_slope,
    rotation,
    score_objective,
)
from tiltmeter.geometry.systems_lora import Lora
from tiltmeter.geometry.systems_saddle import LopsidedCoin, Saddle, TurningAxis, log_cosh

SCALES = [1e-2, 1.0, 1e2]


def flow(objective, flow_time):
    """Gradient flow of an objective's mean loss by an adaptive integrator, as a displacement."""

    def velocity(_, x):
        return -objective.gradient(displacement=torch.from_numpy(np.array(x))).numpy()

    start = np.zeros(objective.space.size)
    end = solve_ivp(velocity, (0, flow_time), start, method="DOP853", rtol=1e-11, atol=1e-14).y[:, -1]
    return torch.from_numpy(end)


def dense(objective):
    """Gradient [n] and Hessian [n, n] of the mean loss at the anchor."""

    def mean(x):
        return objective.function(x).mean()

    return torch.func.grad(mean)(objective.anchor), torch.func.hessian(mean)(objective.anchor)


def path_derivatives(model, velocity, acceleration):
    """First and second derivative of every log p along a parabola, [m, y] each, by nested reverse mode."""
    jacobian = torch.func.jacrev(model.log_probability)
    hessian = torch.func.jacrev(jacobian)(model.anchor)
    slope = jacobian(model.anchor)
    bend = torch.einsum("i,myij,j->my", velocity, hessian, velocity)
    return slope @ velocity, slope @ acceleration + bend


def covariance(model, a, b):
    p = model.log_probability(model.anchor).exp()
    return (p * a * b).sum(-1) - (p * a).sum(-1) * (p * b).sum(-1)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 5e-3, 2e-2, 1.0, 10.0])
def test_exact_kl_keeps_its_digits_where_the_plain_sum_has_lost_them(size):
    p, change = [0.5, 0.3, 0.2], [size, -2 * size, 0.5 * size]
    with mp.workdps(60):
        shift = mp.log(sum(mp.mpf(q) * mp.exp(mp.mpf(c)) for q, c in zip(p, change, strict=True)))
        expected = float(sum(mp.mpf(q) * (shift - mp.mpf(c)) for q, c in zip(p, change, strict=True)))
    found = exact_kl(torch.tensor(p, dtype=DOUBLE), torch.tensor(change, dtype=DOUBLE))
    # p itself adds up to 1 only within 1e-16, which a change of 1e-12 can feel
    assert_close(float(found), expected, rtol=1e-3 if size < 1e-9 else 1e-9, atol=0)


@pytest.mark.parametrize("f", [0.0, 1e-9, 1e-4, 0.01, 1.0, 30.0, 500.0])
def test_log_cosh(f):
    with mp.workdps(50):
        expected = float(mp.log(mp.cosh(mp.mpf(f))))
    assert_close(log_cosh(f), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("curvature", SCALES)
@pytest.mark.parametrize("own", [0.0, 0.7, -0.4])
def test_saddle_trajectory_against_an_integrator(curvature, own):
    system = Saddle(curvature=curvature, own=own * curvature)
    t = 1.3 / curvature
    assert_close(system.displacement(t), flow(system.tuning.objective, t), rtol=1e-8, atol=0)
    assert_close(system.displacement(t), system.tuning.displacement(t), rtol=1e-10, atol=0)


def test_saddle_trajectory_is_the_one_in_the_literature():
    x, y = Saddle(curvature=2.0).position(0.4)
    assert_close((x, y), ((math.cosh(0.8) - 1) / 2, -math.sinh(0.8) / 2))


@pytest.mark.parametrize("t", [1e-4, 0.1, 1.0])
def test_saddle_small_time_and_own_curvature_join_smoothly(t):
    near = Saddle(curvature=1.0, own=1e-9).position(t)
    assert_close(near, Saddle(curvature=1.0).position(t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sharpness", SCALES)
def test_saddle_kl_and_constants_against_dense_derivatives(sharpness):
    system = Saddle(2.0, sharpness, own=0.4, overlap=0.3, angle=0.9, bend=-0.6)
    found = float(system.safety.losses(system.displacement(0.3)).mean())
    assert_close(system.kl(0.3), found, rtol=1e-9, atol=1e-14)
    gradient, hessian = dense(system.tuning.objective)
    turned = hessian @ gradient
    first, second = path_derivatives(system.safety, -gradient, turned)
    scores = path_derivatives(system.safety, turned, torch.zeros_like(turned))[0]
    expected = [covariance(system.safety, a, b) for a, b in [(first, first), (first, second), (second, second)]]
    assert_close(torch.tensor([system.overlap**2, system.cross, system.full]).double(), torch.cat(expected))
    assert_close(system.coupling, float(covariance(system.safety, scores, scores)))
    assert_close(system.crossover, 2 * system.overlap / system.coupling**0.5)


@pytest.mark.parametrize("slope", SCALES)
@pytest.mark.parametrize("probability", [0.9, 0.5, 0.2])
def test_lopsided_coin_against_derivatives_of_the_model(slope, probability):
    coin = LopsidedCoin(probability, slope)
    t = 0.3 / slope
    found = float(coin.safety.losses(torch.tensor([-t], dtype=DOUBLE)).mean())
    assert_close(coin.kl(t), found, rtol=1e-9, atol=1e-15)

    def kl(time):
        reference = coin.safety.log_probability(coin.safety.anchor)
        return (reference.exp() * (reference - coin.safety.log_probability(-time[None]))).sum()

    second = torch.func.grad(torch.func.grad(kl))
    zero = torch.zeros((), dtype=DOUBLE)
    assert_close(coin.quadratic, float(second(zero)) / 2)
    assert_close(coin.cubic, float(torch.func.grad(second)(zero)) / 6, rtol=1e-9, atol=1e-12 * slope**3)


@pytest.mark.parametrize("turning", SCALES)
def test_turning_axis_against_the_fisher_matrix(turning):
    system = TurningAxis(3.0, turning)
    for t in (0.0, 0.5):
        scores = torch.func.jacrev(system.logits)(system.displacement(t))[0]
        axis = scores[0] / scores[0].norm()
        assert_close(system.sine(t), float(axis[1:].norm()), rtol=1e-12, atol=1e-15)
    assert_close(system.logits(system.displacement(0.5)), torch.zeros(1, 2, dtype=DOUBLE))


def test_curved_softmax_against_dense_derivatives():
    model = CurvedSoftmax.random(3, 4, 5, seed=1)
    x, u = 0.3 * rotation(5, 2)[0], rotation(5, 3)[0]
    safety = model.safety
    assert_close(model.kl(x), safety.losses(x))
    assert_close(model.scores(x), torch.func.jacrev(safety.log_probability)(x))
    hessian = torch.func.hessian(safety.log_probability)(torch.zeros(5, dtype=DOUBLE))
    assert_close(model.score_curvature(u), torch.einsum("i,myij,j->my", u, hessian, u))
    mean_kl = torch.func.hessian(lambda v: safety._kl.function(v).mean())(torch.zeros(5, dtype=DOUBLE))
    assert_close(model.fisher(torch.zeros(5, dtype=DOUBLE)).mean(0), mean_kl)
    jacobian = torch.func.jacrev(score_objective(safety).function)(torch.zeros(5, dtype=DOUBLE))
    assert_close(jacobian.T @ jacobian / 12, mean_kl)


def test_orthogonal_slope_is_felt_by_no_score():
    model = CurvedSoftmax.random(2, 3, 8, seed=4)
    slope = orthogonal_slope(model, 5)
    assert_close(model.scores(torch.zeros(8, dtype=DOUBLE)) @ slope, torch.zeros(2, 3, dtype=DOUBLE))
    assert_close(float(slope.norm()), 1.0)


@pytest.mark.parametrize("scale", SCALES)
def test_quadratic_flow_and_descent_also_with_flat_and_negative_curvature(scale):
    system = Quadratic.with_spectrum(rotation(4, 0)[0], [2.0 * scale, 0.0, -scale, 0.1 * scale], seed=1)
    t = 0.8 / scale
    assert_close(system.displacement(t), flow(system.objective, t), rtol=1e-8, atol=1e-12)
    theta = torch.zeros(4, dtype=DOUBLE, requires_grad=True)
    optimiser = torch.optim.SGD([theta], lr=0.1 / scale, momentum=0.7)
    for _ in range(9):
        optimiser.zero_grad()
        system.objective.function(theta).mean().backward()
        optimiser.step()
    assert_close(system.descent([0.1 / scale] * 9, 0.7)[-1], theta.detach())


def test_quadratic_examples_differ_by_their_noise_and_shapes_are_checked():
    noise, turned = rotation(4, 2)[:3], torch.stack([rotation(4, 3) + rotation(4, 3).T] * 3)
    system = Quadratic(rotation(4, 0)[0], torch.eye(4, dtype=DOUBLE), noise, turned)
    gradient, hessian = dense(system.objective)
    assert_close(gradient, system.slope + noise.mean(0))
    assert_close(hessian, system.hessian + turned.mean(0))
    with pytest.raises(SpaceMismatch):
        Quadratic(system.slope, torch.eye(3, dtype=DOUBLE), noise, turned)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_lora_flow_against_an_integrator(scale):
    system = Lora.random(seed=3, scale=scale)
    t = 0.7 / scale
    assert_close(system.displacement(t), flow(system.tuning, t), rtol=1e-7, atol=1e-9)
    assert_close(system.kl(0.02 / scale**2), system.safety.losses(system.displacement(0.02 / scale**2)))


@pytest.mark.parametrize("stiffness", [0.0, 0.7])
@pytest.mark.parametrize("scale", SCALES)
def test_lora_first_and_second_motion_against_dense_derivatives(scale, stiffness):
    drawn = Lora.random(seed=3, scale=scale)
    system = Lora(drawn.start, drawn.pull, scale, drawn.base, drawn.inputs, stiffness)
    gradient, hessian = dense(system.tuning)
    assert_close(system.first, gradient)
    assert_close(system.second, hessian @ gradient, rtol=1e-9, atol=1e-9 * float(system.second.norm()))

    def weights(t):
        part = system.space.split(system.anchor - t * gradient + t**2 / 2 * hessian @ gradient)
        return scale * part["B"] @ part["A"]

    second = torch.func.jacfwd(torch.func.jacfwd(weights))(torch.zeros((), dtype=DOUBLE))
    size = max(1e-30, float(second.norm()))
    assert_close(system.second_in_weights / size, second / size, rtol=1e-9, atol=1e-9)


def test_lora_trajectory_is_refused_where_it_is_not_known():
    drawn = Lora.random(seed=3)
    with pytest.raises(DegenerateError):
        Lora(drawn.start, drawn.pull, 1.0, drawn.base, drawn.inputs, 0.5).displacement(0.1)
