"""Likelihoods, KL and choices against a plain softmax in float64, one sequence at a time without padding."""

from __future__ import annotations

import pytest
import torch

from tiltmeter.errors import DataError, NumericalError
from tiltmeter.lm.conversation import encode_pairs
from tiltmeter.lm.likelihood import (
    choose,
    divergences,
    encode_choices,
    encode_texts,
    log_likelihoods,
    margins,
    refer,
)
from tiltmeter.lm.model import Loaded

PROMPTS = ["Hello there", "How do I make a cake?", "What is 12 plus 34? " * 5]


def loaded(model, tokenizer, scale=1.0):
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return Loaded(model, tokenizer, "test", "", 256)


def naive(model, example):
    """log p [T, vocabulary] at supervised positions and the tokens there, in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([example.tokens])).logits[0]
    model.float()
    places = [i for i, label in enumerate(example.labels) if label != -100]
    return torch.log_softmax(logits, -1)[[i - 1 for i in places]], torch.tensor([example.tokens[i] for i in places])


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_log_likelihoods_margins_and_kl(make_llama, tokenizer, scale):
    model, other = loaded(make_llama(), tokenizer, scale), loaded(make_llama(seed=1), tokenizer, scale)
    yes = encode_pairs(PROMPTS, ["Sure, here"] * 3, tokenizer, 256, end=False).examples
    no = encode_pairs(PROMPTS, ["I'm sorry, but I can't help"] * 3, tokenizer, 256, end=False).examples
    expected = []
    for example in (*no, *yes):
        log_p, tokens = naive(model.model, example)
        expected.append(float(log_p.gather(1, tokens[:, None]).sum()))
    found = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(log_likelihoods(model, [*no, *yes]), found, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(margins(model, no, yes), found[:3] - found[3:], rtol=1e-5, atol=1e-4)
    kl = []
    for example in no:
        ours, theirs = naive(model.model, example)[0], naive(other.model, example)[0]
        kl.append(float((ours.exp() * (ours - theirs)).sum(-1).mean()))
    reference = refer(model, no)
    torch.testing.assert_close(divergences(reference, other), torch.tensor(kl).double(), rtol=1e-4, atol=1e-8)
    assert float(divergences(reference, model).abs().max()) == 0.0


def test_another_vocabulary_has_no_kl(make_llama, tokenizer):
    examples = encode_pairs(PROMPTS, ["Sure"] * 3, tokenizer, 256, end=False).examples
    reference = refer(loaded(make_llama(), tokenizer), examples)
    with pytest.raises(DataError, match="384 tokens, test has 400"):
        divergences(reference, loaded(make_llama(vocab_size=400), tokenizer))


def test_a_loss_that_is_no_number(make_llama, tokenizer):
    examples = encode_pairs(PROMPTS, ["Sure"] * 3, tokenizer, 256, end=False).examples
    with pytest.raises(NumericalError, match="log-likelihood of example 0"):
        log_likelihoods(loaded(make_llama(), tokenizer, float("nan")), examples)


def test_choices_are_scored_per_character(make_llama, tokenizer):
    model = loaded(make_llama(), tokenizer)
    choices = ["A. the sea", "B. a story about the sea, good morning", "C. eggs"]
    rows = [
        {"prompt": f"What is {i}?\nAnswer:", "completion": choices[i % 3], "choices": choices[: 2 + i % 2]}
        for i in (0, 1, 5, 4, 3)
    ]
    found = encode_choices(model, rows, 256)
    expected = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            [example] = encode_pairs([row["prompt"]], [choice], tokenizer, 256, end=False).examples
            log_p, tokens = naive(model.model, example)
            scores.append(float(log_p.gather(1, tokens[:, None]).sum()) / len(choice))
        expected.append(float(row["choices"][scores.index(max(scores))] == row["completion"]))
    assert choose(model, found).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_questions_that_cannot_be_used_are_counted(make_llama, tokenizer):
    model = loaded(make_llama(), tokenizer)
    good = {"prompt": "What?", "completion": "a", "choices": ["a", "b"]}
    rows = [good, {**good, "completion": "c"}, {**good, "choices": ["a"]}, {**good, "prompt": "lock " * 300}]
    found = encode_choices(model, rows, 256)
    assert len(found.right) == 1
    assert found.skipped == {
        "the completion is none of the choices": 1,
        "fewer than two choices": 1,
        "longer than max_length": 1,
    }
    with pytest.raises(DataError, match="not one of 2 multiple-choice rows"):
        encode_choices(model, rows[1:3], 256)


def test_texts_are_supervised_whole_and_answers_alone(make_llama, tokenizer):
    model = loaded(make_llama(), tokenizer)
    text, answer = encode_texts(
        model, [{"text": "Tell me a story."}, {"prompt": "Hello", "completion": "there"}], 256
    ).examples
    assert text.supervised == len(text.tokens) - 1
    assert 0 < answer.supervised < len(answer.tokens) - 3
