"""The laws of projection in the guard itself: in which metric, and how often the directions are measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, orthogonal_slope
from tiltmeter.guards.budget import CurvatureBudget
from tiltmeter.guards.ellipsoid import onto_ellipsoid
from tiltmeter.guards.gradient_projection import GradientProjection
from tiltmeter.guards.none import NoGuard
from tiltmeter.guards.safety import SystemSafety
from tiltmeter.guards.session import Session
from tiltmeter.guards.trainee import Trainee

SPECTRUM = [0.5, 1.0, -0.5, 2.0, 0.3, 1.5, -1.0, 0.8]


def kl_after(guard, flow_time, *, steps=64, adam=False, seed=0, orthogonal=True):
    """Exact KL after gradient descent (or Adam) on a quadratic task whose slope no score feels at the anchor."""
    model = CurvedSoftmax.random(1, 4, 8, seed)
    felt = torch.ones(8, dtype=DOUBLE) / 8**0.5
    tuning = Quadratic.with_spectrum(orthogonal_slope(model, seed + 1) if orthogonal else felt, SPECTRUM, seed + 3)
    theta = nn.Parameter(torch.zeros(8, dtype=DOUBLE))

    def logits(x):
        return model.bias + model.change(x)

    safety = SystemSafety(logits, logits, torch.zeros(8, dtype=DOUBLE), theta.data, ParameterSpace(("x",), ((8,),)))
    rate = flow_time / steps
    optimizer = torch.optim.AdamW([theta], lr=rate, weight_decay=0.0) if adam else torch.optim.SGD([theta], lr=rate)
    session = Session(guard, Trainee({"x": theta}, optimizer, safety))
    session.begin()
    for _ in range(steps):
        optimizer.zero_grad()
        (tuning.slope @ theta + theta @ tuning.hessian @ theta / 2).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    session.end()
    return float(model.kl(theta.detach()).mean())


def projection(refresh, **more):
    """Plain projection: no budget to spend, no control, each basis begun at zero."""
    return CurvatureBudget(budget_kl=0.0, check=0, carry=False, steer=False, refresh=refresh, **more)


def slope(values, at):
    """Log-log slope of values over `at`, by least squares."""
    x, y = torch.tensor(at).double().log(), torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_refreshing_n_times_divides_the_kl_by_n_squared():
    counts = [1, 2, 4, 8]
    kl = [kl_after(projection(128 // n), 0.02, steps=128) for n in counts]
    found = slope(kl, counts)
    print(f"log-log slope of KL over the number of refreshes: {found:.3f} (law: -2)")
    assert found == pytest.approx(-2.0, abs=0.1)


def test_with_the_log_likelihoods_read_it_falls_faster_than_that():
    """Putting right, at a refresh, what the old directions let through leaves one interval's error: n^-4."""
    counts = [1, 2, 4, 8]
    plain = [kl_after(projection(128 // n), 0.02, steps=128) for n in counts]
    carried = [
        kl_after(CurvatureBudget(budget_kl=0.0, check=0, steer=False, refresh=128 // n), 0.02, steps=128)
        for n in counts
    ]
    found = slope(carried[1:], counts[1:])
    print(f"log-log slope when the log-likelihoods are read at each refresh: {found:.3f} (law: -4)")
    assert found < -3.0
    assert all(c < p for c, p in zip(carried[1:], plain[1:], strict=True))


def test_held_out_kl_grows_with_the_fourth_power_of_time_under_a_complete_basis():
    times = [0.01, 0.02, 0.04]
    whole = slope([kl_after(projection(10**6), t) for t in times], times)
    print(f"log-log slope of KL over flow time, complete basis: {whole:.3f} (law: 4)")
    assert whole == pytest.approx(4.0, abs=0.1)


def test_a_truncated_basis_leaves_the_second_power():
    """One direction of three, and a slope that safety feels from the start: a guard's log shows 2, not 4."""
    times = [0.01, 0.02, 0.04]
    found = slope([kl_after(projection(10**6, rank=1), t, orthogonal=False) for t in times], times)
    print(f"log-log slope of KL over flow time, truncated basis: {found:.3f} (law: 2)")
    assert found == pytest.approx(2.0, abs=0.1)


def test_gradient_projection_does_nothing_under_adam_and_the_update_in_the_metric_does():
    """The slope is orthogonal to all scores; Adam turns it into its signs, which are not."""
    free = kl_after(NoGuard(), 0.05, adam=True)
    gradient = kl_after(GradientProjection(references=2), 0.05, adam=True)
    update = kl_after(projection(10**6), 0.05, adam=True)
    print(f"KL under Adam: free {free:.2e}, gradient projected {gradient:.2e}, update projected {update:.2e}")
    assert gradient > free / 10
    assert update < 1e-2 * free


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("seed", range(3))
def test_the_ellipsoid_step_is_the_closest_point_by_scipy(scale, seed):
    """Constrained minimisation by SLSQP in the coordinates where the metric is plain."""
    from scipy.optimize import minimize

    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, dtype=DOUBLE, generator=generator)
    metric = root @ root.T + 0.3 * torch.eye(4, dtype=DOUBLE)
    eigenvalues = scale * torch.rand(4, dtype=DOUBLE, generator=generator) + scale / 10
    z = torch.randn(4, dtype=DOUBLE, generator=generator) * 3
    budget = 0.1 * float((eigenvalues * z * z).sum()) / 2
    inverse = torch.linalg.inv(metric)

    def energy(x):
        return float((eigenvalues * torch.tensor(x) ** 2).sum()) / 2

    found = onto_ellipsoid(z, metric, eigenvalues, budget)
    best = minimize(
        lambda x: float((torch.tensor(x) - z) @ inverse @ (torch.tensor(x) - z)),
        (0.3 * z).numpy(),
        constraints={"type": "ineq", "fun": lambda x: 1 - energy(x) / budget},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    torch.testing.assert_close(found, torch.tensor(best.x), rtol=1e-4, atol=1e-5)
    assert math.isclose(energy(found.numpy()), budget, rel_tol=1e-9)


def test_inside_the_ellipsoid_nothing_moves_and_a_budget_of_zero_stops_everything():
    z, metric = torch.tensor([0.1, 0.2], dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    torch.testing.assert_close(onto_ellipsoid(z, metric, torch.ones(2), 1.0), z)
    torch.testing.assert_close(onto_ellipsoid(z, metric, torch.ones(2), 0.0), torch.zeros(2, dtype=DOUBLE))
