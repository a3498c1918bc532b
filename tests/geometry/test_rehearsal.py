"""A rehearsal against real optimiser runs, its order of error, and the noise its looks carry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bent import G, H, N, gradient, normal, slope
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry import moments, motion
from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Adam, Metric, Sgd
from tiltmeter.geometry.moments import moments_of
from tiltmeter.geometry.motion import Slope
from tiltmeter.geometry.path import LinearPath
from tiltmeter.geometry.rehearsal import Rehearsal

SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])


def look(number: int, displacement: Tensor | None) -> Slope:
    return slope(gradient(torch.zeros(N, dtype=torch.float64) if displacement is None else displacement))


OPTIMISERS = {
    "adam": (Adam((0.8, 0.95)), lambda x: torch.optim.AdamW([x], betas=(0.8, 0.95), weight_decay=0.0)),
    "adam as it comes": (Adam(), lambda x: torch.optim.AdamW([x], weight_decay=0.0)),
    "sgd": (Sgd(), lambda x: torch.optim.SGD([x])),
    "momentum": (Sgd(0.9), lambda x: torch.optim.SGD([x], momentum=0.9)),
    "nesterov": (Sgd(0.9, True), lambda x: torch.optim.SGD([x], momentum=0.9, nesterov=True)),
}


def run(kind: str, rates: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Displacements after 0, 1, ... steps of torch's own optimiser."""
    x = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    optimiser = OPTIMISERS[kind][1](x)
    out = [x.detach().clone()]
    for rate in rates.tolist():
        optimiser.param_groups[0]["lr"] = rate
        x.grad = scale * gradient(x.detach())
        optimiser.step()
        out.append(x.detach().clone())
    return out


@SCALES
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_with_as_many_looks_as_steps_it_is_the_run(kind: str, scale: float) -> None:
    """At every step, also of a rate that changes; more looks than steps make no difference."""
    metric: Metric = OPTIMISERS[kind][0]
    rates = torch.tensor([0.0, 0.02, 0.04, 0.05, 0.03, 0.02, 0.01], dtype=torch.float64)
    if isinstance(metric, Sgd):
        rates = rates / scale  # the same path at every scale of the loss
    real = run(kind, rates, scale)

    def seen(number: int, displacement: Tensor | None) -> Slope:
        return slope(scale * look(number, displacement).mean)

    for looks in (7, 30):
        walked = {s: d.clone() for s, d in Rehearsal(metric, Clock(rates), looks).walk(seen, range(1, 8))}
        assert list(walked) == list(range(1, 8))
        for step, displacement in walked.items():
            assert_close(displacement, real[step], rtol=1e-6, atol=1e-9)
    assert float((real[7] - real[1]).norm()) > 0.05


@pytest.mark.parametrize("half", [1, 2, 4])
def test_what_the_first_stretch_leaves_out(half: int) -> None:
    """Solved by hand for gradient descent: every later stretch is right to second order, the first misses
    eta^2 c (c - 1) / 2 H g in c steps."""
    looks = 4
    steps = (2 * looks - 1) * half

    def miss(rate: float) -> Tensor:
        rates = torch.full((steps,), rate, dtype=torch.float64)
        ((_, end),) = Rehearsal(Sgd(), Clock(rates), looks).walk(look, [steps])
        return end - run("sgd", rates)[-1]

    rate = 1e-7
    expected = -(rate**2) * half * (half - 1) / 2 * (H @ G)
    assert_close(miss(rate), expected, rtol=2e-3, atol=1e-3 * rate**2 * float((H @ G).norm()))
    if half == 1:  # then only the third order is left
        assert float(miss(2e-3).norm() / miss(1e-3).norm()) == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_more_looks_come_closer_to_the_run(kind: str) -> None:
    """Over a path that bends: the error of the straight path falls at least eightfold with eight looks."""
    metric = OPTIMISERS[kind][0]
    rates = torch.full((60,), 4e-3 if isinstance(metric, Adam) else 2e-4, dtype=torch.float64)
    real = run(kind, rates)[-1]
    straight = LinearPath(metric, Clock(rates), slope(G)).displacement(60)
    missed = [float((straight - real).norm())]
    for looks in (4, 8, 16):
        ((_, end),) = Rehearsal(metric, Clock(rates), looks).walk(look, [60])
        missed.append(float((end - real).norm()))
    assert missed[0] > 0.01 * float(real.norm())
    assert missed[1] < missed[0] / 3
    assert missed[2] < missed[0] / 8
    assert missed[3] < missed[2]


@SCALES
@pytest.mark.parametrize("metric", [Adam(weight_decay=0.1), Sgd(0.5, weight_decay=0.1)], ids=["adamw", "sgd"])
def test_a_gradient_that_never_changes_gives_the_straight_path(scale: float, metric: Metric) -> None:
    """At steps within a stretch too, with a spread, and with decay."""
    clock = Clock(torch.linspace(0.2, 0.1, 12, dtype=torch.float64))
    held, decayed = slope(scale * G, scale * G.abs().flip(0)), normal(7, N)
    straight = LinearPath(metric, clock, held, decayed)
    for step, displacement in Rehearsal(metric, clock, 3, decayed).walk(lambda *_: held, [1, 2, 5, 7, 12]):
        if step <= 2 or isinstance(metric, Adam):  # momentum builds up within a stretch as over all of it
            assert_close(displacement, straight.displacement(step))
    assert step == 12
    assert_close(displacement, straight.displacement(12))


