"""The tracker against dense arithmetic, and that it leaves no trace in what it measures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltmeter import store
from tiltmeter.demo import rows
from tiltmeter.demo.tiny import encode as toy_batch
from tiltmeter.errors import DataError, InputError, OutputExists
from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.tracking import anchor, drift
from tiltmeter.tracking.alarm import Budgets
from tiltmeter.tracking.tracker import Tracker

SAFETY = rows("tiny-safety")
PAIRS = [(row["prompt"], row["completion"]) for row in rows("tiny-copy")[:8]]


def step(model: Any, optimizer: Any) -> float:
    model.train()
    loss = model(**toy_batch(PAIRS)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def displaced(model: Any, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            out[name] = scale * torch.randn(p.shape, generator=generator)
            p.add_(out[name])
    return out


def make(aligned: Any, options: Any, folder: Path, **given: Any) -> tuple[Any, Tracker]:
    model, tokenizer = aligned()
    budgets = given.pop("budgets", None)
    return model, Tracker(model, tokenizer, SAFETY, folder, options=options(**given), budgets=budgets)


def naive(model: Any, before: Any, tracker: Tracker) -> tuple[Tensor, Tensor]:
    """KL and margin of every prompt, sequence by sequence, in float64, from the model's plain logits."""
    now, then = (copy.deepcopy(m).double().eval() for m in (model, before))
    kl, margin = [], []
    held = tracker.anchor.safety
    for answer, refusal, compliance in zip(held.responses, held.refusals, held.compliances, strict=True):

        def log_p(m: Any, example: Any) -> tuple[Tensor, Tensor]:
            labels = torch.tensor(example.labels)[1:]
            with torch.no_grad():
                out = m(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
            return out[labels != -100], labels[labels != -100]

        new, _ = log_p(now, answer)
        old, _ = log_p(then, answer)
        kl.append((old.exp() * (old - new)).sum(-1).mean())
        sums = [log.gather(-1, ids[:, None]).sum() for log, ids in (log_p(now, refusal), log_p(now, compliance))]
        margin.append(sums[0] - sums[1])
    return torch.stack(kl), torch.stack(margin)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 5e-2])
def test_kl_margin_and_norms_are_those_of_naive_arithmetic(
    aligned: Any, options: Any, tmp_path: Path, scale: float
) -> None:
    model, tracker = make(aligned, options, tmp_path / "t")
    before = copy.deepcopy(model)
    change = displaced(model, scale)
    row = tracker.measure(3, task_loss=1.25)
    kl, margin = naive(model, before, tracker)
    torch.testing.assert_close(torch.tensor(row["per_prompt"]["safety_kl"]).double(), kl, rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(torch.tensor(row["per_prompt"]["margin"]).double(), margin, rtol=1e-4, atol=1e-4)
    assert row["safety_kl"] == pytest.approx(float(kl.mean()), rel=2e-3)
    size = torch.cat([part.double().reshape(-1) for part in change.values()]).norm()
    assert row["weight_change"] == pytest.approx(float(size), rel=1e-4)
    assert row["task_loss"] == 1.25


def test_drift_is_the_projection_on_the_dense_fisher_matrix(aligned: Any, options: Any, tmp_path: Path) -> None:
    """Per-example gradients by autograd, their Fisher matrix by SVD, and the displacement projected on its top."""
    model, tracker = make(aligned, options, tmp_path / "t")
    before = copy.deepcopy(model)
    change = displaced(model, 1e-2)
    row = tracker.measure(1)
    space = ParameterSpace.of(dict(before.named_parameters()))
    gradients = []
    for example in tracker.anchor.safety.responses:
        before.zero_grad()
        labels = torch.tensor(example.labels)[1:]
        log = before(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
        loss = -log[labels != -100].gather(-1, labels[labels != -100][:, None]).sum() / example.supervised**0.5
        loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1).double() for p in before.parameters()]))
    _, values, directions = torch.linalg.svd(torch.stack(gradients), full_matrices=False)
    eigenvalues = values.square() / len(gradients)
    delta = space.flatten(change).double()
    z = directions[:4] @ delta
    torch.testing.assert_close(torch.tensor(row["drift_coordinates"]).double().abs(), z.abs(), rtol=5e-3, atol=1e-4)
    assert row["drift_energy"] == pytest.approx(float((eigenvalues[:4] * z.square()).sum() / 2), rel=5e-3)
    assert row["drift_outside"] == pytest.approx(float((delta.square().sum() - z.square().sum()).sqrt()), rel=1e-4)


