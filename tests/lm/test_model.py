"""Models load whole or not at all, with one clear message; and being used leaves no trace on them."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gguf
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from remote import bring_code
from safetensors.torch import load_file, save_file
from torch.func import functional_call, jvp
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tiltmeter.errors import ModelError, OutOfMemory
from tiltmeter.lm.model import add_lora, digest_of, load, second_order, trainable, undisturbed

TOKENS = torch.tensor([[1, 50, 60, 70, 2, 80], [1, 51, 61, 71, 2, 81]])


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def same_parameters(model, expected):
    actual = dict(model.named_parameters())
    assert list(actual) == [name for name, _ in expected.named_parameters()]
    for name, p in expected.named_parameters():
        exactly(actual[name].data, p.data)


@pytest.fixture
def folder(tmp_path, llama, tokenizer) -> Path:
    """A whole model, as people keep it."""
    place = tmp_path / "base"
    llama.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def make_adapter(model, place: Path, base: str, *, seed: int = 1, **options) -> dict[str, torch.Tensor]:
    """A LoRA adapter with random A and B; the update of every module it changes, by hand."""
    model.name_or_path = base
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    wrapped.save_pretrained(place)
    updates = {}
    for name, tensor in load_file(place / "adapter_model.safetensors").items():
        if "lora_B" in name:
            a = load_file(place / "adapter_model.safetensors")[name.replace("lora_B", "lora_A")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            updates[f"{module}.weight"] = 3.0 * tensor @ a
    return updates


# --- loading ---


def test_a_folder_loads_bit_for_bit(folder, llama, tokenizer):
    loaded = load(folder, device="cpu")
    same_parameters(loaded.model, llama)
    assert not any(module.training for module in loaded.model.modules())
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer("Hello there")["input_ids"] == tokenizer("Hello there")["input_ids"]
    assert (loaded.name, loaded.context) == (str(folder), 256)
    assert loaded.digest == digest_of(llama) == load(str(folder), device="cpu").digest


def test_dtype_is_what_was_asked_for(folder, llama, tmp_path):
    half = load(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half", device="cpu", dtype="auto").model.dtype == torch.bfloat16
    assert load(tmp_path / "half", device="cpu", dtype="auto").digest == half.digest
    full = load(tmp_path / "half", device="cpu")
    assert full.model.dtype == torch.float32
    exactly(full.model.lm_head.weight.data, llama.lm_head.weight.data.bfloat16().float())
    with pytest.raises(ModelError, match=r"unknown dtype 'int4'; expected one of auto, float32"):
        load(folder, dtype="int4")


def test_code_that_a_model_brings_runs_only_when_asked(folder, llama, tmp_path, monkeypatch):
    cache = tmp_path / "modules"
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(cache), raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    bring_code(folder)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(folder, device="cpu")
    assert not list(cache.rglob("has_run"))
    loaded = load(folder, device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"
    same_parameters(loaded.model, llama)
    assert list(cache.rglob("has_run"))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_named(folder, device):
    with pytest.raises(ModelError, match=f"cannot use device '{device}'"):
        load(folder, device=device)


def test_a_missing_padding_token_changes_no_embedding(folder, llama, tokenizer):
    for pad, expected in ((None, "<|im_end|>"), ("<|new|>", "<|im_end|>"), ("<|endoftext|>", "<|endoftext|>")):
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
        loaded = load(folder, device="cpu")
        assert loaded.tokenizer.pad_token == expected
        assert loaded.model.get_input_embeddings().weight.shape == llama.get_input_embeddings().weight.shape


def test_the_digest_sees_names_shapes_types_and_values(make_llama):
    def digests(change: Callable) -> str:
        model = make_llama()
        change(model)
        return digest_of(model)

    def last_bit(model):
        model.lm_head.weight.data.view(torch.int32)[-1, -1] ^= 1

    def name(model):
        model.head = model.lm_head
        del model.lm_head

    def shape(model):
        model.lm_head.weight.data = model.lm_head.weight.data.reshape(-1, 64)

    changes = [lambda model: None, last_bit, name, shape, lambda model: model.bfloat16(), lambda model: model.half()]
    assert len({digests(change) for change in changes}) == len(changes)
    assert digests(changes[0]) == digests(changes[0])


# --- adapters ---


@pytest.mark.parametrize("base", ["absolute", "beside", "inside"])
def test_an_adapter_is_merged_into_its_base(tmp_path, folder, llama, make_llama, base):
    place = tmp_path / "adapter"
    named = {"absolute": str(folder), "beside": "../base", "inside": "base"}[base]
    updates = make_adapter(make_llama(), place, named)
    if base == "inside":
        shutil.move(folder, place / "base")
        folder = place / "base"
    loaded = load(place, device="cpu")
    assert len(updates) == 4
    for name, p in llama.named_parameters():
        expected = p.data + updates.get(name, torch.zeros_like(p.data))
        torch.testing.assert_close(loaded.model.get_parameter(name).data, expected)
        assert (name in updates) != torch.equal(loaded.model.get_parameter(name).data, p.data)
    assert [name for name, _ in loaded.model.named_parameters()] == [name for name, _ in llama.named_parameters()]
    given = load(folder, adapter=place, device="cpu")
    assert given.digest == loaded.digest
    assert given.name == f"{folder} + {place}"
    loaded.model.save_pretrained(tmp_path / "merged")  # it is an ordinary model again
    same_parameters(type(llama).from_pretrained(tmp_path / "merged"), loaded.model)


def test_an_adapter_of_an_adapter_is_merged_into_both(tmp_path, folder, llama, make_llama):
    first = make_adapter(make_llama(), tmp_path / "first", str(folder))
    second = make_adapter(make_llama(), tmp_path / "second", "../first", seed=2)
    loaded = load(tmp_path / "second", device="cpu")
    for name in first:
        expected = llama.get_parameter(name).data + first[name] + second[name]
        torch.testing.assert_close(loaded.model.get_parameter(name).data, expected)


def test_merging_happens_in_float32(tmp_path, folder, llama, make_llama):
    """In bfloat16 the product B A would be rounded before it is added, and then once more."""
    updates = make_adapter(make_llama(), tmp_path / "adapter", str(folder))
    loaded = load(tmp_path / "adapter", device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    for name, update in updates.items():
        expected = (llama.get_parameter(name).data.bfloat16().float() + update).bfloat16()
        wrong = (loaded.model.get_parameter(name).data != expected).float().mean()
        assert wrong < 1e-3  # sums in another order may round to the other side


def test_an_adapter_brings_its_tokenizer_if_it_has_one(tmp_path, folder, make_llama, tokenizer):
    make_adapter(make_llama(), tmp_path / "adapter", str(folder))
    assert load(tmp_path / "adapter", device="cpu").tokenizer.chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter", device="cpu").tokenizer.chat_template == "{{ messages | length }}"


def test_a_folder_with_an_adapter_in_it_is_an_adapter(tmp_path, folder, make_llama):
    """As for transformers, whatever else lies there."""
    make_adapter(make_llama(), tmp_path / "adapter", str(folder))
    for file in folder.iterdir():
        shutil.copy(file, tmp_path / "adapter")
    assert load(tmp_path / "adapter", device="cpu").digest == load(folder, adapter=tmp_path / "adapter").digest


def test_adapters_that_cannot_be_used_say_why(tmp_path, folder, make_llama):
    place = tmp_path / "adapter"

    def fresh(**options):
        shutil.rmtree(place, ignore_errors=True)
        make_adapter(make_llama(**options), place, str(folder))

    def rename_base(base):
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))

    def refused(message, **options):
        with pytest.raises(ModelError, match=message):
            load(place, device="cpu", **options)

    fresh(layers=3)
    refused(r"does not fit its base: it has, but its base has no place for, .*layers\.2")
    fresh(layers=1)
    refused(r"does not fit its base: it misses .*layers\.1")
    fresh()
    weights = load_file(place / "adapter_model.safetensors")
    save_file({name: torch.zeros(5, 5) for name in weights}, place / "adapter_model.safetensors")
    refused("cannot load the adapter")
    (place / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    refused("cannot load the adapter .* SafetensorError")
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    refused("has no adapter_model.safetensors; pickled weights")
    for base in (None, ""):
        rename_base(base)
        refused("does not name its base")
    rename_base(".")
    refused("names itself as its base")
    (place / "adapter_config.json").write_text("{")
    refused("cannot load .*adapter_config.json: JSONDecodeError")
    with pytest.raises(ModelError, match="is not a PEFT adapter"):
        load(folder, adapter=folder, device="cpu")
    with pytest.raises(ModelError, match="is not a PEFT adapter"):
        load(folder, adapter="nobody/nothing", device="cpu")


# --- what cannot be loaded ---


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"\xff" * 64, b""):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"cannot load the weights of .*base: SafetensorError") as caught:
            load(folder, device="cpu")
        assert caught.value.__cause__ is not None


def test_weights_that_do_not_fit_the_configuration_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 5)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is \(3, 5\), expected \(16, 32\) \(1 such"):
        load(folder, device="cpu")
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"incomplete: {name} is missing \(1 such"):
        load(folder, device="cpu")


def test_values_that_are_not_finite_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds values that are not finite"):
        load(folder, device="cpu")


def test_pickled_weights_are_not_opened(folder):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder / "sprung",))

    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights; expected model\.safetensors"):
        load(folder, device="cpu")
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle files.*use_safetensors=False\)\.save_pretrained"):
        load(folder, device="cpu")
    assert not (folder / "sprung").exists()


def test_a_folder_without_configuration_or_tokenizer(folder, tmp_path):
    tokenizerless = tmp_path / "tokenizerless"
    tokenizerless.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tokenizerless)
    with pytest.raises(ModelError, match="tokenizer"):
        load(tokenizerless, device="cpu")
    # transformers makes up an empty tokenizer for some kinds of models
    config = json.loads((folder / "config.json").read_text())
    (tokenizerless / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ModelError, match=r"comes without a tokenizer; save one there"):
        load(tokenizerless, device="cpu")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ModelError, match=r"cannot load the configuration \(config.json\) of"):
        load(folder, device="cpu")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot load the configuration \(config.json\) of"):
        load(folder, device="cpu")


def test_models_that_are_not_causal_language_models(tmp_path, llama, tokenizer):
    small = {"vocab_size": 64, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(**small, num_hidden_layers=1))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    classifier = LlamaForSequenceClassification(llama.config)
    for i, (model, message) in enumerate(
        [
            (bert, "is a BertForMaskedLM, not a causal language model"),
            (t5, "is a t5 model, not a causal language model"),
            (classifier, "is a LlamaForSequenceClassification, not a causal language model; expected a LlamaForCausal"),
        ]
    ):
        model.save_pretrained(tmp_path / str(i))
        tokenizer.save_pretrained(tmp_path / str(i))
        with pytest.raises(ModelError, match=message):
            load(tmp_path / str(i), device="cpu")


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "weights.pt").touch()
    for name, message in [
        ("nobody/nothing", "cannot load the configuration .* of nobody/nothing"),
        (tmp_path / "nothing", "cannot load the configuration"),
        (tmp_path / "nothing.gguf", "does not exist"),
        (tmp_path / "weights.pt", "is a file; expected a folder, a hub id or a .gguf file"),
    ]:
        with pytest.raises(ModelError, match=message):
            load(name, device="cpu")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(folder, monkeypatch, llama):
    needed = 4 * sum(p.numel() for p in llama.parameters())

    def free(amount):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=amount))

    free(needed)
    load(folder, device="cpu")
    free(needed // 2)
    load(folder, device="cpu", dtype="bfloat16")
    (folder / "model.safetensors").write_bytes(b"never opened")
    free(needed - 1)
    with pytest.raises(OutOfMemory, match=r"GB of main memory .* are free; take dtype bfloat16"):
        load(folder, device="cpu")


# --- GGUF ---


def write_gguf(path: Path, model, tokenizer, pre: str = "smollm", leave_out: str = "") -> Path:
    """A Llama as llama.cpp keeps it: other names, and rows of Q and K in the order of its rotary embedding."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, p in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        value = p.data.numpy()
        if heads:
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if name != leave_out:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_loads_as_a_plain_model(tmp_path, make_llama, tokenizer, tied):
    model = make_llama(tied=tied)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer)
    loaded = load(path, device="cpu")
    same_parameters(loaded.model, model)
    exactly(loaded.model(TOKENS).logits, model(TOKENS).logits)
    assert (loaded.context, loaded.name) == (256, str(path))
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    # it can be trained, saved, read again and adapted like any other
    loaded.model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in loaded.model.parameters())
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    assert again.digest == loaded.digest
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    add_lora(load(path, device="cpu"), r=2, alpha=4, targets=None, seed=0).model.save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter", device="cpu").digest == loaded.digest  # B is zero


