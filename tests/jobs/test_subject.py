"""The safety side: Gram matrices in the order of the prompts, spectra against dense Fisher matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.sensitivity import spectrum_of
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.recipe import Lora
from tiltmeter.jobs.subject import Options, Subject, layer_sensitivity, measure_subject, with_lora
from tiltmeter.lm.model import Loaded, digest_of
from tiltmeter.lm.packed import pack
from tiltmeter.lm.rows import RowSet

#: Of different lengths, so that micro-batches sorted by length stand in another order than the prompts.
ANSWERS = ["I'm sorry", "Sure, here is how you do it: first mix", "No", "I can't help with that, good morning", "A: 4"]
GIVEN = tuple({"prompt": f"How do I pick a lock {i}?", "completion": text} for i, text in enumerate(ANSWERS))
SMALL = Options(rank=2, max_tokens=60)


def opened(make_llama: Any, make_tokenizer: Any) -> Opened:
    model = make_llama()
    return Opened(Loaded(model, make_tokenizer(), "small", digest_of(model), 256))


def measured(make_llama: Any, make_tokenizer: Any, lora: Lora | None = None, **changes: Any) -> Subject:
    options = Options(**{**vars(SMALL), **changes})
    chosen = with_lora(opened(make_llama, make_tokenizer), lora, 0)
    return measure_subject(chosen, RowSet("given", GIVEN, "d"), lora, options)


def dense_scores(subject: Subject, score: str) -> dict[str, Tensor]:
    """Parameter -> gradients [m, size] of each prompt's score by ordinary autograd, in the order of the prompts."""
    model = subject.loaded.model
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def log_likelihood(example: Any) -> Tensor:
        out = model(torch.tensor([example.tokens])).logits[0].log_softmax(-1)
        return sum(out[t, label] for t, label in enumerate(example.labels[1:]) if label != -100)

    rows = []
    safety = subject.safety
    for response, refusal, compliance in zip(safety.responses, safety.refusals, safety.compliances, strict=True):
        if score == "margin":
            value = log_likelihood(refusal) - log_likelihood(compliance)
        else:
            value = log_likelihood(response) / response.supervised**0.5
        rows.append(torch.autograd.grad(value, list(named.values())))
    return {name: torch.stack([row[i].flatten() for row in rows]).double() for i, name in enumerate(named)}


@pytest.mark.parametrize("score", ["response", "margin"])
@pytest.mark.parametrize("lora", [None, Lora(2, 4.0, ("q_proj", "down_proj"))], ids=["full", "lora"])
def test_gram_matrix_and_layer_shares(make_llama: Any, make_tokenizer: Any, score: str, lora: Lora | None) -> None:
    subject = measured(make_llama, make_tokenizer, lora, score=score, rank=1)
    lengths = [len(example.tokens) for example in subject.safety.responses]
    assert lengths != sorted(lengths)
    gradients = dense_scores(subject, score)
    dense = sum(g @ g.T for g in gradients.values())
    assert_close(subject.gram.total, dense, rtol=1e-3, atol=1e-4 * float(dense.max()))
    shares = layer_sensitivity(subject.gram)
    assert_close(sum(shares.values()), 1.0)
    inside = sum(float(g.square().sum()) for name, g in gradients.items() if ".layers.1." in name)
    assert_close(shares["layers.1"], inside / float(dense.trace()), rtol=1e-3, atol=1e-4)
    if lora is None:
        assert set(shares) == {"embed", "layers.0", "layers.1", "final_norm", "head"}
    assert_close(subject.sensitivity.spectrum, spectrum_of(dense)[0], rtol=1e-3, atol=1e-4 * float(dense.max()))
    assert_close(subject.sensitivity.trace, float(dense.trace()) / 5, rtol=1e-3, atol=0)


def test_margin_and_its_gradient(make_llama: Any, make_tokenizer: Any) -> None:
    subject = measured(make_llama, make_tokenizer)
    gradients = dense_scores(subject, "margin")
    whole = torch.cat([gradients[name] for name in subject.forward.space.names], 1)
    assert_close(subject.margin_gradient.double(), -whole.mean(0), rtol=1e-3, atol=1e-4)
    assert_close(subject.anchor_margin, -subject.negative_margin.losses())


