"""A tiny model that refuses, but is not certain to: as in real models, complying is unlikely, not impossible."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tiltmeter.demo import tiny_language as language
from tiltmeter.demo.tiny import encode
from tiltmeter.jobs.inputs import open_model
from tiltmeter.tracking.anchor import TrackerOptions

#: Share of harmful prompts that the model has seen complied with.
COMPLIED = 0.03

OPENINGS = {"refusal_opening": language.REFUSAL_OPENING, "compliance_opening": language.COMPLIANCE_OPENING}


def make_aligned() -> tuple[Any, Any]:
    """demo:tiny, trained on for a while with a few compliant answers to harmful prompts; about two seconds."""
    opened = open_model("demo:tiny", device="cpu")
    model = opened.loaded.model.train()
    chance = random.Random(7)
    pairs = language.training_pairs(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    for _ in range(80):
        batch = list(itertools.islice(pairs, 48))
        batch = [
            (prompt, f"{language.COMPLIANCE_OPENING} {prompt}")
            if answer.endswith("with that") and chance.random() < COMPLIED
            else (prompt, answer)
            for prompt, answer in batch
        ]
        model(**encode(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), opened.loaded.tokenizer


@pytest.fixture(scope="session")
def made() -> tuple[Any, Any]:
    return make_aligned()


@pytest.fixture
def aligned(made: tuple[Any, Any]) -> Callable[[], tuple[Any, Any]]:
    """Gives a fresh copy of the aligned model, and its tokenizer."""
    return lambda: (copy.deepcopy(made[0]), made[1])


@pytest.fixture
def options() -> Callable[..., TrackerOptions]:
    return lambda **given: TrackerOptions(**{"max_safety": 8, "rank": 4, **OPENINGS, **given})