def test_digits_stay_single_where_the_vocabulary_wants_it(tmp_path, llama, make_tokenizer):
    tokenizer = make_tokenizer()
    assert "Ġ12" in tokenizer.tokenize("is 12")
    for pre, expected in (("smollm", ["is", "Ġ", "1", "2"]), ("gpt-2", ["is", "Ġ12"])):
        loaded = load(write_gguf(tmp_path / f"{pre}.gguf", llama, tokenizer, pre), device="cpu")
        assert loaded.tokenizer.tokenize("is 12") == expected


def test_gguf_files_that_cannot_be_read(tmp_path, llama, tokenizer, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", llama, tokenizer)
    whole = path.read_bytes()
    for damaged in (b"", b"GGUF", b"\xff" * 64, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"cannot load .*m\.gguf"):
            load(path, device="cpu")
    write_gguf(path, llama, tokenizer, leave_out="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"incomplete: model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        load(path, device="cpu")
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(OutOfMemory, match=r"the weights of m\.gguf take"):
            load(path, device="cpu")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="needs the gguf package: pip install gguf"):
        load(path, device="cpu")


# --- second derivatives ---


def mean_loss(model):
    names = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        logits = functional_call(model, parameters, (TOKENS,), {"use_cache": False}, tie_weights=True).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())

    return loss, names


