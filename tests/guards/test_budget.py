"""What the budget does by degrees: surgery, in the optimiser's metric near the budget, replay last."""

from __future__ import annotations

import pytest
import torch
from worlds import World, step

from tiltmeter.geometry import space
from tiltmeter.geometry.systems import DOUBLE
from tiltmeter.guards import budget
from tiltmeter.guards.budget import CurvatureBudget
from tiltmeter.guards.pullback import PulledBack
from tiltmeter.guards.safety import draw
from tiltmeter.guards.session import Session
from tiltmeter.guards.surgery import remove_conflict

#: More examples than there are: the gradient of all of them, every step.
ALL = 99


def random(n, seed):
    return torch.randn(n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("metric", [False, True], ids=["plain", "metric"])
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_surgery_takes_out_what_raises_the_loss(scale, metric, strength):
    task, safety = random(9, 1), scale * random(9, 2)
    d = random(9, 3).exp() if metric else torch.ones(9, dtype=DOUBLE)
    task -= safety * (1.0 + task @ (d * safety)) / (safety @ (d * safety))  # -1 in the metric
    conflict = task @ (d * safety)
    assert conflict == pytest.approx(-1.0)
    kept = task.clone()
    assert remove_conflict(task, safety, strength, d if metric else None)
    assert float(task @ (d * safety)) == pytest.approx(-(1 - strength), abs=1e-9)
    # and only along the safety gradient: the least change in the dual metric
    moved = task - kept
    torch.testing.assert_close(moved, safety * (moved @ safety) / (safety @ safety))


@pytest.mark.parametrize("block", [1, 4, 9, 100])
def test_surgery_and_scaling_in_blocks_are_those_at_once(block, monkeypatch):
    """Also where the remembered gradient is narrower than the task's."""
    monkeypatch.setattr(space, "BLOCK", block)
    task, narrow, d = random(9, 1).float(), random(9, 2).bfloat16(), random(9, 3).exp().float()
    wide = narrow.double()
    assert torch.equal(space.multiply(d.clone(), narrow), d * narrow.float())
    task -= (narrow.float() * (1.0 + float(task.double() @ wide)) / float(wide @ wide)).float()
    wanted = task.double() - wide * float(task.double() @ wide) / float(wide @ wide)
    assert remove_conflict(task, narrow)
    torch.testing.assert_close(task.double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_conflict_nothing_is_touched():
    safety = random(9, 2)
    for task in (safety.clone(), torch.zeros(9, dtype=DOUBLE)):
        kept = task.clone()
        assert not remove_conflict(task, safety)
        assert torch.equal(task, kept)
    assert not remove_conflict(-safety, torch.zeros(9, dtype=DOUBLE))


def begun(guard, used, optimizer="adamw"):
    """A world three steps on without the guard's help, a task gradient, and a held-out KL as a share of the budget."""
    world = World(optimizer)
    model = world.trainee()
    Session(guard, model).begin()
    for _ in range(3):
        model.plain_optimizer.zero_grad()
        world.loss().backward()
        model.plain_optimizer.step()
        model.step += 1
    model.plain_optimizer.zero_grad()
    world.loss().backward()
    guard.memory.numbers["kl"] = used * guard.budget_kl
    return world, model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("used", [0.0, 0.05, 0.3, 0.8])
def test_the_gradient_is_left_alone_at_the_anchor_and_shaped_in_the_metric_near_the_budget(used, optimizer):
    guard = CurvatureBudget(budget_kl=1e-2, examples=ALL)
    _, model = begun(guard, used, optimizer)
    task, safety = model.gradient(), model.safety.divergence.gradient()
    d = model.preconditioner()
    d = torch.ones_like(task) if d is None or used < budget.NEAR else d
    assert task @ (d * safety) < 0
    model.step = 3 if used else 0
    guard.shape_gradient(model)
    found = model.gradient()
    if used == 0:
        assert torch.equal(found, task)
        assert "slope" not in guard.memory.tensors
        return
    torch.testing.assert_close(found, task - safety * (task @ (d * safety)) / (safety @ (d * safety)))
    torch.testing.assert_close(guard.memory.tensors["slope"], safety)


def test_few_examples_a_step_are_averaged_over_the_last_steps(monkeypatch):
    monkeypatch.setattr(budget, "REMEMBERED", 0.75)
    guard = CurvatureBudget(budget_kl=1e-2, examples=2)
    _, model = begun(guard, 0.3)
    divergence = model.safety.divergence
    mean = divergence.gradient(draw(divergence.m, 2, model.seed + model.step))
    for each in range(4):
        if each:
            mean = 0.25 * divergence.gradient(draw(divergence.m, 2, model.seed + model.step)) + 0.75 * mean
        guard.shape_gradient(model)
        torch.testing.assert_close(guard.memory.tensors["slope"], mean)
        model.step += 1
    assert guard.memory.numbers["shaped"] == 4


@pytest.mark.parametrize(
    ("every", "used", "replaying", "taken"),
    [
        (4, 0.5, 0, [3, 4, 5, 7, 9]),
        (4, 0.7, 0, range(3, 10)),
        (4, 0.5, 1, range(3, 10)),
        (1, 0.5, 0, range(3, 10)),
    ],
    ids=["calm", "near the budget", "replaying", "small space"],
)
def test_in_large_spaces_and_calm_the_safety_gradient_is_taken_at_every_second_step(
    every, used, replaying, taken, monkeypatch
):
    """What is taken out of the task's gradient in between is that of the step before; not until the first look."""
    guard = CurvatureBudget(budget_kl=1e-2, every=every, examples=ALL)
    _, model = begun(guard, used, "sgd")
    guard.memory.numbers["replaying"] = replaying
    task, asked = model.gradient(), []
    found = {i: random(len(task), 10 + i) for i in range(3, 10)}
    monkeypatch.setattr(type(model.safety.divergence), "gradient", lambda self, w: asked.append(1) or found[model.step])
    for step_now in range(3, 10):
        model.step, before = step_now, len(asked)
        model.write_gradient(task)
        guard.shape_gradient(model)
        assert (len(asked) > before) == (step_now in taken)
        safety = found[max(i for i in taken if i <= step_now)]
        wanted = task - safety * min(0.0, float(task @ safety)) / (safety @ safety)
        length = 0.3 * torch.linalg.vector_norm(task) / torch.linalg.vector_norm(safety)
        torch.testing.assert_close(model.gradient(), wanted + replaying * length * safety)
        torch.testing.assert_close(guard.memory.tensors["slope"], safety)


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("used", [0.3, 0.8])
def test_near_the_budget_the_update_does_not_raise_kl_either(used, strength):
    guard = CurvatureBudget(strength=strength, budget_kl=1e-2, examples=ALL)
    _, model = begun(guard, used)
    guard.shape_gradient(model)
    slope, before = guard.memory.tensors["slope"], model.vector()
    model.plain_optimizer.step()  # momentum remembers what was not shaped
    moved, z = model.moved(before), guard.memory.tensors["z"].clone()
    assert slope @ moved > 0
    guard._level(model, before)
    levelled, d = model.moved(before), model.preconditioner()
    taken = strength * d * slope * (slope @ moved) / (slope @ (d * slope)) if used > budget.NEAR else 0 * slope
    torch.testing.assert_close(levelled, moved - taken, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(guard.memory.tensors["z"] - z, -guard.memory.tensors["columns"] @ taken)


def test_replay_begins_after_a_retreat_grows_with_further_ones_and_ends(monkeypatch):
    guard = CurvatureBudget(budget_kl=1e-2, examples=ALL, replay_share=0.3)
    _, model = begun(guard, 0.95)
    numbers, kl = guard.memory.numbers, {"now": 0.02}
    monkeypatch.setattr(type(model.safety), "heldout", lambda self: kl["now"])
    monkeypatch.setattr(budget, "pull_back", lambda *given: PulledBack(0.008, "back", retreated=kl["now"] > 0.01))
    shares = []
    for now in (0.0095, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.0095, 0.005):
        kl["now"] = now
        model.step += 10
        guard._control(model, budget.CEILING, model.vector())
        shares.append(numbers["share"] if numbers["replaying"] else 0.0)
    assert shares == pytest.approx([0.0, 0.3, 0.6, 1.2, 2.4, 2.4, 2.4, 2.4, 0.0])  # at most eight times
    assert numbers["share"] == pytest.approx(1.2)
    said = [entry.what for entry in guard.memory.log]
    assert said.count("replay begins") == said.count("replay ends") == 1


def test_a_pull_back_that_finds_no_way_down_calls_for_replay(monkeypatch):
    guard = CurvatureBudget(budget_kl=1e-2)
    _, model = begun(guard, 0.95)
    monkeypatch.setattr(type(model.safety), "heldout", lambda self: 0.0095)
    monkeypatch.setattr(budget, "pull_back", lambda *given: PulledBack(0.0095, "nowhere"))
    guard._control(model, budget.CEILING, model.vector())
    assert guard.memory.numbers["replaying"]


@pytest.mark.parametrize(("every", "now", "replaying"), [(4, 0.0022, 0), (4, 0.0023, 1), (1, 0.0023, 0)])
def test_in_large_spaces_replay_begins_where_the_next_look_would_be_too_late(every, now, replaying, monkeypatch):
    """The root of the KL has risen evenly over four steps; in four more it is at four times the KL."""
    guard = CurvatureBudget(budget_kl=1e-2, every=every, examples=ALL)
    _, model = begun(guard, 0.0)
    monkeypatch.setattr(type(model.safety), "heldout", lambda self: now)
    guard.memory.numbers["checked"], model.step = 0, 4
    guard._control(model, budget.CEILING, model.vector())
    assert guard.memory.numbers["replaying"] == replaying


@pytest.mark.parametrize("every", [1, 4])
def test_one_pull_back_upon_another_calls_for_replay(every, monkeypatch):
    for apart, replaying in ((2 * every, 1), (2 * every + 1, 0)):
        guard = CurvatureBudget(budget_kl=1e-2, every=every)
        _, model = begun(guard, 0.95)
        monkeypatch.setattr(type(model.safety), "heldout", lambda self: 0.0095)
        monkeypatch.setattr(budget, "pull_back", lambda *given: PulledBack(0.008, "down"))
        for _ in range(2):
            assert not guard.memory.numbers["replaying"]
            guard._control(model, budget.CEILING, model.vector())
            model.step += apart
        assert guard.memory.numbers["replaying"] == replaying


@pytest.mark.parametrize("share", [0.1, 2.0])
def test_replay_adds_the_safety_gradient_at_its_share_of_the_task(share):
    guard = CurvatureBudget(budget_kl=1e-2, examples=ALL, replay_share=share)
    _, model = begun(guard, 0.3)
    guard.memory.numbers["replaying"] = 1
    task, safety = model.gradient(), model.safety.divergence.gradient()
    without = task - safety * (task @ safety) / (safety @ safety)
    guard.shape_gradient(model)
    wanted = without + share * safety * torch.linalg.vector_norm(task) / torch.linalg.vector_norm(safety)
    torch.testing.assert_close(model.gradient(), wanted)


def test_what_is_replayed_is_the_fresh_gradient_and_not_the_mean():
    guard = CurvatureBudget(budget_kl=1e-2, examples=2, replay_share=0.3)
    _, model = begun(guard, 0.3)
    guard.memory.numbers["replaying"] = 1
    divergence, task = model.safety.divergence, model.gradient()
    past = 0.05 * random(len(task), 7)
    guard.memory.tensors["slope"] = past.clone()
    safety = divergence.gradient(draw(divergence.m, 2, model.seed + model.step))
    mean = budget.REMEMBERED * past + (1 - budget.REMEMBERED) * safety
    guard.shape_gradient(model)
    without = task - mean * min(0.0, float(task @ mean)) / (mean @ mean)
    length = 0.3 * torch.linalg.vector_norm(task) / torch.linalg.vector_norm(safety)
    torch.testing.assert_close(model.gradient(), without + length * safety)
    assert abs(float(safety @ mean / (safety.norm() * mean.norm()))) < 0.999


def test_levelling_under_descent_leaves_the_remembered_gradient_as_it_is():
    guard = CurvatureBudget(budget_kl=1e-2, examples=ALL)
    _, model = begun(guard, 0.8, "sgd")
    before = model.vector()
    slope = guard.memory.tensors["slope"] = model.safety.divergence.gradient()
    kept = slope.clone()
    model.write(before.add(slope, alpha=0.1))
    guard._level(model, before)
    torch.testing.assert_close(model.vector(), before)
    assert torch.equal(guard.memory.tensors["slope"], kept)


def test_after_a_retreat_the_weights_are_kept_though_kl_is_above_the_budget(monkeypatch):
    guard = CurvatureBudget(budget_kl=1e-2)
    _, model = begun(guard, 0.95)
    old = guard.memory.tensors["inside"].clone()
    monkeypatch.setattr(type(model.safety), "heldout", lambda self: 0.02)
    for retreated, kept in ((False, old), (True, model.vector())):
        monkeypatch.setattr(budget, "pull_back", lambda *given, r=retreated: PulledBack(0.02, "back", retreated=r))
        guard._control(model, budget.CEILING, old)
        torch.testing.assert_close(guard.memory.tensors["inside"], kept)
    assert not torch.equal(old, model.vector())


@pytest.mark.parametrize("every", [1, 4])
def test_after_a_pull_back_the_safety_gradient_is_taken_afresh(every, monkeypatch):
    guard = CurvatureBudget(budget_kl=1e-2, every=every)
    _, model = begun(guard, 0.5)
    asked = []
    real = type(model.safety.divergence).gradient
    monkeypatch.setattr(
        type(model.safety.divergence), "gradient", lambda self, w: (asked.append(model.step), real(self, w))[1]
    )
    model.step = 7
    guard.shape_gradient(model)
    for pulled, taken in ((8, True), (4, every == 1)):
        model.step, guard.memory.numbers["pulled"] = 8, pulled
        asked.clear()
        guard.shape_gradient(model)
        assert (asked == [8]) == taken


@pytest.mark.parametrize(("kl", "pulls"), [(0.0095, 0), (0.011, 1)])
def test_at_the_end_of_the_run_the_budget_itself_is_the_limit(kl, pulls, monkeypatch):
    for known in (True, False):
        guard = CurvatureBudget(budget_kl=1e-2)
        _, model = begun(guard, 0.8)
        guard.memory.tensors["before"] = model.vector()
        model.steps = model.step if known else None
        guard.memory.numbers.update(next_check=1000, next_refresh=1000)
        monkeypatch.setattr(type(model.safety), "heldout", lambda self: kl)
        monkeypatch.setattr(budget, "pull_back", lambda *given: PulledBack(0.005, "down"))
        guard.shape_update(model)
        before_end = sum("pulled back" in entry.what for entry in guard.memory.log)
        assert before_end == (pulls if known else 0)  # a checkpoint of the last step is saved before `finish`
        guard.finish(model)
        assert sum("pulled back" in entry.what for entry in guard.memory.log) == pulls


@pytest.mark.parametrize("steps", [10, None])
def test_the_last_step_is_looked_at_before_a_trainer_saves_it(steps):
    """Every fourth update, ten steps: what the last step leaves is within the budget, if it is known to be the last."""
    world = World("adamw", 0.05)
    model = world.trainee()
    model.steps = steps
    session = Session(CurvatureBudget(budget_kl=1e-3, every=4), model)
    session.begin()
    for _ in range(10):
        step(world, model, session)
    assert (model.safety.heldout() <= 1e-3) == (steps is not None)
    session.end()
    assert model.safety.heldout() <= 1e-3


def test_a_budget_of_zero_measures_its_directions_again():
    guard = CurvatureBudget(budget_kl=0.0, refresh=4, steer=False)
    World("adamw", 0.01).train(guard, 12)
    assert sum("directions measured" in entry.what for entry in guard.memory.log) >= 3


def test_a_guard_that_is_used_again_knows_nothing_of_the_run_before():
    guard = CurvatureBudget(budget_kl=1e-3)
    first, second = World("adamw", 0.05), World("adamw", 0.05)
    first.train(guard, 12)
    second.train(guard, 12)
    assert torch.equal(first.flat, second.flat)


@pytest.mark.parametrize("carry", [True, False])
def test_in_large_spaces_no_direction_is_held_as_a_vector(carry, monkeypatch):
    """The weights before the update are; and the coordinates are those that log-likelihoods tell, to first order."""
    most = {}
    for dense in (2**26, 0):
        monkeypatch.setattr(budget, "DENSE", dense)
        world = World("adamw", 0.002, bend=0.0)
        guard = CurvatureBudget(budget_kl=1e-3, carry=carry, check=0, refresh=4, steer=False)
        session = Session(guard, world.trainee())
        session.begin()
        tensors = guard.memory.tensors
        for _ in range(6):
            step(world, session.model, session)
        z = (tensors["coefficients"].T @ session.model.safety.shift() - tensors["base"]).double()
        assert float(z.norm()) > 1e-3
        torch.testing.assert_close(tensors["z"], z, rtol=0.05, atol=1e-4)
        assert "before" not in tensors
        session.before_step()
        assert "before" in tensors
        most[dense] = session.most
    assert most[0] == tensors["coefficients"].nbytes + 3 * z.nbytes + world.flat.nbytes
    assert most[2**26] == most[0] + len(z) * world.flat.nbytes


def test_the_memory_of_a_guard_is_what_it_held_at_the_most():
    """The budget's: directions, weights inside, weights before the update, a safety gradient, and small things."""
    world = World("adamw", 0.02)
    guard = CurvatureBudget(budget_kl=1e-2, rank=3)
    session = Session(guard, world.trainee())
    session.begin()
    for _ in range(6):
        step(world, session.model, session)
    session.end()
    vectors = 3 + 3  # directions, and the three besides
    assert 0 < session.most - vectors * world.flat.nbytes < 1.5 * guard.memory.tensors["coefficients"].nbytes + 400
    assert guard.memory.nbytes < session.most
