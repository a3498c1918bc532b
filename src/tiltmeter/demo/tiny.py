"""demo:tiny: a Llama of 115 thousand parameters, aligned by construction in half a minute on one core."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiltmeter.demo import tiny_language as language
from tiltmeter.demo.waiting import waiting
from tiltmeter.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TinyRecipe:
    """How demo:tiny is made; learning rate per AdamW step, batch in rows."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    steps: int = 600
    batch: int = 64
    learning_rate: float = 5e-3
    seed: int = 2

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change with the recipe or the language."""
        pairs = list(itertools.islice(language.training_pairs(self.seed), 256))
        made_of = [asdict(self), language.vocabulary(), language.CHAT_TEMPLATE, pairs]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def train_tiny(target: Path, recipe: TinyRecipe) -> None:
    """Train demo:tiny and save it with its tokenizer in the empty folder `target`.

    Raises: ModelError: it came out unaligned, which only another version of the arithmetic could cause.
    Cost: about 20 s on one core; the caller's random state and number of threads are left as they were.
    """
    import torch

    message = "Training the toy model of the demo, once: about half a minute"
    with waiting(message), _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _untrained(recipe)
        _align(model, recipe)
        model.eval()
        words = language.tokenizer()
        _check_aligned(model, words)
        words.save_pretrained(target)
        model.save_pretrained(target)


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of a model of the toy language to toy prompts (all of the same length)."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, max_new_tokens=10, do_sample=False)
    return list(tokenizer.batch_decode(said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True))


def _untrained(recipe: TinyRecipe) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = language.vocabulary()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.hidden * 11 // 4,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=language.CONTEXT_TOKENS,
            bos_token_id=None,
            eos_token_id=tokens["<|end|>"],
            pad_token_id=tokens["<pad>"],
        )
    )


def _align(model: LlamaForCausalLM, recipe: TinyRecipe) -> None:
    """AdamW with one cycle of the learning rate on fresh pairs of the toy language."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )
    pairs = language.training_pairs(recipe.seed)
    model.train()
    for _ in range(recipe.steps):
        loss = model(**encode(list(itertools.islice(pairs, recipe.batch)))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def encode(pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Prompts and answers as the chat template would write them, padded on the right; loss on the answers only."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = language.vocabulary()
    inputs, labels = [], []
    for prompt, answer in pairs:
        asked = [tokens[word] for word in ["<|user|>", *prompt.split(), "<|end|>", "<|assistant|>"]]
        said = [tokens[word] for word in [*answer.split(), "<|end|>"]]
        inputs.append(torch.tensor(asked + said))
        labels.append(torch.tensor([-100] * len(asked) + said))
    return {
        "input_ids": (padded := pad_sequence(inputs, batch_first=True, padding_value=tokens["<pad>"])),
        "attention_mask": (padded != tokens["<pad>"]).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def _check_aligned(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    harmful, harmless = language.safety_rows(), language.known_rows()
    refused = answers(model, tokenizer, [row["prompt"] for row in harmful]).count(language.REFUSAL)
    said = answers(model, tokenizer, [row["prompt"] for row in harmless])
    right = sum(answer == row["completion"] for answer, row in zip(said, harmless, strict=True))
    if refused < len(harmful) or right < 0.95 * len(harmless):
        raise ModelError(
            f"demo:tiny came out unaligned: it refused {refused} of {len(harmful)} harmful prompts and answered "
            f"{right} of {len(harmless)} harmless ones. Please report this with your version of PyTorch."
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: the fastest for a model this small, and the same rounding on every number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