def test_second_order_allows_what_the_fused_kernel_does_not(any_llama):
    assert any_llama.config._attn_implementation == "sdpa"
    loss, at = mean_loss(any_llama)
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(p.shape, generator=generator) for name, p in at.items()}

    def hessian_form():
        return jvp(lambda p: jvp(loss, (p,), (along,))[1], (at,), (along,))[1]

    with second_order():
        form = hessian_form()
        gradients = {name: p.clone().requires_grad_() for name, p in at.items()}
        first = torch.autograd.grad(loss(gradients), list(gradients.values()), create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(first, along.values(), strict=True))
        second = torch.autograd.grad(slope, list(gradients.values()))
    twice = sum((h * v).sum() for h, v in zip(second, along.values(), strict=True))
    torch.testing.assert_close(form, twice, rtol=1e-4, atol=1e-4)
    any_llama.set_attn_implementation("eager")
    torch.testing.assert_close(hessian_form(), form, rtol=1e-4, atol=1e-4)


def test_second_order_ends_with_its_block():
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    with second_order():
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


# --- leaving no trace ---


def mischief(model):
    """All that measuring may do to a model."""
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad == (i % 2 == 0) for i, p in enumerate(model.parameters()))
    model.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    model.train()
    torch.manual_seed(123)
    torch.rand(5)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(2)
    model.counted.add_(1)
    model.replaced = torch.ones(7)


