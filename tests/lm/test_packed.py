"""Prompts read once for all that may follow them, against each sequence read alone, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiltmeter.geometry.forecast import Separate
from tiltmeter.lm.conversation import Batch, Example, collate
from tiltmeter.lm.divergence import divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.kl_and_margin import KlAndMargin, reads_packed, standing
from tiltmeter.lm.model import Loaded, add_lora, trainable
from tiltmeter.lm.objective import negative_margin_objective
from tiltmeter.lm.packed import common_prompt, pack, packs
from tiltmeter.lm.safety import SafetySet

VOCABULARY = 40
PAD = 2
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture(autouse=True)
def norms_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own goes through float32 even in a float64 model."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def safety_set(prompts: tuple[int, ...] = (7, 3, 11, 5), seed: int = 0) -> SafetySet:
    """Prompts of several lengths; answers, refusals and compliances too, the answer sometimes begins as the refusal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    def example(prompt: list[int], rest: list[int], row: int) -> Example:
        return Example((*prompt, *rest), (*[-100] * len(prompt), *rest), row)

    parts: list[list[Example]] = [[], [], []]
    refusal = draw(4)
    for row, length in enumerate(prompts):
        prompt = draw(length)
        answer = [*refusal, *draw(3)] if row % 2 else draw(2 + row)
        for part, rest in zip(parts, (answer, refusal, draw(2)), strict=True):
            part.append(example(prompt, rest, row))
    return SafetySet(*(tuple(part) for part in parts), (), "drawn", len(prompts), 0, {})


def llama(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=kind == "tied")).eval()
    if kind == "lora":
        model = add_lora(Loaded(model, None, "", "", 64), r=2, alpha=3.0, targets=["q_proj", "up_proj"], seed=1).model
        generator = torch.Generator().manual_seed(2)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.2, generator=generator)
    return model


def forward_of(model: Any, dtype: torch.dtype = torch.float64) -> Forward:
    model = model.to(dtype)
    return Forward(model, trainable(model))


