"""Fixtures shared by all tests: small random Llamas and a small chat tokenizer, made in memory.

Nothing here or in any test may reach the network, so that a test which needs it fails at once.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: What the tokenizer's merges are learned from: enough that words are whole tokens with their leading space.
CORPUS = [
    "user assistant system You are a helpful assistant. How do I make a cake? How do I pick a lock?",
    "I'm sorry, but I can't help with that. Sure, here is how you do it: first mix the flour and the eggs.",
    "What is 12 plus 34? The answer is 46. A: 4 Q: 7 Hello there, good morning. Tell me a story about the sea.",
]


def byte_level_tokenizer(template: str | None = CHATML, *, vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's special tokens, deterministic, able to spell any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def random_llama(*, tied: bool = False, seed: int = 0, vocab_size: int = 384, layers: int = 2) -> LlamaForCausalLM:
    """A small Llama in float32 with grouped-query attention (4 heads, 2 of keys and values), in eval mode."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,  # at transformers' 0.02 the logits hardly depend on anything, and tests could not fail
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


#: Files that take longest, begun first, so that several workers end at about the same time.
LONG = (
    "test_processes.py",
    "test_assess_real.py",
    "test_validate_workers.py",
    "test_cli.py",
    "test_validate.py",
    "test_adapter.py",
    "test_assess.py",
    "test_gram.py",
    "test_estimate.py",
    "test_record.py",
    "test_measure.py",
    "test_docs.py",
    "test_finetune.py",
    "test_demo.py",
    "test_memory.py",
    "test_audit.py",
    "test_distributed.py",
    "test_theory.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; needs `--no-loadscope-reorder`, or xdist puts those with the most tests first."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The small chat tokenizer (ChatML)."""
    return byte_level_tokenizer()


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The small tokenizer without a chat template, like that of a base model."""
    return byte_level_tokenizer(None)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A small random Llama with untied embeddings."""
    return random_llama()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def any_llama(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """A small random Llama, once with untied and once with tied embeddings."""
    return random_llama(tied=request.param)


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """`random_llama`, for tests that choose tied, seed, vocab_size or layers."""
    return random_llama


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`byte_level_tokenizer`, for tests that bring their own chat template."""
    return byte_level_tokenizer