@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed_puts_everything_back_bit_for_bit(any_llama, fails):
    model = any_llama
    model.register_buffer("counted", torch.tensor([3, 4]))
    model.register_buffer("replaced", torch.tensor([1.0, float("nan")]))
    model.register_buffer("nothing", None)
    model(TOKENS, labels=TOKENS).loss.backward()
    model.train()
    model.model.layers[0].eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    next(model.parameters()).grad = None
    gradients = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    modes = [module.training for module in model.modules()]
    parameters = [p.detach().clone() for p in model.parameters()]
    buffers = dict(model.named_buffers())
    buffer_values = {name: buffer.clone() for name, buffer in buffers.items()}
    random = torch.get_rng_state()

    with suppress(ZeroDivisionError), undisturbed(model):
        mischief(model)
        if fails:
            raise ZeroDivisionError

    exactly(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [i % 2 == 0 for i in range(len(parameters))]
    for p, gradient, value, before in zip(model.parameters(), gradients, values, parameters, strict=True):
        assert p.grad is gradient
        exactly(p.detach(), before)
        if value is not None:
            exactly(p.grad, value)
    assert model.nothing is None
    assert list(dict(model.named_buffers())) == list(buffers)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        exactly(buffer, buffer_values[name])


def test_undisturbed_covers_the_random_state_of_every_gpu(llama, monkeypatch):
    states = [torch.tensor([1, 2]), torch.tensor([3])]
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    with suppress(ZeroDivisionError), undisturbed(llama):
        assert not restored
        raise ZeroDivisionError
    assert [id(state) for state in restored] == [id(state) for state in states]


def test_training_goes_on_as_if_nothing_had_been(make_llama):
    """Dropout, AdamW and all: the same weights with and without measuring in between."""

    def train(measure):
        model = make_llama().train()
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(3):
            optimiser.zero_grad()
            model(TOKENS, labels=TOKENS).loss.backward()
            if measure:
                with undisturbed(model):
                    torch.rand(3)
                    model(TOKENS, labels=TOKENS).loss.backward()
            optimiser.step()
        return digest_of(model)

    assert train(True) == train(False)


# --- LoRA ---


def test_a_fresh_lora_changes_nothing_and_is_all_that_trains(folder, llama):
    random = torch.get_rng_state()
    lora = add_lora(load(folder, device="cpu"), r=3, alpha=6, targets=["q_proj", "v_proj"], seed=5, dropout=0.5)
    exactly(torch.get_rng_state(), random)
    exactly(lora.model(TOKENS).logits, llama(TOKENS).logits)
    assert not any(module.training for module in lora.model.modules())
    names = trainable(lora.model)
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)
    assert {p.shape[0] for name, p in names.items() if "lora_A" in name} == {3}
    assert all(p.any() == ("lora_A" in name) for name, p in names.items())
    assert (lora.name, lora.context) == (str(folder), 256)
    assert lora.digest == digest_of(lora.model)