def test_directions_by_jvp_and_directions_that_are_kept_agree(
    aligned: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = make(aligned, options, tmp_path / "kept")
    monkeypatch.setattr(anchor, "DENSE", 1)
    _, by_jvp = make(aligned, options, tmp_path / "jvp")
    assert kept.anchor.columns
    assert not by_jvp.anchor.columns
    displaced(model, 1e-2)
    with torch.no_grad():
        for p, q in zip(by_jvp.forward.model.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    first, second = kept.measure(4), by_jvp.measure(4)
    assert second["drift_coordinates"] == pytest.approx(first["drift_coordinates"], rel=1e-3, abs=1e-5)
    assert second["drift_energy"] == pytest.approx(first["drift_energy"], rel=1e-3)
    dear = by_jvp.measure(5)
    assert dear["drift_energy"] is None
    assert "JVP" in dear["reasons"]["drift_energy"]
    assert by_jvp.measure(6, final=True)["drift_energy"] == pytest.approx(first["drift_energy"], rel=1e-3)


def test_above_the_limit_a_sketch_stands_in_for_the_weights(
    aligned: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchor, "HELD", 1)
    model, tracker = make(aligned, options, tmp_path / "t")
    assert tracker.anchor.weights == {}
    change = displaced(model, 1e-2)
    row = tracker.measure(1)
    size = torch.cat([part.reshape(-1) for part in change.values()]).norm()
    assert row["weight_change"] == pytest.approx(float(size), rel=0.05)
    assert row["drift_outside"] is None
    assert "only a sketch is kept" in row["reasons"]["drift_outside"]


def test_measuring_leaves_no_trace(aligned: Any, options: Any, tmp_path: Path) -> None:
    """A run with a tracker that measures everything after every step, and one without, to the last bit."""
    finals, losses = [], []
    for tracked in (True, False):
        model, tokenizer = aligned()
        torch.manual_seed(3)
        if tracked:
            chosen = options(every=1, refresh_every=1, refusal_every=1, response_tokens=4)
            tracker = Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=chosen)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for number in range(1, 4):
            losses.append(step(model, optimizer))
            assert model.training
            if tracked:
                tracker.after_step(number, 1e-3, task_loss=losses[-1])
            losses.append(float(torch.rand(())))
        finals.append(model.state_dict())
    assert losses[:6] == losses[6:]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    assert [row["task_loss"] for row in tracker.rows[1:]] == losses[0:6:2]
    assert all(0 < row["subspace_overlap"] <= 1 + 1e-6 for row in tracker.rows[1:])
    assert all(0 <= row["refusal_rate"] <= 1 for row in tracker.rows[1:])


def test_flow_time_is_the_sum_of_the_rates_seen(aligned: Any, options: Any, tmp_path: Path) -> None:
    _, tracker = make(aligned, options, tmp_path / "t", every=4)
    for number, rate in enumerate((1e-3, 5e-4, 2.5e-4, 1e-4), 1):
        tracker.after_step(number, rate)
    assert [row["step"] for row in tracker.rows] == [0, 1, 2, 4]
    assert [row["flow_time"] for row in tracker.rows] == pytest.approx([0.0, 1e-3, 1.5e-3, 1.85e-3])
    unseen = tracker.measure(7)
    assert unseen["flow_time"] is None
    assert "3 steps were not seen" in unseen["reasons"]["flow_time"]


def test_a_resumed_tracker_measures_against_the_first_anchor(aligned: Any, options: Any, tmp_path: Path) -> None:
    model, first = make(aligned, options, tmp_path / "t")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    weights = {}
    for number in range(1, 5):
        first.after_step(number, 0.02, task_loss=step(model, optimizer))
        weights[number] = copy.deepcopy(model.state_dict())
    whole = (tmp_path / "t" / "rows.jsonl").read_bytes()
    again, tokenizer = aligned()
    again.load_state_dict(weights[2])  # the script loaded its checkpoint before it made the tracker
    second = Tracker(again, tokenizer, SAFETY, tmp_path / "t", options=options(), resume=True)
    second.resume(2)
    assert [row["step"] for row in second.rows] == [0, 1, 2]
    optimizer = torch.optim.SGD(again.parameters(), lr=0.02)
    for number in (3, 4):
        second.after_step(number, 0.02, task_loss=step(again, optimizer))
    assert (tmp_path / "t" / "rows.jsonl").read_bytes() == whole


def test_a_folder_of_another_run_is_refused(aligned: Any, options: Any, tmp_path: Path) -> None:
    model, tracker = make(aligned, options, tmp_path / "t")
    tokenizer = tracker.loaded.tokenizer
    with pytest.raises(OutputExists, match="Resume it"):
        Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=options())
    with pytest.raises(InputError, match="safety was"):
        Tracker(model, tokenizer, SAFETY[:50], tmp_path / "t", options=options(), resume=True)
    with pytest.raises(InputError, match="rank was 4 and is 3"):
        Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=options(rank=3), resume=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(InputError, match="space was"):
        Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=options(), resume=True)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameters"):
        Tracker(model, tokenizer, SAFETY, tmp_path / "u", options=options())
    weights = tmp_path / "t" / "anchor" / store.ARRAYS
    weights.write_bytes(weights.read_bytes()[:-10])
    model.requires_grad_(True)
    with pytest.raises(DataError, match="damaged"):
        Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=options(), resume=True)


