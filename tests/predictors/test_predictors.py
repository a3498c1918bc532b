"""Every predictor on a system where its answer is known by hand, at several scales."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import DOUBLE, N, world
from torch.testing import assert_close

from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.predictors.canary import (
    canary_kl,
    canary_length,
    canary_margin,
    canary_steps,
    descend,
    run_canary,
)
from tiltmeter.predictors.contract import FEWER, REHEARSED, Measured, States
from tiltmeter.predictors.names import MEASURED, OURS, PREDICTORS

SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])


def value(name: str, case) -> float:
    risk = PREDICTORS[name](case)
    assert risk.reason is None, risk.reason
    assert risk.value is not None
    return risk.value


@SCALES
def test_margin_drop_of_the_straight_and_of_the_krylov_path(scale: float) -> None:
    """A linear margin, a quadratic loss: the straight path is -t g, the Krylov path is gradient descent itself."""
    w = world(scale)
    flow = 0.05 * 20
    assert_close(value("linear_margin", w.case), float((w.pull @ (-flow * w.tuning.slope)).mean()))
    end = w.tuning.descent([0.05] * 20)[-1]
    assert_close(value("krylov_margin", w.case), float((w.pull @ end).mean()))
    # a short run: no gradient is carried through zero, and the secant is the Hessian
    w = world(scale, steps=4)
    bent = -0.2 * w.tuning.slope + 0.02 * w.tuning.hessian @ w.tuning.slope
    assert_close(value("curved_margin", w.case), float((w.pull @ bent).mean()))
    # with a look for every step a rehearsal is the run
    assert_close(value("rehearsal_margin", w.case), float((w.pull @ w.tuning.descent([0.05] * 4)[-1]).mean()))


@SCALES
def test_kl_of_the_paths(scale: float) -> None:
    w = world(scale / 10)
    assert_close(value("linear_kl", w.case), float(w.model.kl(-1.0 * w.tuning.slope).mean()))
    assert_close(value("krylov_kl", w.case), float(w.model.kl(w.tuning.descent([0.05] * 20)[-1]).mean()))
    assert_close(value("rehearsal_kl", w.case), value("krylov_kl", w.case))
    for name, path in (("linear_kl", "linear"), ("rehearsal_kl", REHEARSED)):
        factors = {**w.case.measured.kl_factor, path: torch.full((21,), 3.0, dtype=DOUBLE)}
        louder = replace(w.case.measured, kl_factor=factors)
        assert_close(value(name, replace(w.case, measured=louder)), 3 * value(name, w.case))


def test_the_krylov_path_is_unknown_under_adam() -> None:
    risk = PREDICTORS["krylov_kl"](world(metric=Adam()).case)
    assert risk.value is None
    assert "krylov path was not built" in str(risk.reason)


@SCALES
def test_the_constants_of_the_law_by_dense_algebra(scale: float) -> None:
    w = world(scale)
    fisher = w.model.fisher(torch.zeros(N, dtype=DOUBLE)).mean(0)
    g, h = w.tuning.slope, w.tuning.hessian
    assert_close(value("initial_overlap", w.case), float((g @ fisher @ g).sqrt()))
    assert_close(value("gamma_hat", w.case), float((h @ g @ fisher @ h @ g).sqrt()))
    scores = w.model.scores(torch.zeros(N, dtype=DOUBLE))
    second = scores @ (h @ g) + w.model.score_curvature(g)
    assert_close(value("gamma_full", w.case), float(w.model.variance(second).mean().sqrt()))


@SCALES
def test_the_polynomial_by_hand(scale: float) -> None:
    w = world(scale)
    scores = w.model.scores(torch.zeros(N, dtype=DOUBLE))
    g, h = w.tuning.slope, w.tuning.hessian
    first, second = -(scores @ g), scores @ (h @ g) + w.model.score_curvature(g)
    u = w.model.variance(first * 1.0 + second * 1.0**2 / 2).mean() / 2
    assert_close(value("polynomial", w.case), float(u))


def test_a_square_below_zero_is_unknown() -> None:
    w = world()
    lost = replace(w.case.measured.coupling, coupling=torch.full((3,), -1.0))
    for name, measured in (
        ("gamma_hat", replace(w.case.measured, coupling=lost)),
        ("gamma_full", replace(w.case.measured, coupling=None, no_coupling="one batch")),
        ("polynomial", replace(w.case.measured, coupling=None, no_coupling="one batch")),
        ("initial_overlap", replace(w.case.measured, overlap_groups=None)),
        ("random_direction", replace(w.case.measured, random_kl=None)),
        ("initial_overlap", replace(w.case.measured, overlap_groups=torch.full((3, 2, 2), -1.0, dtype=DOUBLE))),
    ):
        risk = PREDICTORS[name](replace(w.case, measured=measured))
        assert risk.value is None
        assert risk.reason


@SCALES
def test_the_plain_baselines(scale: float) -> None:
    w = world(scale)
    g = w.tuning.slope
    assert_close(value("gradient_norm", w.case), float(g.norm()))
    assert_close(value("overlap_cosine", w.case), float(g[:2].norm() / g.norm()))
    assert_close(value("initial_loss", w.case), 0.0)
    assert_close(value("steps_times_rate", w.case), 1.0)
    assert_close(value("random_direction", w.case), float(w.model.kl(torch.full((N,), 0.1, dtype=DOUBLE)).mean()))


def test_no_subspace_no_cosine() -> None:
    w = world()
    case = replace(
        w.case, sensitivity=None, no_sensitivity="too few", measured=replace(w.case.measured, projected=None)
    )
    assert PREDICTORS["overlap_cosine"](case).reason == "too few"
    assert PREDICTORS["commutator"](case).reason == "too few"


@SCALES
def test_a_random_subspace_holds_its_share_of_the_gradient(scale: float) -> None:
    w = world(scale)
    squares = torch.tensor([value("random_subspace", replace(w.case, seed=seed)) ** 2 for seed in range(400)])
    expected = float(w.tuning.slope.square().sum()) * 2 / N
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - expected) < 3.5 * error


@SCALES
def test_the_commutator_of_two_quadratics(scale: float) -> None:
    """Minus the margin is linear, so H_S = 0 and the difference of orders is H_T g_S, whatever the step."""
    w = world(scale)
    inside = (w.tuning.hessian @ w.pull.mean(0))[:2]
    expected = float(inside.norm() / (w.tuning.slope.norm() * w.pull.mean(0).norm()))
    assert_close(value("commutator", w.case), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("metric", "make"),
    [
        (Sgd(), lambda p: torch.optim.SGD(p, lr=0.05)),
        (Sgd(0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        (Sgd(0.9, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
        (Adam((0.8, 0.95)), lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95))),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_canary_takes_the_steps_of_torch(metric, make, clip) -> None:
    w = world(metric=metric)
    noisy = replace(w.tuning, slope_noise=torch.randn(4, N, dtype=DOUBLE, generator=torch.Generator().manual_seed(8)))
    case = replace(w.case, tuning=noisy.objective, clip=clip)
    x = torch.zeros(N, dtype=DOUBLE, requires_grad=True)
    optimizer = make([x])
    for step in range(6):
        optimizer.zero_grad()
        noisy.objective.function(x)[step % 4].backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([x], clip)
        optimizer.step()
    assert_close(descend(case, 6), x.detach(), rtol=1e-5, atol=1e-9)


@SCALES
def test_a_canary_without_noise_overrules_the_forecast_and_one_of_noise_alone_does_not(scale: float) -> None:
    w = world(scale)
    assert canary_steps(w.case) == 1
    seen = run_canary(w.case)
    assert_close(seen.length, 0.05 * float(w.tuning.slope.norm()))
    # one step covers a twentieth of the flow; the linear forecast goes on with the slope that was seen
    told = w.case.measured.paths[REHEARSED]
    first, last = (float((w.anchor - told.margin[i]).mean()) for i in (0, -1))
    slope = float((w.anchor - seen.margin).mean())
    assert_close(value("canary_margin", w.case), last + 20 * (slope - first))
    assert_close(value("canary_margin", world(scale, noise=1e9).case), last, rtol=1e-5, atol=0.0)
    assert_close(value("canary_length", w.case), seen.length)


@pytest.mark.parametrize("apart", [0.0, 1.5e-4, 10.0])
def test_a_canary_is_weighed_by_inverse_squares(apart: float) -> None:
    """What noise of the rows has in the difference of the rehearsals is not counted twice."""
    w = world(noise=1e-5, doubt=1e-4, apart=apart)
    canary = replace(run_canary(w.case), margin=w.anchor - 0.5)
    case = replace(w.case, canary=canary)
    curves = {name: (w.anchor - v.margin).mean(-1) for name, v in w.case.measured.paths.items()}
    first, last = float(curves[REHEARSED][0]), float(curves[REHEARSED][-1])
    gap = float(curves[FEWER][-1]) - last
    assert 2e-4 < abs(gap) < 10
    prior = 1e-4**2 + max(0.0, gap**2 - apart**2)
    weight = prior / (prior + (1e-5 * 20) ** 2)
    assert 0.05 < weight < 0.95
    assert_close(value("canary_margin", case), last + weight * (0.5 - first) * 20)


@pytest.mark.parametrize("times", [0.0, 0.25, 1.75, 4.0, 1e4])
def test_a_canary_of_the_kl_without_noise_overrules_its_root(times: float) -> None:
    w = world()
    exact = PREDICTORS["rehearsal_kl"](w.case)
    assert exact.curve is not None
    canary = replace(run_canary(w.case), kl=torch.full((3,), times * exact.curve.value[0], dtype=DOUBLE))
    told = canary_kl(replace(w.case, canary=canary)).value
    first, last = math.sqrt(exact.curve.value[0]), math.sqrt(exact.curve.value[-1])
    assert_close(told, max(0.0, last + 20 * first * (math.sqrt(times) - 1)) ** 2)


@pytest.mark.parametrize("times", [0.01, 1.5])
def test_a_canary_that_sees_little_kl_is_no_surer_than_one_that_sees_much(times: float) -> None:
    share, doubt = 0.2, 0.01
    w = world(noise=share, doubt=doubt, apart=10.0)
    exact = PREDICTORS["rehearsal_kl"](w.case)
    assert exact.curve is not None
    first, last = math.sqrt(exact.curve.value[0]), math.sqrt(exact.curve.value[-1])
    canary = replace(run_canary(w.case), kl=torch.full((3,), times * first**2, dtype=DOUBLE))
    told = canary_kl(replace(w.case, canary=canary)).value
    weight = (doubt * last) ** 2 / ((doubt * last) ** 2 + (share * first * 20) ** 2)
    assert 1e-4 < weight < 0.9
    difference = first * (math.sqrt(times) - math.sqrt(1 - share**2))
    assert_close(told, (last + weight * 20 * difference) ** 2)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_luck_alone_does_not_correct_a_kl_on_average(share: float) -> None:
    """Roots with a scatter of their own about a mean, whose squares are what was told on average."""
    w = world(noise=share, doubt=0.3, apart=10.0)
    exact = PREDICTORS["rehearsal_kl"](w.case)
    assert exact.curve is not None
    told, last = exact.curve.value[0], math.sqrt(exact.curve.value[-1])
    middle, away = math.sqrt(told * (1 - share**2)), share * math.sqrt(told)
    roots = []
    for root in (middle - away, middle + away):
        assert root > 0
        kl = torch.full((3,), root**2, dtype=DOUBLE)
        roots.append(math.sqrt(canary_kl(replace(w.case, canary=replace(run_canary(w.case), kl=kl))).value or 0.0))
    assert abs(roots[1] - roots[0]) > 1e-3 * last
    assert_close(sum(roots) / 2, last)


def test_a_canary_that_left_the_range_of_numbers_is_told_as_such() -> None:
    w = world()
    lost = replace(run_canary(w.case), kl=torch.full((3,), math.nan, dtype=DOUBLE), margin=torch.full((3,), math.inf))
    for predictor in (canary_kl, canary_margin):
        risk = predictor(replace(w.case, canary=lost))
        assert risk.value is None
        assert "left the range of numbers" in str(risk.reason)


def test_a_canary_has_nothing_to_correct_where_the_forecast_sees_no_kl() -> None:
    w = world()
    paths = {name: replace(v, safety_kl=torch.zeros_like(v.safety_kl)) for name, v in w.case.measured.paths.items()}
    risk = canary_kl(replace(w.case, measured=replace(w.case.measured, paths=paths)))
    assert risk.value is None
    assert "no motion" in str(risk.reason)


def test_an_unknown_noise_gives_no_canary() -> None:
    for w in (world(noise=math.nan), world(doubt=math.nan)):
        risk = canary_margin(w.case)
        assert risk.value is None
        assert "noise" in str(risk.reason)
    assert canary_length(world(noise=math.nan).case).value is not None


@SCALES
def test_gradient_matching_by_hand(scale: float) -> None:
    w = world(scale)
    g = w.tuning.slope
    aside = torch.linalg.qr(torch.stack([g, torch.ones(N, dtype=DOUBLE)]).T)[0][:, 1]
    case = replace(w.case, anchors=(3 * g / g.norm() + 4 * aside, -7 * g))
    assert_close(value("gradient_matching", case), 0.6 + 1.0)
    assert PREDICTORS["gradient_matching"](w.case).value is None


def states(task: list[list[float]], answers: list[list[float]]) -> States:
    safety = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return States(
        torch.tensor(task), safety, torch.tensor(answers), torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    )


@SCALES
def test_similarity_and_compliance_by_hand(scale: float) -> None:
    task = [[3 * scale, 4 * scale], [scale, 0.0]]
    case = replace(world().case, states=states(task, [[1.0, 5.0], [0.0, -9.0]]))
    assert_close(value("representation_similarity", case), ((0.6 + 0.8) / 2 + 0.5) / 2, rtol=1e-6, atol=0.0)
    assert_close(value("compliance_projection", case), 0.25)
    same = replace(case.states, compliances=torch.zeros(1, 2))
    assert PREDICTORS["compliance_projection"](replace(case, states=same)).value is None


def test_every_predictor_costs_cites_and_says_why_not() -> None:
    import importlib

    w = world()
    for predictor in PREDICTORS.values():
        risk = predictor(w.case)
        assert risk.unit
        assert risk.passes >= 0
        assert (risk.value is None) == (risk.reason is not None)
        module = importlib.import_module(predictor.__module__)
        assert "Source:" in str(module.__doc__)
    assert set(OURS) | set(MEASURED) <= set(PREDICTORS)
    # one gradient of the sample is one pass; forward passes over three prompts beside four rows are counted by size
    assert PREDICTORS["gradient_norm"](w.case).passes == 1.0
    assert_close(PREDICTORS["linear_margin"](w.case).passes, 1 + 4 * (1 / 3) * 2 * 3 / 4)
    assert_close(PREDICTORS["rehearsal_margin"](w.case).passes, 2.5 + 4 * (1 / 3) * 2 * 3 / 4)


def test_more_harm_is_a_higher_risk() -> None:
    """A tuning gradient turned around moves every signed forecast to the other side."""
    there, back = world(1.0), world(-1.0)
    for name in ("rehearsal_margin", "curved_margin", "linear_margin", "canary_margin", "krylov_margin"):
        assert_close(value(name, there.case), -value(name, back.case), rtol=1e-6, atol=1e-9)
    assert isinstance(there.case.measured, Measured)