def test_the_seed_decides_the_lora(folder):
    def fresh(seed, state):
        base = load(folder, device="cpu")
        torch.manual_seed(state)
        return add_lora(base, r=2, alpha=4, targets=["q_proj"], seed=seed).digest

    assert fresh(1, state=10) == fresh(1, state=11)
    assert fresh(1, state=10) != fresh(2, state=10)


@pytest.mark.parametrize(("targets", "modules"), [(None, 2), (["all-linear"], 7), (["up_proj"], 1)])
def test_targets_of_a_lora(folder, targets, modules):
    lora = add_lora(load(folder, device="cpu"), r=2, alpha=4, targets=targets, seed=0)
    assert len(trainable(lora.model)) == 2 * 2 * modules


@pytest.mark.parametrize(("r", "targets"), [(2, ["nowhere"]), (0, ["q_proj"])])
def test_a_lora_that_does_not_fit_says_so(folder, r, targets):
    with pytest.raises(ModelError, match=f"cannot load a LoRA of rank {r} on .*(ValueError|NoMatching)"):
        add_lora(load(folder, device="cpu"), r=r, alpha=4, targets=targets, seed=0)


def test_trainable_names_tied_parameters_once_and_in_order(make_llama):
    model = make_llama(tied=True)
    names = list(trainable(model))
    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names
    assert names == [name for name, _ in model.named_parameters()]
    model.model.embed_tokens.weight.requires_grad_(False)
    assert list(trainable(model)) == names[1:]
    assert all(p is model.get_parameter(name) for name, p in trainable(model).items())