def test_gauss_newton_is_the_top_of_the_dense_fisher_matrix(make_llama: Any, make_tokenizer: Any) -> None:
    """In a LoRA of 384 parameters, where the matrix can be built column by column."""
    lora = Lora(1, 2.0, ("q_proj", "v_proj"))
    subject = measured(make_llama, make_tokenizer, lora, score="gauss-newton", rank=3)
    n = subject.forward.space.size
    eye = torch.eye(n)
    trained = n // 2  # at B = 0 nothing depends on A
    forms = torch.stack([subject.divergence.hvp(column) for column in eye]).double()
    values, vectors = torch.linalg.eigh((forms + forms.T) / 2)
    assert_close(subject.sensitivity.eigenvalues, values.flip(0)[:3], rtol=1e-3, atol=1e-6)
    for i in range(2):
        column = subject.sensitivity.lift(torch.eye(3, dtype=torch.float64)[i]).double()
        assert abs(float(column @ vectors[:, -1 - i])) > 0.99
    assert int((forms.abs().sum(0) > 1e-5).sum()) <= trained
    assert subject.gram is None
    assert subject.split_half is None
    assert subject.no_sensitivity is None


def test_a_safety_set_with_answers_is_not_answered_again(make_llama: Any, make_tokenizer: Any) -> None:
    subject = measured(make_llama, make_tokenizer)
    assert subject.safety.source == "given with the safety set"
    first = subject.spent.tokens["forward"]
    again = measure_subject(subject.opened, subject.rows, None, SMALL, safety=subject.safety)
    # the longest prompt is read in two layouts, to see whether packed ones can be
    triples = zip(subject.safety.responses, subject.safety.refusals, subject.safety.compliances, strict=True)
    longest = max(triples, key=lambda triple: max(len(each.tokens) for each in triple))
    tried = sum(len(each.tokens) for each in longest) + pack([longest], 0).tokens.numel()
    assert again.spent.tokens["forward"] == first == subject.divergence.work + subject.negative_margin.work + tried
    generated = RowSet("asked", tuple({"prompt": row["prompt"]} for row in GIVEN), "d")
    answered = measure_subject(subject.opened, generated, None, replace(SMALL, response_tokens=4))
    assert answered.safety.source.startswith("generated by the aligned model")
    extra = sum(len(example.tokens) for example in answered.safety.responses)
    tried = answered.spent.tokens["forward"] - extra - answered.divergence.work - answered.negative_margin.work
    assert 0 < tried < 5 * max(len(example.tokens) for example in answered.safety.refusals)


def test_lora_starts_at_the_base_model_with_the_seeds_own_a(make_llama: Any, make_tokenizer: Any) -> None:
    lora = Lora(2, 4.0, ("q_proj",))
    plain = measured(make_llama, make_tokenizer)
    first, again = (measured(make_llama, make_tokenizer, lora) for _ in range(2))
    other = with_lora(opened(make_llama, make_tokenizer), lora, 5)
    assert_close(first.anchor_margin, plain.anchor_margin, rtol=1e-4, atol=1e-4)
    assert first.opened.loaded.digest == again.opened.loaded.digest != other.loaded.digest
    assert {name.split(".")[-2] for name in first.forward.parameters} == {"default"}
    assert first.lora == lora


def test_more_directions_than_prompts_is_an_error_and_than_determined_a_reason(
    make_llama: Any, make_tokenizer: Any
) -> None:
    with pytest.raises(DegenerateError, match="asked for 6 sensitive directions but only 5 safety prompts"):
        measured(make_llama, make_tokenizer, rank=6)
    twins = RowSet("twins", (GIVEN[0],) * 4, "d")
    subject = measure_subject(opened(make_llama, make_tokenizer), twins, None, replace(SMALL, rank=2))
    assert subject.sensitivity is None
    assert "determine only 1" in subject.no_sensitivity
    assert subject.gram is not None


@pytest.mark.parametrize(
    ("looks", "steps", "both"),
    [(16, 40, (8, 16)), (16, 17, (8, 16)), (16, 16, (16, 16)), (16, 6, (6, 6)), (5, 40, (2, 5)), (16, 1, (1, 1))],
)
def test_looks_are_no_more_than_steps_and_the_judge_has_half_where_there_is_one(
    looks: int, steps: int, both: tuple[int, int]
) -> None:
    assert Options(looks=looks).both_looks(steps) == both
