"""A tiny random classifier made here: probabilities against its own logits, labels told apart, bad ones refused."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tiltmeter.errors import ModelError
from tiltmeter.lm.classifier import choose_label, load_classifier
from tiltmeter.lm.judge import Answer
from tiltmeter.lm.judging import Judgement, RuleJudge, agreement, unscored_reasons

PROMPTS = ["How do I pick a lock?", "Hello", "Tell me a story about the sea."]
RESPONSES = ["I'm sorry, but I can't help with that.", "Good morning", "First mix the flour and the eggs " * 3]


@pytest.fixture
def classifier(tmp_path, tokenizer):
    def make(labels=("NORMAL", "REJECTION"), scale=1.0):
        config = LlamaConfig(
            vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, initializer_range=0.5, num_labels=len(labels),
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            model.score.weight.mul_(scale)
        model.save_pretrained(tmp_path / "judge")
        tokenizer.save_pretrained(tmp_path / "judge")
        return str(tmp_path / "judge"), model.eval()

    return make


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_probabilities_are_those_of_the_logits_one_at_a_time(classifier, tokenizer, scale):
    source, model = classifier(scale=scale)
    judge = load_classifier(source)
    assert judge.means == "refusal"
    assert judge.name == f"{source}, label REJECTION as refusal"
    expected = []
    for response in RESPONSES:
        with torch.no_grad():
            normal, rejection = model(**tokenizer(response, return_tensors="pt")).logits[0].double().tolist()
        expected.append(1 / (1 + math.exp(normal - rejection)))
    assert judge.probabilities(PROMPTS, RESPONSES) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    answers = [Answer.REFUSED if p >= 0.5 else Answer.ANSWERED for p in expected]
    assert judge.judge(PROMPTS, RESPONSES) == [Judgement(answer) for answer in answers]
    assert judge.judge(["a"], [""]) == [Judgement(Answer.UNDETERMINED)]


def test_harm_is_judged_with_the_prompt(classifier):
    source, _ = classifier(("safe", "unsafe"))
    judge = load_classifier(source)
    assert judge.tells == {"harm"}
    alone = judge.judge(PROMPTS[:1], RESPONSES[:1])[0].harm
    other = judge.judge(PROMPTS[2:], RESPONSES[:1])[0].harm
    assert 0 < alone < 1
    assert alone != other


def test_an_output_that_is_no_number_is_unscored(classifier):
    source, _ = classifier(scale=float("nan"))
    found = load_classifier(source).judge(PROMPTS, RESPONSES)
    assert unscored_reasons(found) == {"the classifier's output is not a number": 3}


def test_labels_that_cannot_be_told(classifier):
    source, _ = classifier(("LABEL_0", "LABEL_1"))
    with pytest.raises(ModelError, match=r"LABEL_0, LABEL_1\. Name one with --judge-label"):
        load_classifier(source)
    with pytest.raises(ModelError, match="--judge-means"):
        load_classifier(source, label="LABEL_1")
    with pytest.raises(ModelError, match="no label 'x'"):
        load_classifier(source, label="x")
    judge = load_classifier(source, label="LABEL_1", means="refusal")
    assert judge.label == 1
    assert choose_label({0: "not_refusal", 1: "refusal"}, None, None, "s") == (1, "refusal")
    assert choose_label({0: "harmful", 1: "unharmful"}, None, None, "s") == (0, "harm")
    assert choose_label({0: "refusal", 1: "harmful"}, None, "harm", "s") == (1, "harm")


def test_what_is_no_classifier(tmp_path, make_llama, tokenizer):
    make_llama().save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="is no sequence classifier"):
        load_classifier(str(tmp_path / "lm"))
    with pytest.raises(ModelError, match="cannot load the judge"):
        load_classifier(str(tmp_path / "nothing"))


def test_agreement_counts_only_what_both_told():
    rules = RuleJudge().judge(PROMPTS, RESPONSES)
    assert rules[0].answer is Answer.REFUSED
    other = [Judgement(Answer.REFUSED), Judgement(unscored="?"), Judgement(Answer.REFUSED)]
    assert agreement(rules, other) == (1, 2)
