"""The contract of every guard, one table: off is off, outside is untouched, safety is kept, a run can be resumed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from worlds import OPTIMIZERS, World, step

from tiltmeter.errors import InputError, SpaceMismatch, UnsupportedModel
from tiltmeter.guards.names import GUARDS
from tiltmeter.guards.session import REST, Session
from tiltmeter.guards.trainee import LARGEST_METRIC, Trainee

#: Settings that suit the world: its KL is a few hundredths to tenths of a nat after 40 steps.
SETTINGS = {
    "budget": {"budget_kl": 0.01},
    "ewc": {"strength": 100.0},
    "alignguard": {"strength": 100.0},
    "replay": {"strength": 20.0},
    "lisa": {"strength": 0.5, "task_steps": 3, "safety_steps": 1},
    "ema": {"strength": 0.95},
    "freeze": {"strength": 0.97},
    "gradient": {"references": 3},
    "gu": {"references": 4},
    "safe_lora": {"threshold": 1.0},
}

#: `none` does nothing, and `token_loss` shapes another kind of loss: both have tests of their own.
ON_THE_WORLD = sorted(set(GUARDS) - {"none", "token_loss"})

#: Guards that shape the gradient only. Under momentum or Adam they promise less, see test_laws; here they help.
RATES = {"sgd": 0.004, "adamw": 0.02}


def guard_for(name, world, **more):
    """A fresh guard with settings for this world."""
    given = {**SETTINGS.get(name, {}), **more}
    if name in ("safe_lora", "lox"):
        # C = VV'/||V|| scales with V: in these units the whole of V would make it an amplifier
        share = 0.2 if name == "safe_lora" else 1.0
        given["alignment"] = {key: share * v for key, v in world.alignment().items()}
    return GUARDS[name](**given)


def world_for(optimizer):
    return World(optimizer, RATES[optimizer])


def test_there_are_fourteen():
    assert len(GUARDS) == 14


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", sorted(GUARDS))
def test_strength_zero_is_bit_identical_to_no_guard(name, optimizer):
    free, off = world_for(optimizer), world_for(optimizer)
    free.train(None)
    torch.manual_seed(0)
    off.train(guard_for(name, off, strength=0.0))
    assert torch.equal(free.flat, off.flat)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", ON_THE_WORLD)
def test_safety_kl_is_lower_than_without(name, optimizer):
    free, guarded = world_for(optimizer), world_for(optimizer)
    before = float(free.loss().detach())
    without = free.train(None).safety.heldout()
    left = float(free.loss().detach())
    kept = guarded.train(guard_for(name, guarded)).safety.heldout()
    now = float(guarded.loss().detach())
    print(f"{name:10} {optimizer:6} held-out KL {without:.4f} -> {kept:.4f}, task {left:.3f} / {now:.3f}")
    assert kept < 0.9 * without
    assert now < before - 0.1 * (before - left)  # and something was learned


@pytest.mark.parametrize("name", ON_THE_WORLD)
def test_parameters_outside_the_space_are_untouched(name):
    world = world_for("adamw")
    bystander = world.bystander.detach().clone()
    frozen = world.parameters.pop("layers.3.weight").requires_grad_(False)
    held = frozen.detach().clone()
    model = _smaller(world)
    session = Session(guard_for(name, world), model)
    session.begin()
    for _ in range(5):
        model.plain_optimizer.zero_grad()
        x = torch.cat([p.reshape(-1) for p in world.parameters.values()])
        (world.task.slope[:18] @ x + x @ world.task.hessian[:18, :18] @ x / 2).backward()
        session.before_step()
        model.plain_optimizer.step()
        session.after_step()
    session.end()
    assert torch.equal(world.bystander, bystander)
    assert torch.equal(frozen, held)
    assert not torch.equal(world.flat[:18], world.anchor[:18])


def _smaller(world):
    """The first three layers only are trained and guarded."""
    from tiltmeter.geometry.space import ParameterSpace
    from tiltmeter.guards.safety import SystemSafety

    def widened(logits):
        return lambda theta: logits(torch.cat([theta, theta.new_zeros(6)]))

    safety = SystemSafety(
        widened(world.logits(slice(0, 12))),
        widened(world.logits(slice(12, 18))),
        world.anchor[:18],
        world.flat[:18],
        ParameterSpace.of(world.parameters),
    )
    return Trainee(world.parameters, OPTIMIZERS["adamw"](list(world.parameters.values()), 0.02), safety)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", ON_THE_WORLD)
def test_a_resumed_run_is_bit_identical(name, optimizer, tmp_path):
    whole = world_for(optimizer)
    whole.train(guard_for(name, whole), 20)

    first = world_for(optimizer)
    model = first.trainee()
    session = Session(guard_for(name, first), model)
    session.begin()
    for _ in range(13):
        step(first, model, session)
    session.save(tmp_path)
    weights, inner = first.flat.clone(), copy.deepcopy(model.plain_optimizer.state_dict())

    again = world_for(optimizer)
    guard = guard_for(name, again)
    again.flat.copy_(weights)
    model = again.trainee()
    model.plain_optimizer.load_state_dict(inner)
    model.step = 13
    session = Session(guard, model)
    session.begin(tmp_path)
    for _ in range(7):
        step(again, model, session)
    session.end()
    assert torch.equal(again.flat, whole.flat)


@pytest.mark.parametrize("name", ON_THE_WORLD)
def test_the_log_and_the_state_are_plain_values(name, tmp_path):
    world = world_for("adamw")
    model = world.trainee()
    session = Session(guard_for(name, world), model)
    session.begin()
    step(world, model, session)
    session.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"guard.safetensors", "guard.json"}
    fresh = Session(guard_for(name, world), model)
    fresh.begin(tmp_path)
    kept, put_back = session.guard.memory, fresh.guard.memory
    assert put_back.numbers == kept.numbers
    assert put_back.log == kept.log
    assert put_back.tensors.keys() == kept.tensors.keys()
    assert all(torch.equal(put_back.tensors[key], kept.tensors[key]) for key in kept.tensors)


@pytest.mark.parametrize("name", ON_THE_WORLD)
def test_a_strength_below_zero_is_refused(name):
    world = world_for("adamw")
    guard = guard_for(name, world, strength=-1.0)
    with pytest.raises(InputError, match="strength"):
        guard.start(world.trainee())
    with pytest.raises(InputError, match="strength"):
        guard_for(name, world, strength=float("nan")).start(world.trainee())


@pytest.mark.parametrize("name", ["budget", "gu"])
def test_guards_in_the_optimisers_metric_refuse_an_optimiser_whose_metric_is_unknown(name):
    world = world_for("adamw")
    model = world.trainee()
    optimizer = torch.optim.Rprop(list(world.parameters.values()), lr=0.01)
    with pytest.raises(UnsupportedModel, match="Rprop"):
        guard_for(name, world).start(Trainee(model.parameters, optimizer, model.safety))


@pytest.mark.parametrize("name", ["safe_lora", "lox"])
def test_guards_that_need_the_base_model_refuse_to_go_without(name):
    with pytest.raises(UnsupportedModel, match="base"):
        GUARDS[name]().start(world_for("adamw").trainee())


def test_freezing_refuses_a_single_layer():
    world = world_for("adamw")
    model = world.trainee()
    object.__setattr__(model.safety, "names", None)
    whole = nn.Parameter(world.flat)
    model = Trainee({"theta": whole}, torch.optim.SGD([whole], lr=0.1), model.safety)
    with pytest.raises(UnsupportedModel, match="two layers"):
        GUARDS["freeze"]().start(model)


def test_a_model_without_trainable_parameters_is_refused():
    model = world_for("adamw").trainee()
    with pytest.raises(UnsupportedModel, match="no parameter is trainable"):
        Trainee({}, model.optimizer, model.safety)


def test_an_optimiser_that_does_not_hold_the_parameters_is_refused():
    model = world_for("adamw").trainee()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(SpaceMismatch, match=r"layers\.0\.weight"):
        Trainee(model.parameters, other, model.safety)


def test_a_safety_source_of_another_space_is_refused():
    world = world_for("adamw")
    model = world.trainee()
    fewer = dict(list(world.parameters.items())[:2])
    with pytest.raises(SpaceMismatch):
        Trainee(fewer, model.optimizer, model.safety)


def test_a_state_of_another_guard_or_another_anchor_is_refused(tmp_path):
    world = world_for("adamw")
    session = Session(guard_for("replay", world), world.trainee())
    session.begin()
    session.save(tmp_path)
    with pytest.raises(InputError, match="Replay"):
        Session(guard_for("lisa", world), world.trainee()).begin(tmp_path)
    with pytest.raises(InputError, match="settings"):
        Session(guard_for("replay", world, strength=3.0), world.trainee()).begin(tmp_path)
    other = World("adamw", 0.02, seed=5)
    with pytest.raises(InputError, match="another aligned model"):
        Session(guard_for("replay", other), other.trainee()).begin(tmp_path)
    with pytest.raises(InputError, match="cannot resume"):
        Session(guard_for("replay", world), world.trainee()).begin(tmp_path / "nowhere")
    written = json.loads((tmp_path / REST).read_text())
    (tmp_path / REST).write_text(json.dumps({**written, "scored": written["scored"] + 1}))
    with pytest.raises(InputError, match=f"from {written['scored'] + 1} safety examples, this one from"):
        Session(guard_for("replay", world), world.trainee()).begin(tmp_path)
    older = {key: value for key, value in written.items() if key != "scored"}
    (tmp_path / REST).write_text(json.dumps({**older, "anchor": 2 * older["anchor"]}))
    with pytest.raises(InputError, match=r"another aligned model .* or it is of an older version: then train afresh"):
        Session(guard_for("replay", world), world.trainee()).begin(tmp_path)
    assert written["opening"] == 0
    for opening in (None, 0, 3):  # none is told by states of older versions, which took whole answers alone
        about = {key: value for key, value in written.items() if key != "opening"}
        (tmp_path / REST).write_text(json.dumps(about if opening is None else {**about, "opening": opening}))
        again = Session(guard_for("replay", world), world.trainee())
        if opening:
            with pytest.raises(
                InputError, match=r"openings of 3 tokens .* this one over 0; resume with --guard-opening 3"
            ):
                again.begin(tmp_path)
        else:
            again.begin(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rates_of_groups_are_part_of_the_metric(optimizer):
    """Two rates, as LoRA+ has, and a group that stands still."""
    world = world_for(optimizer)
    model = world.trainee()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    rates = dict(zip(world.parameters, (1e-3, 1e-3, 1.6e-2, 0.0), strict=True))
    held = kind([{"params": [p], "lr": rates[name]} for name, p in world.parameters.items()])
    model = Trainee(world.parameters, held, model.safety)
    for _ in range(3):
        held.zero_grad()
        world.loss().backward()
        held.step()
    size = {"sgd": lambda state: 1.0, "adamw": lambda state: (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8}
    dense = torch.cat(
        [rates[name] / size[optimizer](held.state[p]) * torch.ones(6).double() for name, p in world.parameters.items()]
        if optimizer == "sgd"
        else [(rates[name] / size[optimizer](held.state[p])).reshape(-1) for name, p in world.parameters.items()]
    )
    d = model.preconditioner()
    torch.testing.assert_close(d, (dense / dense[dense > 0].median()).clamp_max(LARGEST_METRIC))
    assert not d[18:].any()
    for group in held.param_groups:  # a warm-up begins at zero: then all count alike
        group["lr"] = 0.0
    at_rest = model.preconditioner()
    assert at_rest is None if optimizer == "sgd" else bool((at_rest > 0).all())
