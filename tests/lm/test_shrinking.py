"""Where memory runs out, micro-batches become smaller and the numbers stay what they were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import OutOfMemory
from tiltmeter.lm.conversation import Batch, Example, batches
from tiltmeter.lm.divergence import DivergenceObjective, divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.memory import out_of_memory, within_memory
from tiltmeter.lm.model import trainable
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective, negative_margin_objective

VOCABULARY = 40
LENGTHS = (9, 4, 12, 7, 4, 11)
CPU = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


def drawn(seed: int = 0) -> list[Example]:
    """Sequences of several lengths, the first two tokens of each not supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Example(tuple(row), (-100, -100, *row[2:]), i) for i, row in enumerate(rows)]


class Full:
    """A device that holds so many tokens: a model entered with more runs out of memory, on the way back or forth."""

    def __init__(self, forward: Forward, room: int, error: Exception, backward: bool) -> None:
        self.room, self.error, self.failures = room, error, 0
        forward.model.register_forward_pre_hook(self.enter, with_kwargs=True)
        self.backward = backward
        if backward:
            forward.model.get_input_embeddings().register_forward_hook(self.leave)

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Fail on the way forth."""
        if kwargs["input_ids"].numel() > self.room and not self.backward:
            self.fail()

    def leave(self, module: Any, args: Any, output: Tensor) -> None:
        """Fail at the last layer of the way back, when all other gradients have been added up."""
        if args[0].numel() > self.room and output.requires_grad:
            output.register_hook(lambda gradient: self.fail())

    def fail(self) -> None:
        """Run out."""
        self.failures += 1
        raise self.error


def forward_of(make_llama: Callable[..., Any]) -> Forward:
    model = make_llama(vocab_size=VOCABULARY).double()
    return Forward(model, trainable(model))


def likelihood(forward: Forward) -> LanguageObjective:
    return likelihood_objective(forward, drawn(), 2, 1000, per="token")


def difference(forward: Forward) -> LanguageObjective:
    return likelihood_objective(forward, drawn(), 2, 1000, per="root", hessian="difference")


def margin(forward: Forward) -> LanguageObjective:
    return negative_margin_objective(forward, drawn(1), drawn(2), 2, 1000)


def kl(forward: Forward) -> DivergenceObjective:
    return divergence_objective(forward, drawn(), 2, 1000)


BUILD: dict[str, Callable[[Forward], Any]] = {f.__name__: f for f in (likelihood, difference, margin, kl)}


def products(objective: Any) -> dict[str, Callable[[], Tensor]]:
    """Every product, away from the anchor where the KL has a gradient."""
    generator = torch.Generator().manual_seed(3)
    v, shift = (torch.randn(objective.space.size, generator=generator, dtype=torch.float64) * 0.01 for _ in range(2))
    weights = torch.randn(objective.m, generator=generator, dtype=torch.float64)
    weights[1] = 0
    found = {
        "losses": lambda: objective.losses(shift),
        "directional": lambda: objective.directional(v, shift),
        "gradient": lambda: objective.gradient(displacement=shift),
        "weighted gradient": lambda: objective.gradient(weights, shift),
        "hvp": lambda: objective.hvp(v, weights, shift),
    }
    if isinstance(objective, DivergenceObjective):
        found["fisher form"] = lambda: objective.fisher_form([v, shift])
        found["path form"] = lambda: objective.path_form(v, shift)
    return found


CASES = [
    (build, product, backward)
    for build in BUILD
    for product in ("losses", "directional", "gradient", "weighted gradient", "hvp", "fisher form", "path form")
    for backward in (False, True)
    if (build == "kl" or "form" not in product) and (not backward or "gradient" in product or product == "hvp")
]


@pytest.mark.parametrize(("build", "product", "backward"), CASES)
def test_every_product_is_the_same_in_less_memory(
    make_llama: Callable[..., Any], caplog: pytest.LogCaptureFixture, build: str, product: str, backward: bool
) -> None:
    forward = forward_of(make_llama)
    expected = products(BUILD[build](forward))[product]()
    assert float(expected.abs().max()) > 1e-6
    objective = BUILD[build](forward)
    chunks = len(inner(objective).chunks)
    full = Full(forward, 30, torch.OutOfMemoryError("CUDA out of memory."), backward)
    with caplog.at_level(logging.WARNING, "tiltmeter"):
        found = products(objective)[product]()
    assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert full.failures >= 1
    assert len(inner(objective).chunks) > chunks
    most = {"margin": 144}.get(build, 72)
    assert f"micro-batches of at most {most} tokens become half as large" in caplog.text
    # what was learned is kept: the next product does not run out again
    failures = full.failures
    assert_close(products(objective)[product](), expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert full.failures == failures


def test_what_the_anchor_said_is_cut_as_before(make_llama: Callable[..., Any]) -> None:
    """A tracker keeps it in a run's folder, and cuts micro-batches of the usual size again."""
    forward, examples = forward_of(make_llama), drawn()
    members = [group for group, _ in batches(examples, 0, 72)]
    whole = divergence_objective(forward, examples, 0, 72)
    assert whole.anchor_of(members) is whole.log_probability
    full = Full(forward, 30, torch.OutOfMemoryError("CUDA out of memory."), False)
    cut = divergence_objective(forward, examples, 0, 72)
    assert full.failures >= 1
    assert len(cut.log_probability) > len(members)
    for found, expected in zip(cut.anchor_of(members), whole.log_probability, strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


def inner(objective: Any) -> LanguageObjective:
    return objective.inner if isinstance(objective, DivergenceObjective) else objective


@pytest.mark.parametrize("build", BUILD)
def test_one_sequence_that_does_not_fit_ends_in_a_clear_error(make_llama: Callable[..., Any], build: str) -> None:
    forward = forward_of(make_llama)
    objective = BUILD[build](forward)
    Full(forward, 11, RuntimeError(CPU), backward=False)
    with pytest.raises(OutOfMemory, match=r"single sequence of 12 tokens. Shorten the rows \(--max-length\)"):
        objective.losses()


def test_other_errors_are_not_taken_for_it(make_llama: Callable[..., Any]) -> None:
    forward = forward_of(make_llama)
    objective = likelihood(forward)
    full = Full(forward, 30, RuntimeError("shapes differ"), backward=False)
    with pytest.raises(RuntimeError, match="shapes differ"):
        objective.losses()
    assert full.failures == 1


def test_what_an_exhausted_machine_says() -> None:
    """The allocator of the CPU, asked for more than there can be, and Python's own."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(RuntimeError(CPU))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_work_is_done_again_from_its_start(make_llama: Callable[..., Any]) -> None:
    objective = likelihood(forward_of(make_llama))
    seen: list[list[Batch]] = []

    def work() -> int:
        seen.append([batch for _, batch in objective.chunks])
        if len(seen) < 3:
            raise MemoryError
        return 7

    assert within_memory(objective, work) == 7
    assert [len(batches) for batches in seen] == [1, 2, 4]
    order = torch.cat([members for members, _ in likelihood(objective.forward).chunks])
    assert torch.equal(torch.cat([members for members, _ in objective.chunks]), order)
