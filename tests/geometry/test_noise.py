"""Chance in a forecast: exact variances by listing every order of the rows, coverage and bias by simulated runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.noise import MOSTLY_NOISE, Mixture, RowNoise, draw_variance, row_noise, straight_mixture

OPTIMISERS = {
    "sgd": (Sgd(), lambda p: torch.optim.SGD(p, lr=1.0)),
    "momentum": (Sgd(0.7), lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.7)),
    "nesterov": (Sgd(0.7, nesterov=True), lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.7, nesterov=True)),
    # beside so large an epsilon the second moment is nothing, and Adam is linear in the gradients
    "adam": (Adam((0.8, 0.99)), lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.8, 0.99), eps=1e15)),
}


def ends(kind: str, rates: list[float], means: list[Tensor]) -> Tensor:
    """Where torch's own optimiser has moved after 0, 1, ... steps of given gradients, minus the displacement."""
    place = torch.zeros(means[0].shape, dtype=torch.float64, requires_grad=True)
    optimiser = OPTIMISERS[kind][1]([place])
    out = [torch.zeros_like(place)]
    for rate, mean in zip(rates, means, strict=True):
        optimiser.param_groups[0]["lr"] = rate * (1e15 if kind == "adam" else 1.0)
        place.grad = mean.clone()
        optimiser.step()
        out.append(-place.detach().clone())
    return torch.stack(out)


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_one_epoch_by_listing_every_order(batch: int, scale: float, kind: str) -> None:
    values = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4, 1.9], dtype=torch.float64)
    rates = [scale * r for r in (0.5, 1.0, 0.8, 0.6, 0.4, 0.2)[: math.ceil(6 / batch)]]
    clock = Clock(torch.tensor(rates, dtype=torch.float64))
    orders = torch.tensor(list(itertools.permutations(values.tolist())), dtype=torch.float64)
    places = ends(kind, rates, [part.mean(1) for part in orders.split(batch, 1)])
    expected = places.var(1, correction=0) / values.var()
    found = draw_variance(OPTIMISERS[kind][0].memory(clock), batch, 6)
    assert_close(found, expected, rtol=1e-7, atol=1e-14 * scale**2)
    assert_close(OPTIMISERS[kind][0].flow_time(clock) * values.mean(), places.mean(1))


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_epochs_in_a_row_by_listing_every_order(kind: str) -> None:
    """Three epochs of three rows, in each every order: what one epoch leaves in memory moves the next ones' steps."""
    values = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(values.tolist())), dtype=torch.float64)
    picks = torch.cartesian_prod(*[torch.arange(6)] * 3)
    every = torch.cat([orders[picks[:, i]] for i in range(3)], 1)
    rates = [0.2 * 0.9**i for i in range(6)]
    means = [every[:, 3 * i + j : 3 * i + j + size].mean(1) for i in range(3) for j, size in ((0, 2), (2, 1))]
    expected = ends(kind, rates, means).var(1, correction=0) / values.var()
    clock = Clock(torch.tensor(rates, dtype=torch.float64))
    assert_close(draw_variance(OPTIMISERS[kind][0].memory(clock), 2, 3), expected, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_an_endless_stream_by_its_steps_one_at_a_time(kind: str) -> None:
    """Independent batches: the variance is the sum over steps of (where a gradient of that step alone leads)^2."""
    rates = torch.linspace(1e-2, 2e-3, 9, dtype=torch.float64)
    steps = list(torch.eye(9, dtype=torch.float64))
    expected = ends(kind, rates.tolist(), steps).square().sum(1) / 4
    assert_close(draw_variance(OPTIMISERS[kind][0].memory(Clock(rates)), 4, None), expected, rtol=1e-7, atol=0)


def test_epochs_add_up_and_a_whole_one_at_a_constant_rate_leaves_nothing() -> None:
    found = draw_variance(Sgd().memory(Clock.constant(0.1, 7)), 2, 6)
    assert_close(found[[3, 6]], torch.zeros(2, dtype=torch.float64), atol=1e-18, rtol=0)
    assert_close(found[4:6], found[1:3])


@pytest.mark.parametrize("batch", [1, 4])
def test_an_endless_stream_and_a_very_large_set_agree(batch: int) -> None:
    clock = Clock(torch.linspace(1e-3, 1e-4, 20, dtype=torch.float64))
    endless = draw_variance(Sgd().memory(clock), batch, None)
    assert_close(endless, clock.squared_rates / batch)
    assert_close(draw_variance(Sgd().memory(clock), batch, 10**9), endless, rtol=1e-5, atol=0)
    assert_close(float(endless[1]), 1e-6 / batch)


def test_a_batch_as_large_as_the_set_has_no_luck() -> None:
    assert draw_variance(Sgd(0.5).memory(Clock.constant(1.0, 5)), 10, 10).abs().max() < 1e-12


@pytest.mark.parametrize("rows", [24, None])
@pytest.mark.parametrize(("rate", "size", "noise_share"), [(1e-2, 1.0, 0.5), (1.0, 10.0, 1.5)])
def test_intervals_hold_the_runs_and_the_kl_is_unbiased(
    rows: int | None, rate: float, size: float, noise_share: float
) -> None:
    """Rows are Gaussian gradients, margin and KL are their exact linear and quadratic forms; runs are simulated."""
    generator = torch.Generator().manual_seed(1)
    dimensions, sample, groups, batch, steps, trials = 12, 12, 4, 3, 5, 1500
    fisher = torch.linspace(0.1, 2, dimensions, dtype=torch.float64)
    margin = torch.linspace(-1, 1, dimensions, dtype=torch.float64)
    clock = Clock.constant(rate, steps)
    hits, kl_hits, predicted, measured = 0, 0, [], []
    for _ in range(trials):
        count = rows or 60
        every = size * (1 + noise_share * torch.randn(count, dimensions, generator=generator, dtype=torch.float64))
        known = every[:sample] if rows is None else every[torch.randperm(count, generator=generator)[:sample]]
        if rows is None:  # a stream: the run's rows are new ones
            drawn = size * (
                1 + noise_share * torch.randn(steps * batch, dimensions, generator=generator, dtype=torch.float64)
            )
        else:
            drawn = every[torch.randperm(count, generator=generator)[: steps * batch]]
        run = rate * drawn.reshape(steps, batch, dimensions).mean(1).sum(0)
        v = known.reshape(groups, -1, dimensions).mean(1)
        noise = row_noise(known @ margin, (v * fisher) @ v.T, sample / groups, Sgd(), clock, batch, sample, rows)
        path = rate * steps * known.mean(0)
        hits += abs(float((run - path) @ margin)) <= float(noise.margin_reach(0.9)[-1])
        whole = float(path @ (fisher * path)) / 2
        kl = whole * float(noise.energy_factor()[-1])
        true = float(run @ (fisher * run)) / 2
        kl_hits += abs(true - kl) <= kl * float(noise.relative_reach(0.9)[-1])
        predicted.append(kl)
        measured.append(true)
    assert 0.87 <= hits / trials <= 0.93
    assert 0.87 <= kl_hits / trials <= 0.95
    difference = torch.tensor(predicted) - torch.tensor(measured)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(trials)
    assert abs(float(difference.mean())) < 0.05 * float(torch.tensor(measured).mean())


def test_one_group_says_nothing_and_two_say_nothing_of_the_speed() -> None:
    clock = Clock.constant(1.0, 3)
    one = row_noise(torch.ones(1), torch.ones(1, 1), 4, Sgd(), clock, 2, 4, None)
    assert math.isnan(one.margin_reach(0.9)[-1])
    assert math.isnan(one.relative_reach(0.9)[-1])
    assert_close(one.energy_factor(), torch.ones(4, dtype=torch.float64))
    two = row_noise(torch.tensor([1.0, 3.0]), torch.eye(2), 4, Sgd(), clock, 2, 8, None)
    assert float(two.margin_reach(0.9)[-1]) > 0
    assert math.isnan(two.relative_reach(0.9)[-1])


@pytest.mark.parametrize(("energy", "expected"), [(10.0, 0.5 + 0.1), (40.0, 0.1 + 18 * 0.01), (-3.0, 1.0)])
def test_a_sample_that_is_all_noise_is_taken_to_have_some_mean(energy: float, expected: float) -> None:
    """20 rows of endlessly many, V / a^2 = 0.01: an energy of 10 is half of the whole; 40 would be twice the whole, and
    nine tenths are what it is taken for; one below zero is chance."""
    assert MOSTLY_NOISE == 0.9
    drawn, covered = torch.tensor([0.0, 0.04], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    noise = RowNoise(1.0, 1.0, energy, 12, 4, 0.05, drawn, covered, 0.0, straight_mixture(1, 20))
    assert_close(float(noise.energy_factor()[1]), expected)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_a_rehearsals_own_noise_by_hand(scale: float) -> None:
    """One parameter, margin and KL of x: rows scatter by sigma around mu, so a path whose rows have shares c ends at
    a (mu + sigma sqrt(sum c^2) xi), the run at a (mu + sigma sqrt(V) xi) with its own V."""
    mu, sigma, m = 3.0 * scale, 5.0 * scale, 25
    whole = mu**2 + sigma**2 / m  # what the length of a sample's mean is, on the mean
    clock = Clock.constant(0.1, 8)
    drawn, part = draw_variance(Sgd().memory(clock), 2, None), torch.linspace(1, 0.2, 9, dtype=torch.float64)
    kl = 2 * mu * sigma / mu**2, sigma**2 / whole
    straight = RowNoise(sigma, *kl, 1000, 1000, 1 / m, drawn, clock.flow_time, 0.0, straight_mixture(8, m))
    # the sample drives a part of the path, two other rows the rest of it
    members = torch.zeros(2, m + 2, dtype=torch.float64)
    members[0, :m], members[1, m:] = 1 / m, 0.5
    path = replace(straight, path=Mixture(torch.stack([part, 1 - part], 1), members))
    share = part**2 / m + (1 - part) ** 2 / 2
    luck = drawn[1:] / clock.flow_time[1:] ** 2
    expected = (mu**2 + sigma**2 * luck) / (mu**2 + sigma**2 * share[1:])
    assert_close(path.energy_factor()[1:], expected)
    assert_close(straight.energy_factor()[1:], (mu**2 + sigma**2 * luck) / whole)
    normal = 1.645
    reach = normal * sigma * (drawn + clock.flow_time**2 * share).sqrt()
    assert_close(path.margin_reach(0.9), reach, rtol=2e-3, atol=0)
    # the path's own part of it: of the margin, and of the root of the KL as a share
    own_margin, own_root = path.path_scatter()
    assert_close(own_margin, sigma * clock.flow_time * share.sqrt())
    assert_close(own_root, sigma / mu * share.sqrt())
    assert_close(path.margin_scatter(), sigma * (drawn + clock.flow_time**2 * share).sqrt())
    # two rehearsals part by the rows that they do not share, and the run's own luck has no part in that
    swapped = members.clone()
    swapped[1, m:] = torch.tensor([1.0, 0.0])
    other = replace(path, path=Mixture(path.path.driven, swapped))
    margin, share_apart = path.apart(other, 0.9)
    both = 0.5**0.5 * (1 - part)
    assert_close(margin, normal * sigma * clock.flow_time * both, rtol=2e-3, atol=1e-9 * scale)
    root = normal * sigma / mu * both
    assert_close(share_apart, (1 + root) ** 2 - 1, rtol=2e-3, atol=1e-9)
    margin_scatter, root_scatter = path.apart_scatter(other)
    assert_close(margin_scatter, sigma * clock.flow_time * both)
    assert_close(root_scatter, sigma / mu * both)
    unknown = replace(path, margin=math.nan, speed=math.nan)
    assert all(float(each.abs().max()) == 0 for each in unknown.apart(other, 0.9))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_rows_without_replacement_by_listing_every_draw(scale: float) -> None:
    """A rehearsal of two looks, of two rows and one, and a run through all five rows: every choice of rows."""
    values = scale * torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4], dtype=torch.float64)
    clock = Clock.constant(0.5, 5)
    driven, errors = torch.tensor([0.3, 0.7], dtype=torch.float64), []
    for a, b, c in itertools.permutations(values.tolist(), 3):
        errors.append(float(driven @ torch.tensor([(a + b) / 2, c], dtype=torch.float64)) - float(values.mean()))
    members = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    noise = row_noise(values, torch.eye(3), 1, Sgd(), clock, 1, 3, 5, Mixture(driven.expand(6, 2), members))
    expected = clock.flow_time[-1] * torch.tensor(errors, dtype=torch.float64).square().mean().sqrt()
    assert_close(noise.margin_reach(0.9)[-1], stats.t.ppf(0.95, 4) * expected)
    # the KL as the square of the end: one run's is the mean's, what such a path has on the mean is larger
    mean, variance = float(values.mean()), float(values.var())
    length = mean**2 + variance * (1 / 3 - 1 / 5)
    kl = replace(noise, energy=variance / length, sampled=1 / 3 - 1 / 5)
    bare = mean**2 + float(torch.tensor(errors, dtype=torch.float64).square().mean())
    assert_close(float(kl.energy_factor()[-1]) * bare, mean**2)
    whole = Mixture(torch.ones(6, 1, dtype=torch.float64), torch.full((1, 5), 0.2, dtype=torch.float64))
    assert float(replace(noise, path=whole).margin_reach(0.9)[-1]) < 1e-7 * scale  # all rows seen, and by the run too


def test_shares_are_those_of_rows_not_of_looks() -> None:
    """The same row in two looks counts once for both; paths of the same rows do not part."""
    driven = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    same = Mixture(driven, torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert_close(same.concentration(), torch.ones(1, dtype=torch.float64))
    two = Mixture(driven, torch.eye(2, dtype=torch.float64))
    assert_close(two.concentration(), torch.tensor([0.0625 + 0.5625], dtype=torch.float64))
    assert_close(two.apart(same), torch.tensor([2 * 0.75**2], dtype=torch.float64))
    assert float(two.apart(two)) == 0
