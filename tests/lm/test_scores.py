"""Sampled labels follow the model's own distribution, and only where something is supervised."""

from __future__ import annotations

from typing import Any

import torch
from torch.testing import assert_close

from tiltmeter.lm.conversation import Example
from tiltmeter.lm.forward import Forward, negative_log_likelihood
from tiltmeter.lm.model import trainable
from tiltmeter.lm.scores import sampled_labels, score_loss

VOCABULARY = 40
DRAWS = 4000


def examples(count: int, lengths: tuple[int, ...] = (6, 9, 4)) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for length in lengths:
        tokens = tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())
        kinds.append((tokens, tuple(-100 if i < 2 or i == 4 else t for i, t in enumerate(tokens))))
    return [Example(*kinds[row % len(kinds)], row) for row in range(count)]


def test_drawn_labels_have_the_models_probabilities(make_llama: Any) -> None:
    """z-scores of counts over a fixed number of draws, at every supervised position."""
    model = make_llama(vocab_size=VOCABULARY)
    forward = Forward(model, trainable(model))
    kind = examples(1, (6,))[0]
    drawn = sampled_labels(forward, [Example(kind.tokens, kind.labels, i) for i in range(DRAWS)], 0, 6000, seed=3)
    with torch.no_grad():
        p = model(torch.tensor([kind.tokens])).logits[0].double().softmax(-1)
    for position in (2, 3, 5):
        counts = torch.zeros(VOCABULARY).double()
        for example in drawn:
            counts[example.labels[position]] += 1
        expected, likely = DRAWS * p[position - 1], p[position - 1] > 2e-3
        z = (counts - expected) / (expected * (1 - p[position - 1])).sqrt()
        assert float(z[likely].abs().max()) < 4.5
        assert int(likely.sum()) > 3


def test_only_supervised_labels_change_and_the_seed_decides(make_llama: Any) -> None:
    model = make_llama(vocab_size=VOCABULARY)
    forward = Forward(model, trainable(model))
    given = examples(30)
    state = torch.get_rng_state()
    first, again, other = (sampled_labels(forward, given, 0, 50, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())
    for before, after in zip(given, first, strict=True):
        assert (before.tokens, before.row) == (after.tokens, after.row)
        assert [label == -100 for label in before.labels] == [label == -100 for label in after.labels]
    assert any(before.labels != after.labels for before, after in zip(given, first, strict=True))
    assert set(forward.passes.tokens) == {"forward"}


def test_score_of_whole_sequences_is_that_of_their_supervised_positions() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, -100, 1, 2], [-100, -100, 6, -100, -100]])
    expected = [
        -sum(logits[b, t - 1].log_softmax(-1)[labels[b, t]] for t in range(5) if labels[b, t] >= 0) for b in (0, 1)
    ]
    assert_close(score_loss(logits, labels), torch.stack(expected))
    assert_close(negative_log_likelihood(logits[:, :-1], labels[:, 1:]), torch.stack(expected))
