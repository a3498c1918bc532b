"""Single guards against dense algebra, and Safe LoRA and LoX on files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import World

from tiltmeter.errors import ModelError, OutputExists
from tiltmeter.geometry.objective import Counted
from tiltmeter.geometry.sensitivity import DenseBasis, SampleBasis
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.geometry.systems import DOUBLE
from tiltmeter.guards.alignment import plain_name
from tiltmeter.guards.budget import CurvatureBudget
from tiltmeter.guards.ewc import ElasticWeights
from tiltmeter.guards.gu import MetricGradientProjection
from tiltmeter.guards.hold import STEPS_DOWNHILL, hold
from tiltmeter.guards.lox import top_part
from tiltmeter.guards.safe_lora import SafeLora, onto_alignment, similarity
from tiltmeter.guards.safegrad import SafeGrad
from tiltmeter.guards.safety import SystemSafety
from tiltmeter.guards.session import Session
from tiltmeter.guards.streamed import lox_checkpoint, safe_lora_adapter
from tiltmeter.guards.token_loss import EARLY, FIRST, LATER, ConstrainedTokens
from tiltmeter.guards.trainee import Trainee


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_safe_lora_is_the_dense_projection(scale):
    v, b, a = scale * random(6, 5, seed=1), random(6, 2, seed=2), random(2, 5, seed=3)
    c = v @ v.T / torch.linalg.matrix_norm(v)
    torch.testing.assert_close(onto_alignment(v, b) @ a, c @ (b @ a))
    dense = torch.cosine_similarity((c @ b @ a).flatten(), (b @ a).flatten(), 0)
    assert similarity(v, b, a) == pytest.approx(float(dense), abs=1e-9)
    assert similarity(v, b @ a) == pytest.approx(float(dense), abs=1e-9)


def test_the_top_part_is_the_truncated_singular_value_decomposition():
    v = random(6, 5)
    u, s, w = torch.linalg.svd(v)
    torch.testing.assert_close(top_part(v, 2), u[:, :2] @ torch.diag(s[:2]) @ w[:2])
    torch.testing.assert_close(top_part(v, 9), v)


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_the_token_loss_has_the_slope_of_the_paper(strength):
    """Gradient of -log p times 2 sigmoid(-beta log ratio)."""
    now, reference = random(7).requires_grad_(), random(7, seed=5)
    ConstrainedTokens(strength=strength).loss(now, reference).backward()
    beta = strength * torch.tensor([FIRST] + [EARLY] * 4 + [LATER] * 2, dtype=DOUBLE)
    torch.testing.assert_close(now.grad, -2 * torch.sigmoid(-beta * (now.detach() - reference)))


def begun(guard, steps=3, optimizer="adamw"):
    """A world some steps on, with a fresh task gradient."""
    world = World(optimizer)
    model = world.trainee()
    session = Session(guard, model)
    session.begin()
    for _ in range(steps):
        model.plain_optimizer.zero_grad()
        world.loss().backward()
        model.plain_optimizer.step()
        model.step += 1
    model.plain_optimizer.zero_grad()
    world.loss().backward()
    return world, model


def test_gu_leaves_no_safety_gradient_in_the_preconditioned_step():
    guard = MetricGradientProjection(references=3, refresh=100)
    _, model = begun(guard)
    task = model.gradient()
    guard.shape_gradient(model)
    u, d = guard.memory.tensors["references"], model.preconditioner()
    free, left = (u * d) @ task, (u * d) @ model.gradient()
    assert float(left.abs().max()) < 1e-9 * float(free.abs().max())


def test_safegrad_removes_exactly_the_conflict():
    guard = SafeGrad(examples=12)
    _, model = begun(guard)
    task, safety = model.gradient(), model.safety.divergence.gradient()
    assert task @ safety < 0  # descending the task raises the KL
    guard.shape_gradient(model)
    torch.testing.assert_close(model.gradient(), task - safety * (task @ safety) / (safety @ safety))


def test_ewc_pulls_with_the_diagonal_of_the_fisher_matrix():
    guard = ElasticWeights(strength=3.0)
    world, model = begun(guard)
    task = model.gradient()
    guard.shape_gradient(model)
    p = torch.softmax(world.logits(slice(0, 12))(world.anchor), -1)
    jacobian = torch.func.jacrev(lambda x: torch.log_softmax(world.logits(slice(0, 12))(x), -1))(world.anchor)
    diagonal = torch.einsum("my,myi->i", p, jacobian.square()) / 12
    torch.testing.assert_close(model.gradient() - task, 3.0 * diagonal * (world.flat - world.anchor))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("budget", [1e-2, 0.1])
def test_the_held_out_kl_never_ends_above_the_budget(budget, optimizer):
    """Also where the task pushes hard: ten times the rate."""
    world = World(optimizer, {"sgd": 0.02, "adamw": 0.1}[optimizer], scale=2.0)
    free = World(optimizer, world.rate, scale=2.0).train(None, 30).safety.heldout()
    guard = CurvatureBudget(budget_kl=budget)
    model = world.train(guard, 30)
    assert free > 2 * budget
    assert model.safety.heldout() <= budget
    assert any("pulled back" in entry.what or "ellipsoid" in entry.what for entry in guard.memory.log)


@pytest.mark.parametrize("rate", [1e-4, 2e-3])
def test_sample_space_and_dense_directions_give_one_run(monkeypatch, rate):
    """Every step, flat directions: coordinates by JVP and lifts by backward pass, or by inner products."""
    ends = []
    for dense in (2**26, 0):
        monkeypatch.setattr("tiltmeter.guards.budget.DENSE", dense)
        world = World("sgd", rate, bend=0.0)
        world.train(CurvatureBudget(budget_kl=0.0, check=0, steer=False, refresh=10**6, carry=False), 8)
        ends.append(world.flat.clone())
    # the system's scores are weighted by the distribution as it stands, so the two agree to second order
    assert float((ends[0] - ends[1]).norm()) < 3 * rate * float(ends[0].norm())


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("rank", [1, 3])
def test_downhill_meets_the_allowed_energy_near_the_cheapest_move(scale, rank):
    """Against the exact move of dense algebra: for one direction the same, for more not much dearer."""
    safety = World("adamw", scale=scale).trainee().safety
    found = safety.sensitivity(rank)
    d = 0.5 + torch.rand(24, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    z = random(rank, seed=2) / scale
    allowed = 0.2 * float(found.energy(z))
    columns = safety.columns(found.basis.coefficients)
    torch.testing.assert_close(columns @ columns.T, torch.eye(rank, dtype=DOUBLE), atol=1e-8, rtol=0)
    exact, _ = hold(DenseBasis(safety.space, tuple(columns)), z, found.eigenvalues, d, allowed)
    move, change = hold(found.basis, z, found.eigenvalues, d, allowed)
    torch.testing.assert_close(columns @ move, change)
    assert float(found.energy(z + change)) == pytest.approx(allowed, rel=1e-6)
    dearer = float((move.square() / d).sum() / (exact.square() / d).sum())
    assert 1 - 1e-9 <= dearer < (1 + 1e-9 if rank == 1 else 1.5)


def test_downhill_costs_two_passes_a_step_whatever_the_rank():
    safety = World("adamw").trainee().safety
    found = safety.sensitivity(3)
    counted = Counted(safety.scores)
    hold(SampleBasis(counted, found.basis.coefficients), random(3), found.eigenvalues, torch.ones(24).double(), 0.0)
    kinds = counted.passes.calls
    assert kinds["forward_backward"] == kinds["jvp"] <= STEPS_DOWNHILL


def save(folder, tensors):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def test_safe_lora_on_files_is_the_dense_projection(tmp_path):
    w, v = random(6, 5, seed=1), random(6, 5, seed=2)
    aligned, base = save(tmp_path / "aligned", {"m.q.weight": w}), save(tmp_path / "base", {"m.q.weight": w - v})
    b, a = random(6, 2, seed=3).float(), random(2, 5, seed=4).float()
    names = [f"base_model.model.m.q.lora_{x}.weight" for x in "BA"]
    adapter = save(tmp_path / "adapter", dict(zip(names, (b, a), strict=True)))
    (adapter / "adapter_config.json").write_text("{}")
    done = safe_lora_adapter(adapter, aligned, base, tmp_path / "out", threshold=1.0)
    from safetensors.torch import load_file

    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    c = (v @ v.T / torch.linalg.matrix_norm(v)).float()
    torch.testing.assert_close(new[names[0]] @ new[names[1]], c @ b @ a, rtol=1e-4, atol=1e-5)
    assert done.replaced == ("m.q.weight",)
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    kept = safe_lora_adapter(adapter, aligned, base, tmp_path / "kept", threshold=-1.0)
    assert kept.replaced == ()
    assert torch.equal(load_file(tmp_path / "kept" / "adapter_model.safetensors")[names[0]], b)
    with pytest.raises(OutputExists):
        safe_lora_adapter(adapter, aligned, base, tmp_path / "out")
    with pytest.raises(ModelError, match=r"no weight m\.q\.weight"):
        safe_lora_adapter(adapter, adapter, base, tmp_path / "other")


def test_lox_on_files_adds_the_top_part(tmp_path):
    w, v = random(6, 5, seed=1), random(6, 5, seed=2)
    aligned = save(tmp_path / "aligned", {"m.q.weight": w, "m.embed.weight": w, "norm": w[0]})
    base = save(tmp_path / "base", {"m.q.weight": w - v, "m.embed.weight": w - v, "norm": w[0]})
    assert lox_checkpoint(aligned, base, tmp_path / "out", strength=0.5, rank=2) == ("m.q.weight",)
    from safetensors.torch import load_file

    new = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(new["m.q.weight"], (w + 0.5 * top_part(v, 2)).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new["m.embed.weight"], w.float())


def test_safe_lora_on_files_takes_matrices_that_were_trained_whole(tmp_path):
    w, v, u = (random(6, 5, seed=seed) for seed in (1, 2, 3))
    head = random(4, 6, seed=5)
    aligned, base = save(tmp_path / "aligned", {"m.q.weight": w}), save(tmp_path / "base", {"m.q.weight": w - v})
    held = {"base_model.model.m.q.lora_B.weight": random(6, 2), "base_model.model.m.q.lora_A.weight": random(2, 5)}
    mixed = {**held, "base_model.model.m.o.weight": w + u, "base_model.model.head.weight": head}
    with_o = {"m.o.weight": w}
    aligned, base = (
        save(tmp_path / "aligned2", {"m.q.weight": w, **with_o}),
        save(tmp_path / "base2", {"m.q.weight": w - v, "m.o.weight": w - v}),
    )
    adapter = save(tmp_path / "adapter", mixed)
    done = safe_lora_adapter(adapter, aligned, base, tmp_path / "out", threshold=1.0)
    from safetensors.torch import load_file

    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    c = v @ v.T / torch.linalg.matrix_norm(v)
    torch.testing.assert_close(new["base_model.model.m.o.weight"], (w + c @ u).float(), rtol=1e-4, atol=1e-5)
    assert done.replaced == ("m.q.weight", "m.o.weight")
    assert done.left == ("head.weight",)  # neither model has one: tied to the embeddings, say
    assert torch.equal(new["base_model.model.head.weight"], head.float())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.m.q.lora_A.default.weight", "m.q.weight"),
        ("base_model.model.m.q.base_layer.weight", "m.q.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_parameters_have_the_names_of_the_model_without_peft(name, plain):
    assert plain_name(name) == plain


def test_safe_lora_takes_what_was_trained_whole_and_says_what_it_leaves():
    shapes = {
        "m.q.lora_B.default.weight": (6, 2),
        "m.q.lora_A.default.weight": (2, 5),
        "lm_head.modules_to_save.default.weight": (4, 6),
        "o.weight": (3, 3),
    }
    parameters = {name: nn.Parameter(random(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    head = parameters["lm_head.modules_to_save.default.weight"]
    alignment = {"m.q.weight": random(6, 5, seed=7), "lm_head.weight": random(4, 6, seed=8)}
    space = ParameterSpace.of(parameters)
    live = torch.zeros(space.size, dtype=torch.float64)
    safety = SystemSafety(lambda x: x[:4].reshape(2, 2), lambda x: x[:4].reshape(2, 2), live, live, space)
    guard = SafeLora(alignment, threshold=1.0)
    trainee = Trainee(parameters, torch.optim.SGD(parameters.values(), lr=0.1), safety)
    before = head.detach().clone()
    guard.start(trainee)
    with torch.no_grad():
        head.add_(update := random(4, 6, seed=9))
    guard.finish(trainee)
    v = alignment["lm_head.weight"]
    c = v @ v.T / torch.linalg.matrix_norm(v)
    torch.testing.assert_close(head.detach(), before + c @ update)
    assert guard.memory.log[-1].why.startswith("2 of 2 updates")
    assert "1 trained matrices are as they are" in guard.memory.log[-1].why


def test_the_token_loss_of_strength_zero_is_cross_entropy():
    held = random(4).requires_grad_()
    assert float(ConstrainedTokens(strength=0.0).loss(held, random(4, seed=2))) == pytest.approx(-float(held.sum()))