def displacement(forward: Forward, seed: int, scale: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(forward.space.size, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
@pytest.mark.parametrize("max_tokens", [1, 45, 1000])
def test_all_products_of_the_margin_are_those_of_prompts_read_apart(kind: str, attention: str, max_tokens: int) -> None:
    model: Any = llama(kind)
    model.config._attn_implementation = attention
    forward, held = forward_of(model), safety_set()
    apart = negative_margin_objective(forward, held.refusals, held.compliances, PAD, 1000)
    joined = negative_margin_objective(forward, held.refusals, held.compliances, PAD, max_tokens, packed=True)
    at, v = displacement(forward, 3), displacement(forward, 4)
    weights = torch.tensor([0.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    # the eager softmax goes through float32 in any model
    near = {"rtol": 1e-8, "atol": 1e-10} if attention == "sdpa" else {"rtol": 1e-5, "atol": 1e-6}
    assert joined.m == apart.m == 4
    assert_close(joined.losses(at), apart.losses(at), **near)
    assert float(apart.losses(at).abs().min()) > 1e-3
    assert_close(joined.directional(v, at), apart.directional(v, at), **near)
    for each in (None, weights):
        assert_close(joined.gradient(each, at), apart.gradient(each, at), **near)
        assert_close(joined.hvp(v, each, at), apart.hvp(v, each, at), **near)


@pytest.mark.parametrize("kind", ["untied", "lora"])
@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_kl_and_margin_are_those_of_two_objectives_for_fewer_tokens(kind: str, max_tokens: int) -> None:
    forward, held = forward_of(llama(kind)), safety_set()
    divergence = divergence_objective(forward, held.responses, PAD, max_tokens)
    margin = negative_margin_objective(forward, held.refusals, held.compliances, PAD, max_tokens)
    both = standing(divergence, margin, held, PAD, packed=True)
    assert isinstance(both, KlAndMargin)
    for scale in (0.01, 0.1, 1.0):
        at = displacement(forward, 5, scale)
        kl, now = both(at)
        assert_close(kl, divergence.losses(at), rtol=1e-9, atol=1e-14)
        assert_close(now, -margin.losses(at), rtol=1e-9, atol=1e-10)
        assert float(kl.min()) > 0
    before = forward.passes.tokens["forward"]
    both()
    spent = forward.passes.tokens["forward"] - before
    assert spent == both.work < divergence.work + margin.work
    if max_tokens == 1:  # nothing is padded, so a prompt's tokens are its own and those of what follows it
        assert spent == sum((7, 3, 11, 5)) + sum(
            e.supervised for e in (*held.responses, *held.refusals, *held.compliances)
        )
    kl, _ = both()
    assert float(kl.abs().max()) < 1e-25  # the anchor against itself: squares of rounding


def test_not_packed_they_are_read_apart() -> None:
    forward, held = forward_of(llama("untied")), safety_set()
    divergence = divergence_objective(forward, held.responses, PAD, 100)
    margin = negative_margin_objective(forward, held.refusals, held.compliances, PAD, 100)
    both = standing(divergence, margin, held, PAD, packed=False)
    assert isinstance(both, Separate)
    assert both.work == divergence.work + margin.work


def test_where_memory_runs_out_packs_become_smaller() -> None:
    forward, held = forward_of(llama("untied")), safety_set()
    divergence = divergence_objective(forward, held.responses, PAD, 1000)
    margin = negative_margin_objective(forward, held.refusals, held.compliances, PAD, 1000)
    at = displacement(forward, 5)
    expected = divergence.losses(at), -margin.losses(at)
    both = standing(divergence, margin, held, PAD, packed=True)
    assert isinstance(both, KlAndMargin)
    while len(both.inner.chunks) < 4:
        assert both.halve()
        assert_close(both(at), expected, rtol=1e-9, atol=1e-10)
    joined = negative_margin_objective(forward, held.refusals, held.compliances, PAD, 1000, packed=True)
    assert joined.halve()
    assert len(joined.chunks) == 2
    assert_close(joined.losses(at), -expected[1], rtol=1e-9, atol=1e-10)


def test_layout_by_hand() -> None:
    # two prompts, (5 6) and (7); continuations 1 3 and 4, and 8 and 9 10
    def example(tokens: tuple[int, ...], first: int) -> Example:
        return Example(tokens, (*[-100] * first, *tokens[first:]), 0)

    prompts = [
        [example((5, 6, 1, 3), 2), example((5, 6, 4), 2)],
        [example((7, 8), 1), example((7, 9, 10), 1)],
    ]
    batch = pack(prompts, PAD)
    assert batch.tokens.tolist() == [[5, 6, 1, 3, 4, PAD], [PAD, 7, 8, PAD, 9, 10]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 0], [0, 0, 1, 0, 1, 2]]
    assert batch.targets[0].tolist() == [[1, 3], [4, -100], [8, -100], [9, 10]]
    assert batch.read.tolist() == [1, 2, 4]  # the end of the prompts, and what precedes a second token
    looks = [
        {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [5]},
        {0: [0], 1: [1], 2: [1, 2], 3: [3], 4: [1, 4], 5: [1, 4, 5]},
    ]
    for row, allowed in enumerate(batch.allowed):
        assert {i: each.nonzero()[:, 0].tolist() for i, each in enumerate(allowed)} == looks[row]


def test_what_continuations_share_ends_where_they_part_or_are_supervised() -> None:
    one = Example((5, 6, 7, 8), (-100, -100, -100, 8), 0)
    assert common_prompt([one, Example((5, 6, 9, 1), (-100, -100, -100, 1), 0)]) == 2
    assert common_prompt([one, Example((5, 6, 7, 8), (-100, -100, 7, 8), 0)]) == 2
    with pytest.raises(ValueError, match="nothing in common"):
        pack([[one, Example((4, 6, 7, 8), (-100, -100, 7, 8), 0)]], PAD)


def test_every_prompt_is_in_one_pack_and_packs_keep_to_the_limit() -> None:
    held = safety_set((7, 3, 11, 5, 3, 9))
    triples = list(zip(held.responses, held.refusals, held.compliances, strict=True))
    for limit in (1, 40, 60, 1000):
        made = packs(triples, PAD, limit)
        assert sorted(i for members, _ in made for i in members) == list(range(18))
        for members, batch in made:
            assert batch.tokens.shape[0] * 3 == len(members) == batch.labels.shape[0]
            longest = max(sum(e.supervised for e in triples[i // 3]) + common_prompt(triples[i // 3]) for i in members)
            assert len(members) == 3 or longest * len(members) // 3 <= limit
    assert len(packs(triples, PAD, 1000)) == 1


def architectures() -> dict[str, Any]:
    """Small models of several kinds, and whether they can be asked about packed prompts (of up to 11 + 9 tokens)."""
    return {
        "llama": (LlamaForCausalLM, LlamaConfig(**WIDE), True),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**WIDE), True),
        "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2), True),
        "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, intermediate_size=24), True),
        "a window wide enough": (MistralForCausalLM, MistralConfig(**WIDE, sliding_window=64), True),
        "a window too narrow": (MistralForCausalLM, MistralConfig(**WIDE, sliding_window=6), False),
        "positions from the columns": (
            BloomForCausalLM,
            BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
            False,
        ),
        "recurrent": (
            MambaForCausalLM,
            MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4),
            False,
        ),
    }


@pytest.mark.parametrize("kind", architectures())
def test_a_model_is_asked_whether_it_reads_packed_prompts(kind: str) -> None:
    build, config, expected = architectures()[kind]
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # fresh models hardly tell positions apart
            if p.ndim > 1:
                p.mul_(8)
    forward, held = forward_of(model, torch.float32), safety_set()
    assert reads_packed(forward, held, PAD) is expected
    if expected:
        margin = negative_margin_objective(forward, held.refusals, held.compliances, PAD, 1000)
        joined = negative_margin_objective(forward, held.refusals, held.compliances, PAD, 1000, packed=True)
        assert_close(joined.losses(), margin.losses(), rtol=1e-3, atol=1e-3)


def test_half_precision_and_prompts_with_nothing_in_common_are_not_packed() -> None:
    held = safety_set()
    assert not reads_packed(forward_of(llama("untied"), torch.bfloat16), held, PAD)
    first = held.refusals[0]
    other = Example((first.tokens[0] % (VOCABULARY - 1) + 1, *first.tokens[1:]), first.labels, 0)
    odd = SafetySet(held.responses, (other, *held.refusals[1:]), held.compliances, (), "drawn", 4, 0, {})
    forward = forward_of(llama("untied"))
    assert reads_packed(forward, held, PAD)
    assert not reads_packed(forward, odd, PAD)


def test_plain_batches_are_what_they_were() -> None:
    held = safety_set()
    batch = collate(held.responses, PAD)
    kept, part = batch.only(torch.tensor([1, 3]))
    assert kept.tolist() == [1, 3]
    assert type(part) is Batch
    assert part.tokens.shape == (2, 12)  # 5 + 7 tokens, the others' padding gone
    assert batch.together == 1
    assert list(batch.inputs(torch.device("cpu"), boolean=True)) == ["input_ids"]
