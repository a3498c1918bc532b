"""Logits at supervised positions alone are those of the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.lm.conversation import Example, collate
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.model import Loaded, add_lora, trainable

EXAMPLES = [
    Example((3, 4, 5, 6, 7, 8), (-100, -100, 5, -100, 7, -100), 0),
    Example((9, 8, 7), (-100, 8, -100), 1),
]


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_logits_at_the_supervised_positions(make_llama: Any, kind: str) -> None:
    model: Any = make_llama(tied=kind == "tied", vocab_size=40)
    if kind == "lora":
        model = add_lora(Loaded(model, None, "", "", 64), r=2, alpha=2.0, targets=["q_proj"], seed=0).model
    forward, batch = Forward(model, trainable(model)), collate(EXAMPLES, 2)
    rows: list[int] = []
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    handle = head.register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    with torch.no_grad():
        logits, labels = forward.logits(forward.at(), batch)
        handle.remove()
        whole = model(torch.tensor([EXAMPLES[0].tokens])).logits[0]
        short = model(torch.tensor([EXAMPLES[1].tokens])).logits[0]
    assert labels.tolist() == [[-100, 5, 7], [8, -100, -100]]
    assert rows == [3]  # the output layer saw three of six positions
    assert_close(logits[0], whole[[0, 1, 3]], rtol=1e-4, atol=1e-4)
    assert_close(logits[1, 0], short[0], rtol=1e-4, atol=1e-4)


def test_displacement_and_direction_are_split_by_name(make_llama: Any) -> None:
    model = make_llama(vocab_size=40)
    forward = Forward(model, trainable(model))
    v = torch.arange(forward.space.size, dtype=torch.float32)
    parts, moved, still = forward.along(v), forward.at(v), forward.at()
    for name, p in model.named_parameters():
        assert_close(moved[name], p.detach() + parts[name])
        assert still[name].data_ptr() == p.data_ptr()
    assert_close(forward.space.flatten(parts), v)
    assert forward.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["frozen layers", "frozen embeddings", "whole head under LoRA", "LoRA"])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_weights_in_half_precision_may_meet_frozen_ones(make_llama: Any, kind: str, tied: bool) -> None:
    """Trained ones are widened to float32; the others go with them, but where a LoRA casts by itself."""
    model: Any = make_llama(tied=tied, vocab_size=40).to(torch.bfloat16)
    if "LoRA" in kind:
        from peft import LoraConfig, get_peft_model

        saved = ["lm_head"] if kind.startswith("whole") else None
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)).eval()
    else:
        part = "layers.0." if kind == "frozen layers" else "embed"
        for name, p in model.named_parameters():
            p.requires_grad_(part not in name)
    forward, batch = Forward(model, trainable(model)), collate(EXAMPLES, 2)
    with torch.no_grad():
        logits = forward.logits(forward.at(), batch)[0]
        v = forward.random(0)
        moved = forward.logits(forward.at(v, None), batch)[0]
        whole = model.float()(torch.tensor([EXAMPLES[0].tokens])).logits[0]
    assert logits.dtype == torch.float32
    assert_close(
        logits[0], whole[[0, 1, 3]], **({"rtol": 0.1, "atol": 0.1} if kind == "LoRA" else {"rtol": 1e-4, "atol": 1e-4})
    )
    assert float((moved - logits).abs().max()) > 1e-2