def test_what_is_measured_can_be_left_out(aligned: Any, options: Any, tmp_path: Path) -> None:
    _, tracker = make(aligned, options, tmp_path / "t", rank=0)
    assert tracker.rows[0]["drift_energy"] is None
    assert "rank 0" in tracker.rows[0]["reasons"]["drift_energy"]
    assert tracker.rows[0]["weight_change"] == 0.0
    with pytest.raises(InputError, match="max_safety must be at least 2, got 1"):
        options(max_safety=1)


def test_the_budgets_are_checked_against_the_aligned_model(aligned: Any, options: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outside the budget before the first step"):
        make(aligned, options, tmp_path / "t", budgets=Budgets(margin=100.0))
    _, tracker = make(aligned, options, tmp_path / "u")
    assert tracker.budgets == Budgets(margin_drop=max(1.0, tracker.rows[0]["margin"] / 3))
    assert tracker.overhead()["share"] is None


def test_the_overlap_of_subspaces_is_that_of_their_angles() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.linalg.qr(torch.randn(30, 3, generator=generator))[0] for _ in range(2))
    expected = float(torch.linalg.svdvals(one.T @ two).square().mean())
    assert drift.subspace_overlap(tuple(one.T), tuple(two.T)) == pytest.approx(expected, rel=1e-5)
    assert drift.subspace_overlap(tuple(one.T), tuple(one.T)) == pytest.approx(1.0, rel=1e-5)


def test_an_interval_is_chosen_once_and_read_back(aligned: Any, options: Callable[..., Any], tmp_path: Path) -> None:
    _, tracker = make(aligned, options, tmp_path / "t")
    tracker.observe(1, 1e-3, tokens=500)
    chosen = tracker.schedule.every
    assert chosen < 64
    model, tokenizer = aligned()
    again = Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=options(), resume=True)
    assert again.schedule.every == chosen
    again.resume(0)
    again.observe(1, 1e-3, tokens=5)
    assert again.schedule.every == chosen
    other = Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=replace(options(), every=9), resume=True)
    assert other.schedule.every == 9


def test_the_commutator_is_two_walks_apart(aligned: Any, options: Any, tmp_path: Path) -> None:
    """A step on the margin and one on the batch, in either order, walked in float64 on plain losses."""
    model, tokenizer = aligned()
    batch = toy_batch(PAIRS)
    tracker = Tracker(model, tokenizer, SAFETY, tmp_path / "t", options=options(every=1, commutator_every=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 8))]
    for number in (1, 2):
        step(model, optimizer)
        tracker.after_step(number, 0.01, batches=halves)
    start = copy.deepcopy(model).double().eval()
    held = tracker.anchor.safety

    def margin_loss(m: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for sign, examples in ((-1.0, held.refusals), (1.0, held.compliances)):
            for example in examples:
                labels = torch.tensor(example.labels)[1:]
                log = m(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
                total = total + sign * log[labels != -100].gather(-1, labels[labels != -100][:, None]).sum() / held.m
        return total

    def task_loss(m: Any) -> Tensor:
        return m(**batch).loss

    def walk(*losses: Any) -> tuple[Tensor, list[Tensor]]:
        m, steps = copy.deepcopy(start), []
        for loss in losses:
            m.zero_grad()
            loss(m).backward()
            with torch.no_grad():
                steps.append(torch.cat([p.grad.reshape(-1) for p in m.parameters()]))
                for p in m.parameters():
                    p -= eta * p.grad
        return torch.cat([p.detach().reshape(-1) for p in m.parameters()]), steps

    eta = 0.0
    sizes = [float(walk(loss)[1][0].norm()) for loss in (margin_loss, task_loss)]
    eta = 1e-2 / max(sizes)
    apart = (walk(margin_loss, task_loss)[0] - walk(task_loss, margin_loss)[0]) / eta**2
    row = tracker.rows[-1]
    assert row["commutator_defect"] == pytest.approx(float(apart.norm()) / (sizes[0] * sizes[1]), rel=5e-3)
    inside = sum(float(column.double() @ apart) ** 2 for column in tracker.anchor.columns)
    assert row["commutator_inside"] == pytest.approx(inside / float(apart.norm()) ** 2, rel=2e-2)
    assert tracker.rows[1]["commutator_defect"] is None
    assert "four gradients" in tracker.rows[1]["reasons"]["commutator_defect"]


def test_a_batch_that_cannot_be_probed_says_why(aligned: Any, options: Any, tmp_path: Path) -> None:
    _, tracker = make(aligned, options, tmp_path / "t", every=1, commutator_every=1)
    tokens = torch.tensor([[5, 6, 7, 8]])
    for number, (batches, reason) in enumerate(
        (
            ([], "did not tell its batch"),
            ([{"input_ids": tokens}], "not given input_ids and labels"),
            ([{"input_ids": tokens, "labels": torch.full_like(tokens, -100)}], "no token"),
            (
                [{"input_ids": tokens, "labels": tokens, "position_ids": torch.tensor([[0, 1, 0, 1]])}],
                "packed into one",
            ),
        ),
        1,
    ):
        row = tracker.after_step(number, 1e-3, batches=batches)
        assert row is not None
        assert row["commutator_defect"] is None
        assert reason in row["reasons"]["commutator_defect"]
