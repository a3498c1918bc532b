"""Pulling a model back into its budget: what it costs, and what it does where the gradient that is known is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import World

from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.guards import pullback
from tiltmeter.guards.pullback import AIM, STREAM, TRIES, _correct, pull_back
from tiltmeter.guards.trainee import Trainee


@dataclass
class Counted:
    """A safety source that counts what is asked of it."""

    inner: Any
    calls: dict[str, int] = field(default_factory=lambda: {"gradient": 0, "losses": 0, "heldout": 0})
    asked: list[Tensor | None] = field(default_factory=list)

    @property
    def divergence(self) -> Any:
        return self

    @property
    def m(self) -> int:
        return int(self.inner.divergence.m)

    def gradient(self, weights: Tensor | None = None) -> Tensor:
        self.calls["gradient"] += 1
        self.asked.append(weights)
        found: Tensor = self.inner.divergence.gradient(weights)
        return found

    def losses(self) -> Tensor:
        self.calls["losses"] += 1
        found: Tensor = self.inner.divergence.losses()
        return found

    def heldout(self) -> float:
        self.calls["heldout"] += 1
        return float(self.inner.heldout())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def strayed(optimizer: str) -> tuple[World, Any, Tensor]:
    """A world after thirty free steps, its trainee with a counted source, and the anchor."""
    world = World(optimizer, {"sgd": 0.004, "adamw": 0.05}[optimizer])
    model = world.train(None, 30)
    model.safety = Counted(model.safety)
    return world, model, world.anchor.clone()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_known_gradient_costs_no_backward_pass(optimizer):
    _, model, anchor = strayed(optimizer)
    kl = model.safety.inner.heldout()
    known = model.safety.inner.divergence.gradient()
    result = pull_back(model, kl, 0.8 * kl, 0.9 * kl, anchor, known)
    print(f"{optimizer}: {kl:.4f} -> {result.kl:.4f}, {result.how}, {model.safety.calls}")
    assert result.kl <= 0.8 * kl
    assert model.safety.calls == {"gradient": 0, "losses": 0, "heldout": 1}
    assert result.kl == pytest.approx(model.safety.inner.heldout())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_that_points_up_is_not_followed(optimizer):
    world, model, _ = strayed(optimizer)
    kl, there = model.safety.inner.heldout(), world.flat.clone()
    upward = -model.safety.inner.divergence.gradient()
    assert _correct(model, kl, 0.7 * kl, upward, kl) == kl
    assert torch.equal(there, world.flat)
    assert model.safety.calls["heldout"] == 2


def test_a_shorter_step_that_is_worse_is_not_kept():
    """Along this line the KL falls at once and lies flat: half of the way there is hardly lower than the start."""
    x = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

    class Cliff(Square):
        def heldout(self):
            return 9.0 if float(self.x) > 1.0 else 0.1

    model = Trainee({"x": x}, torch.optim.SGD([x], lr=0.1), Cliff(x, 2.0))
    found = _correct(model, 9.0, 3.6, 2 * x.detach().clone() / 2, 9.0)
    assert found == 0.1
    assert float(x) <= 1.0


def test_in_large_spaces_a_fresh_gradient_is_of_some_examples_drawn_anew(monkeypatch):
    """KL goes down all the same; the step is made for the KL of these; and no more are drawn than there are."""
    _, model, anchor = strayed("adamw")
    inner = model.safety.inner
    kl, m = inner.heldout(), inner.divergence.m
    steps = []

    def correct(model, kl, target, gradient, own):
        steps.append((own, inner.divergence.losses().double()))
        return _correct(model, kl, target, gradient, own)

    monkeypatch.setattr(pullback, "_correct", correct)
    result = pull_back(model, kl, 1e-3 * kl, kl, anchor, None, 2)
    assert result.kl < kl
    drawn = model.safety.asked
    assert len(drawn) == len(steps) == TRIES
    assert m > 2
    for weights, (own, losses) in zip(drawn, steps, strict=True):
        assert own == pytest.approx(float(losses[weights > 0].mean()))
        assert own != pytest.approx(float(losses.mean()), rel=1e-3)
    for weights in drawn:
        assert weights.sum() == pytest.approx(1.0)
        assert (weights > 0).sum() == 2
    assert not torch.equal(*drawn)
    _, model, anchor = strayed("adamw")
    pull_back(model, kl, 1e-3 * kl, kl, anchor, None, m)
    assert model.safety.asked[0] is None


def test_what_a_pull_back_draws_is_not_what_the_next_steps_draw():
    """From one seed the smaller draw is part of the larger: surgery would look at those whose KL was just lowered."""
    steps = {seed + step for seed in range(50) for step in range(10_000)}
    pulls = [STREAM * (seed + 1) + TRIES * step + i for seed in range(50) for step in range(200) for i in range(TRIES)]
    assert not steps & set(pulls)
    assert len(set(pulls)) == len(pulls)


@pytest.mark.parametrize("share", [0.5, 1e-2, 1e-4])
def test_the_cost_is_bounded_and_the_budget_kept(share):
    """However far the model has strayed: at the last it goes back along its way, and that is said."""
    _, model, anchor = strayed("adamw")
    kl = model.safety.inner.heldout()
    result = pull_back(model, kl, 0.6 * share * kl, share * kl, anchor)
    assert model.safety.inner.heldout() == pytest.approx(result.kl)
    assert result.kl <= share * kl
    assert model.safety.calls["gradient"] <= TRIES
    assert model.safety.calls["heldout"] <= 2 * TRIES + 8
    assert result.retreated == ("of the way since" in result.how)
    if share == 1e-4:
        assert result.retreated


@dataclass
class Square:
    """KL = a x^2 / 2 of one weight x, of the guard's own examples and of the held-out ones alike."""

    x: Tensor
    a: float
    space: ParameterSpace = field(default_factory=lambda: ParameterSpace(("x",), ((1,),)))

    @property
    def divergence(self) -> Square:
        return self

    def gradient(self, weights: Tensor | None = None) -> Tensor:
        return self.a * self.x.detach().clone()

    def losses(self) -> Tensor:
        return self.a * self.x.detach().square() / 2

    def heldout(self) -> float:
        return float(self.losses())


@pytest.mark.parametrize("shorter", [2.0, 3.0])
def test_a_step_that_goes_too_far_is_shortened(shorter):
    """The gradient that is known is of another time, too small: the step it asks for is too long."""
    x = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    safety = Counted(Square(x, 2.0))
    model = Trainee({"x": x}, torch.optim.SGD([x], lr=0.1), safety)
    kl = safety.inner.heldout()
    wanted = AIM * 0.4 * kl
    known = safety.inner.gradient() / shorter**0.5  # a step of root `shorter` times the way it should be
    result = pull_back(model, kl, 0.4 * kl, kl, torch.zeros(1), known)
    print(f"{kl:.3f} -> {result.kl:.3f}, aimed for {wanted:.3f}, {safety.calls}")
    assert result.kl == pytest.approx(wanted)
    assert safety.calls == {"gradient": 0, "losses": 0, "heldout": 2}


@pytest.mark.parametrize("a", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("known", [True, False])
def test_one_step_meets_its_aim_where_the_kl_is_a_square(a, optimizer, known):
    x = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    safety = Square(x, a)
    model = Trainee({"x": x}, optimizer([x], lr=0.1), safety)
    kl = safety.heldout()
    result = pull_back(model, kl, 0.4 * kl, kl, torch.zeros(1), safety.gradient() if known else None)
    assert result.kl == pytest.approx(AIM * 0.4 * kl)
    assert float(x) == pytest.approx(3.0 * (AIM * 0.4) ** 0.5)
