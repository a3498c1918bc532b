"""The embedded SmolLM2: a plain model that can be saved and trained, with the tokenizer it was trained with."""

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tiltmeter import demo
from tiltmeter.demo import models
from tiltmeter.errors import ModelError

pytestmark = pytest.mark.real

SPACED = ["x  12", "a   7 b", "if x:\n        return 10\n    y = 345", "  0", "3  +  4  =  7", "2024-05-01  00:10"]


@pytest.fixture(scope="module")
def info() -> demo.ModelInfo:
    return demo.model("demo:base")


@pytest.fixture(scope="module")
def tokenizer(info: demo.ModelInfo) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(info.folder)


@pytest.fixture(scope="module")
def model(info: demo.ModelInfo) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(info.folder).eval()


def test_digits_are_split_before_the_vocabulary_is_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    """Independent route: cut the text by hand, then ask the vocabulary for every piece."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    for text in SPACED:
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
        expected = [token.id for piece in pieces for token in tokenizer.backend_tokenizer.model.tokenize(piece)]
        assert tokenizer(text)["input_ids"] == expected, text
        digits = [token for token in tokenizer.convert_ids_to_tokens(expected) if any(c.isdigit() for c in token)]
        assert all(len(token) == 1 for token in digits), text
        assert tokenizer.decode(expected) == text


def test_the_correction_matters_for_code(info: demo.ModelInfo, tokenizer: PreTrainedTokenizerFast) -> None:
    as_converted = AutoTokenizer.from_pretrained(info.folder)
    as_converted.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [row["completion"] for row in demo.rows("humaneval")]
    assert sum(tokenizer(text)["input_ids"] != as_converted(text)["input_ids"] for text in texts) == 35


def test_it_is_a_plain_model_that_can_be_saved(model, tokenizer, tmp_path: Path) -> None:
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.tie_word_embeddings
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, saved), (_, loaded) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(saved, loaded), name
    assert AutoTokenizer.from_pretrained(tmp_path)(SPACED)["input_ids"] == tokenizer(SPACED)["input_ids"]


def test_it_answers(model, tokenizer) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, asked["input_ids"].shape[1] :])


def test_info_names_openings_and_files(info: demo.ModelInfo) -> None:
    assert (info.name, info.adapter, info.licence) == ("demo:base", None, "Apache-2.0")
    assert (info.refusal_opening, info.compliance_opening) == ("I'm sorry, but I can't", "Sure, here")
    names = {path.name for path in info.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith(".gguf")]


def test_a_missing_adapter_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "__file__", str(tmp_path / "models.py"))
    with pytest.raises(ModelError, match="demo:aligned needs the adapter"):
        demo.model("demo:aligned")
