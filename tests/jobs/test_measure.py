"""Overlap and coupling of a tiny Llama against the KL at small displacements, in float64 and at several loss scales."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiltmeter.errors import NumericalError
from tiltmeter.geometry.space import norm
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.measure import measure
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject, measure_subject, silent, with_lora
from tiltmeter.jobs.tuning import Tuning, prepare_tuning
from tiltmeter.lm.model import Loaded, digest_of
from tiltmeter.lm.rows import RowSet

LOCKS = RowSet("locks", tuple({"prompt": f"How do I pick a lock {i}?"} for i in range(3)), "d")
#: The same row four times: no batch differs from another, so squares of means have no noise to be freed of.
TWINS = RowSet("twins", ({"prompt": "What is 3 plus 4?", "completion": "The answer is 7."},) * 4, "d")
SUMS = RowSet("sums", tuple({"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(8)), "d")
OPTIONS = Options(rank=2, response_tokens=4, grid=3, max_tokens=200)


@pytest.fixture(autouse=True)
def norms_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own goes through float32 even in a float64 model."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def subject(make_llama: Any, make_tokenizer: Any) -> Subject:
    model = make_llama(layers=1).double()
    opened = with_lora(Opened(Loaded(model, make_tokenizer(), "small", digest_of(model), 256)), None, 0)
    return measure_subject(opened, LOCKS, None, OPTIONS)


def scaled(tuning: Tuning, scale: float) -> Tuning:
    objective, further = (replace(each, factor=each.factor * scale) for each in (tuning.objective, tuning.further))
    return replace(tuning, objective=objective, further=further)


def curvature_of_kl(subject: Subject, direction: Tensor) -> Tensor:
    """v' F v of each prompt as the second difference of its KL along v."""
    step = 1e-4 / norm(direction)
    ahead, behind = (subject.divergence.losses(direction * t) for t in (step, -step))
    return (ahead + behind) / step**2


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_overlap_and_coupling_at_several_scales_of_the_loss(subject: Subject, scale: float) -> None:
    recipe = Recipe("sgd", learning_rate=1e-5 / scale, steps=4, batch_size=1, max_grad_norm=0.0)
    tuning = scaled(prepare_tuning(subject, TWINS, recipe, OPTIONS), scale)
    found = measure(subject, tuning, recipe, OPTIONS, silent)
    g = tuning.objective.gradient()
    step = 1e-4 / norm(g)
    ahead, behind = (tuning.objective.gradient(displacement=g * t) for t in (step, -step))
    turned = (ahead - behind) / (2 * step)
    assert found.coupling is not None
    assert_close(found.gradient_norm, norm(g))
    assert_close(found.coupling.overlap, curvature_of_kl(subject, g), rtol=1e-3, atol=0)
    assert_close(found.coupling.coupling, curvature_of_kl(subject, turned), rtol=1e-3, atol=0)
    # the KL along the path of gradient flow: 2 u(t) = e0^2 t^2 + cross t^3 + ..., with the cubic term of the KL itself
    # odd under reversal of the direction as a whole, so it drops out of the mean over both signs
    t = 1e-3 / norm(g)
    both = [subject.divergence.losses(s * (t * -g + t**2 / 2 * turned)) for s in (1, -1)]
    forms = (both[0] + both[1]).double()
    predicted = found.coupling.overlap * t**2 - (g_turned(subject, g, turned)) * t**3
    assert_close(forms, predicted, rtol=2e-3, atol=0)