def test_looks_stand_in_the_middle_of_what_they_drive() -> None:
    asked: list[float] = []

    def seen(number: int, displacement: Tensor | None) -> Slope:
        assert (displacement is None) == (number == 0)
        asked.append(0.0 if displacement is None else float(displacement))
        return slope(-torch.ones(1, dtype=torch.float64))

    path = Rehearsal(Sgd(), Clock.constant(1.0, 35), 4)
    assert path.stretches() == [(0, 5), (5, 15), (15, 25), (25, 35)]
    list(path.walk(seen, [35]))
    assert asked == [0.0, 9.5, 19.5, 29.5]  # gradients of steps 6 to 15 are taken after 5 to 14


@pytest.mark.parametrize(("steps", "looks"), [(1, 8), (2, 8), (3, 2), (9, 8), (40, 8), (40, 1), (1000, 8)])
def test_stretches_cover_every_step_once(steps: int, looks: int) -> None:
    parts = Rehearsal(Sgd(), Clock.constant(1.0, steps), looks).stretches()
    assert [step for begin, end in parts for step in range(begin, end)] == list(range(steps))
    assert len(parts) <= min(looks, steps)
    assert all(begin < end for begin, end in parts)


@SCALES
def test_noise_of_the_looks_by_simulation(scale: float) -> None:
    """Rows whose gradients scatter around one mean, and no curvature: the variance of where a rehearsal ends."""
    rates = torch.linspace(1.0, 0.2, 14, dtype=torch.float64) * scale
    path, rows, draws = Rehearsal(Sgd(), Clock(rates), 4), (24, 4, 8, 4), 40_000
    numbers = torch.Generator().manual_seed(3)

    def seen(number: int, displacement: Tensor | None) -> Slope:
        noise = torch.randn(draws, generator=numbers, dtype=torch.float64) / rows[number] ** 0.5
        return slope(1.0 + noise)

    firsts = [sum(rows[:i]) for i in range(len(rows))]
    members = [range(first, first + count) for first, count in zip(firsts, rows, strict=True)]
    mixture = path.mixture(members, sum(rows))
    assert_close(mixture.driven.sum(1), torch.ones(15, dtype=torch.float64))
    assert mixture.driven[0].tolist() == [1, 0, 0, 0]
    share = mixture.concentration()
    covered = Clock(rates).flow_time
    for step, displacement in path.walk(seen, [1, 2, 5, 9, 14]):
        assert_close(float(displacement.var()), float(share[step] * covered[step] ** 2), rtol=0.03, atol=0)


@pytest.mark.parametrize("schedule", [(1.0, 1.0), (1.0, 0.2)])
@pytest.mark.parametrize(
    "metric", [Sgd(), Sgd(0.6), Sgd(0.6, nesterov=True), Adam((0.8, 0.99), 1e12)], ids=["sgd", "m", "nesterov", "adam"]
)
def test_what_each_look_has_driven_by_walking_with_one_at_a_time(metric: Metric, schedule: tuple[float, float]) -> None:
    """Each look has a parameter of its own; beside so large an epsilon Adam is linear in the gradients."""
    path = Rehearsal(metric, Clock(torch.linspace(*schedule, 14, dtype=torch.float64)), 4)
    unit = 1e12 if isinstance(metric, Adam) else 1.0
    covered, driven = metric.flow_time(path.clock), path.driven()
    assert_close(driven.sum(1), torch.ones(15, dtype=torch.float64))
    one = torch.eye(4, dtype=torch.float64)
    for step, displacement in path.walk(lambda number, where: slope(one[number]), list(range(1, 15))):
        assert_close(driven[step] * covered[step], -displacement * unit)


def test_moments_of_a_large_space_are_kept_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 averages over many steps keep three digits: small shares are not rounded away."""
    gradients = [torch.tensor([1.0, 2.0, -3.0]) * (1 + 0.5 * (-1) ** i) for i in range(200)]
    none = torch.zeros(3)

    def end(metric: Metric) -> Tensor:
        held = moments_of(metric)
        for each in gradients:
            out = held.meet(each, none, 1)
        return out

    for metric in (Adam(), Sgd(0.9)):
        exact = end(metric)
        monkeypatch.setattr(motion, "LARGE", 2)
        assert_close(end(metric), exact, rtol=0.05, atol=0)
        monkeypatch.undo()
    assert moments.narrow is motion.narrow


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_an_anchor_gradient_kept_narrow_drives_the_path_in_full_precision(kind: str) -> None:
    """Only the gradient has three digits; what is summed up from it and from later ones has all."""
    anchor = slope(gradient(torch.zeros(N, dtype=torch.float64)).float())
    coarse = replace(anchor, mean=anchor.mean.bfloat16(), spread=anchor.spread.bfloat16())
    exact = replace(anchor, mean=coarse.mean.float(), spread=coarse.spread.float())

    def end(first: Slope) -> Tensor:
        path = Rehearsal(OPTIMISERS[kind][0], Clock.constant(1e-3, 12), 4)
        ((_, displacement),) = path.walk(lambda number, where: first if number == 0 else anchor, [12])
        return displacement

    assert end(coarse).dtype == torch.float32
    assert_close(end(coarse), end(exact), rtol=1e-6, atol=0)


def test_another_metric_is_refused() -> None:
    with pytest.raises(TypeError, match="expected Sgd or Adam"):
        moments_of(object())  # type: ignore[arg-type]