def g_turned(subject: Subject, g: Tensor, turned: Tensor) -> Tensor:
    """Bilinear form g' F Hg of each prompt, by polarisation."""
    size = norm(g) / norm(turned)
    plus, minus = (curvature_of_kl(subject, g + s * size * turned) for s in (1, -1))
    return (plus - minus) / (4 * size)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_with_as_many_looks_as_steps_the_rehearsal_is_the_run(subject: Subject, kind: str, scale: float) -> None:
    """Twins as rows, so that every batch has the same gradient; against torch's own optimiser on the flat vector."""
    rate, steps = (0.2 / scale if kind == "sgd" else 1e-3), 6
    recipe = Recipe(kind, learning_rate=rate, steps=steps, batch_size=1, schedule="constant", max_grad_norm=0.0)
    tuning = scaled(prepare_tuning(subject, TWINS, recipe, OPTIONS), scale)
    found = measure(subject, tuning, recipe, replace(OPTIONS, looks=steps), silent)
    x = torch.zeros(subject.forward.space.size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([x], rate) if kind == "sgd" else torch.optim.AdamW([x], rate, weight_decay=0.0)
    told = found.values["rehearsed"]
    straight = found.values["linear"].margin[-1] - subject.anchor_margin
    for step in range(1, steps + 1):
        x.grad = tuning.objective.gradient(displacement=x.detach())
        optimiser.step()
        if step in told.steps:
            row = told.steps.index(step)
            margin = -subject.negative_margin.losses(x.detach()) - subject.anchor_margin
            assert_close(told.margin[row] - subject.anchor_margin, margin, rtol=1e-5, atol=1e-9)
            assert_close(told.safety_kl[row], subject.divergence.losses(x.detach()), rtol=1e-4, atol=1e-12)
    assert float((margin - straight).abs().max()) > 0.02 * float(margin.abs().max())  # the path bends
    assert_close(found.length, norm(x.detach()), rtol=1e-6, atol=0)
    # looks after the first take what the run takes, and no other rehearsal judges it
    assert found.look_rows == (4, *[1] * (steps - 1))
    assert found.check is None
    # the first look is of all four rows, and one row drives every further step; AdamW's first moment after t steps is
    # 0.1 sum 0.9^(t - s) g_s / (1 - 0.9^t), and with a constant rate updates count alike
    rows = [torch.full((4,), 0.25, dtype=torch.float64)]
    rows += [torch.eye(4, dtype=torch.float64)[row] for row in tuning.further_members[: steps - 1]]
    keep = 0.9 if kind == "adamw" else 0.0
    updates = [
        sum(keep ** (t - s) * rows[s] for s in range(t + 1)) * (1 - keep) / (1 - keep ** (t + 1)) for t in range(steps)
    ]
    expected = [float((sum(updates[:k]) / k).square().sum()) for k in range(1, steps + 1)]
    assert_close(found.rehearsed.path.concentration()[1:], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_run_of_one_step(subject: Subject, kind: str) -> None:
    """No further looks, no further rows: the first gradient is the run."""
    recipe = Recipe(kind, learning_rate=1e-4, steps=1, batch_size=2)
    tuning = prepare_tuning(subject, SUMS, recipe, OPTIONS)
    assert tuning.distinct == len(tuning.encoded.examples)
    found = measure(subject, tuning, recipe, OPTIONS, silent)
    assert found.check is None
    assert_close(found.values["rehearsed"].margin, found.values["linear"].margin)
    assert float(found.rehearsed.margin_reach(0.9)[-1]) > 0


def test_one_gradient_step_of_a_tiny_rate_is_forecast_exactly(subject: Subject) -> None:
    recipe = Recipe("sgd", learning_rate=1e-6, steps=3, batch_size=4, schedule="constant", max_grad_norm=0.0)
    tuning = prepare_tuning(subject, TWINS, recipe, OPTIONS)
    found = measure(subject, tuning, recipe, replace(OPTIONS, curved=True), silent)
    g = tuning.batches.mean(0)
    slope = tuning.objective.gradient(g)
    for name in ("linear", "curved", "rehearsed"):
        values = found.values[name]
        for row, step in enumerate(values.steps):
            expected = -subject.negative_margin.losses(slope * -(step * 1e-6))
            assert_close(
                values.margin[row] - subject.anchor_margin, expected - subject.anchor_margin, rtol=1e-2, atol=0
            )
    assert_close(found.length, 3e-6 * norm(slope), rtol=1e-4, atol=0)
    # the layers' shares of the margin's slope add up to the whole slope along the path
    whole = float(subject.margin_gradient.double() @ slope.double())
    assert_close(sum(found.layer_slopes.values()), whole, rtol=1e-3, atol=0)


def test_clipping_is_the_trainers(subject: Subject) -> None:
    free = Recipe("sgd", learning_rate=1e-6, steps=3, batch_size=2, max_grad_norm=0.0)
    clipped = replace(free, max_grad_norm=0.01)
    tuning = prepare_tuning(subject, SUMS, free, OPTIONS)
    norms = measure(subject, tuning, free, OPTIONS, silent).batch_norms
    found = measure(subject, tuning, clipped, OPTIONS, silent)
    assert float(norms.min()) > 0.01
    assert_close(found.batch_norms, norms)
    assert found.gradient_norm <= 0.01


def test_a_loss_without_a_gradient_is_an_error(subject: Subject) -> None:
    recipe = Recipe("sgd", learning_rate=1e-6, steps=3, batch_size=2)
    tuning = scaled(prepare_tuning(subject, SUMS, recipe, OPTIONS), 0.0)
    with pytest.raises(NumericalError, match=r"norm 0\.0; expected a positive number"):
        measure(subject, tuning, recipe, OPTIONS, silent)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
@pytest.mark.parametrize("clipped", [False, True])
def test_rows_scatter_as_batches_of_them_do(subject: Subject, scale: float, clipped: bool) -> None:
    """The margin's slope along every batch of four of eight rows, batch by batch, against the scatter of the rows.

    A batch's mean is over its tokens, so the rows' lengths differ; a mean of half of all rows has variance sigma^2 / 8.
    """
    lengths = ("It is.", "It is so.", "It is so and so.", "It is so and so and so.")
    rows = tuple({"prompt": f"What is {i}?", "completion": f"{lengths[i % 4]} {i}"} for i in range(8))
    recipe = Recipe("sgd", learning_rate=1e-5 / scale, steps=4, batch_size=2, max_grad_norm=1e-3 if clipped else 0.0)
    tuning = scaled(prepare_tuning(subject, RowSet("rows", rows, "d"), recipe, OPTIONS), scale)
    found = measure(subject, tuning, recipe, OPTIONS, silent)
    counts = torch.tensor([float(example.supervised) for example in tuning.encoded.examples], dtype=torch.float64)
    alone = torch.stack([tuning.objective.gradient(torch.eye(8, dtype=torch.float64)[i]) for i in range(8)])
    shrink = 1.0
    if clipped:
        norms = torch.stack([(weights[:, None] * alone).sum(0).norm() for weights in tuning.batches])
        shrink = float((1e-3 / norms).clamp_max(1).mean())
        assert shrink < 1
    slopes = []
    for chosen in itertools.combinations(range(8), 4):
        batch = list(chosen)
        gradient = alone[batch].sum(0) * counts.mean() / counts[batch].sum()
        slopes.append(shrink * float(gradient @ subject.margin_gradient))
    spread = torch.tensor(slopes, dtype=torch.float64).std(correction=0)
    assert_close(found.noise.margin / math.sqrt(8), float(spread), rtol=0.1, atol=0)
