"""Checkpoints read tensor by tensor: against PEFT's merge, at a bounded memory, and every way they can fail."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from tiltmeter.errors import ModelError
from tiltmeter.geometry.spectrum import LowRank, intruders
from tiltmeter.lm.weights import open_checkpoint, pair_of


@pytest.fixture
def base(tmp_path, make_llama):
    make_llama(tied=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def tuned(make_llama, folder, scale=1e-2, **options):
    model = make_llama(tied=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    model.save_pretrained(folder, **options)
    return model


def adapter(make_llama, base, folder, **config):
    """A LoRA with both factors random, saved, and the merged model."""
    model = make_llama(tied=True)
    model.config._name_or_path = model.name_or_path = str(base)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_changes_of_a_full_fine_tune_are_the_differences(tmp_path, make_llama, base, scale, shards):
    model, before = tuned(make_llama, tmp_path / "tuned", scale, max_shard_size=shards), make_llama(tied=True)
    assert (len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1) == (shards == "20KB")
    pair = pair_of(open_checkpoint(base), open_checkpoint(tmp_path / "tuned"))
    found = dict(pair.changes())
    old = dict(before.named_parameters())
    assert found.keys() == old.keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], (p - old[name]).detach(), rtol=0.0, atol=0.0)


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 20},
        "target_modules": ["q_proj", "down_proj"],
    },
    "saved": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_what_peft_merges(tmp_path, make_llama, base, kind):
    merged = adapter(make_llama, base, tmp_path / "adapter", **CONFIGS[kind])
    bare = open_checkpoint(base)
    on_its_base = open_checkpoint(tmp_path / "adapter")
    given = bare.with_adapter(tmp_path / "adapter", "given")
    before = dict(make_llama(tied=True).named_parameters())
    for after in (on_its_base, given):
        pair = pair_of(bare, after)
        changed = dict(pair.changes())
        for name, p in merged.named_parameters():
            torch.testing.assert_close(after.read(name), p.detach(), rtol=1e-5, atol=1e-6)
            if torch.equal(p, before[name]):
                assert name not in changed
                continue
            factors = isinstance(changed[name], LowRank)
            assert factors == ("proj" in name)
            dense = changed[name].dense() if factors else changed[name]
            torch.testing.assert_close(dense, (p - before[name]).detach(), rtol=1e-4, atol=1e-6)
    assert len(changed) == {"plain": 4, "rslora": 2, "patterns": 4, "saved": 7}[kind]


def test_a_second_adapter_adds_to_the_first(tmp_path, make_llama, base):
    adapter(make_llama, base, tmp_path / "one", **CONFIGS["plain"])
    first = open_checkpoint(tmp_path / "one")
    second = first.with_adapter(tmp_path / "one", "twice")
    pair = pair_of(first, second)
    for _, change in pair.changes():
        assert isinstance(change, LowRank)
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(
        second.read(name) - first.read(name), first.read(name) - open_checkpoint(base).read(name), rtol=1e-4, atol=1e-6
    )


def test_transposed_layers_of_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "wte"]))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    # PEFT saves the whole embedding beside its factors, where its name has no place of its own
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_" in key}, file)
    after = open_checkpoint(tmp_path / "adapter")
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"):
        torch.testing.assert_close(after.read(name), merged[name].detach(), rtol=1e-5, atol=1e-5)


class Alive(TorchDispatchMode):
    """Bytes of all tensors that exist at once."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out

    def count(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        users, _ = self.held.get(place, (0, 0))
        self.held[place] = users + 1, size  # views share their storage
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        weakref.finalize(tensor, self.gone, place)

    def gone(self, place):
        users, size = self.held.pop(place)
        if users > 1:
            self.held[place] = users - 1, size


def test_memory_stays_that_of_one_tensor(tmp_path, make_llama, monkeypatch):
    """Twenty layers, one tensor at a time: what is alive, float64 work included, is a small multiple of the largest."""
    from tiltmeter.lm import weights

    make_llama(tied=True, layers=20).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    model = make_llama(tied=True, layers=20, seed=1)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    largest = max(p.numel() * 4 for p in model.parameters())
    whole = sum(p.numel() * 4 for p in model.parameters())
    pair = pair_of(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned"))
    read, seen = weights.read_tensor, 0
    with Alive() as alive:

        def counted(*place):
            tensor = read(*place)
            alive.count(tensor)
            return tensor

        monkeypatch.setattr(weights, "read_tensor", counted)
        for name, change in pair.changes():
            seen += 1
            if change.ndim == 2 and "layers" in name:
                intruders(pair.base.read(name), pair.tuned.read(name), 4, 0.6)
    assert seen == sum(p.ndim == 2 for p in model.parameters())  # norms are ones in both
    assert largest < alive.most < 6 * largest
    assert alive.most < whole / 2


def refused(match, *opened):
    with pytest.raises(ModelError, match=match):
        pair_of(*(open_checkpoint(name) for name in opened))


def test_damaged_checkpoints(tmp_path, make_llama, base):
    bad = tmp_path / "bad"
    tuned(make_llama, bad)
    file = bad / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(r"cannot load the weights .*model.safetensors", base, bad)
    file.write_bytes(b"")
    refused(r"cannot load the weights .*model.safetensors", base, bad)
    file.unlink()
    refused(r"holds no weights; expected model.safetensors", base, bad)
    (bad / "pytorch_model.bin").write_bytes(b"\x80")
    refused(r"only as pickle files .* convert them once", base, bad)


def test_a_missing_shard_and_a_wrong_index(tmp_path, make_llama, base):
    tuned(make_llama, tmp_path / "bad", max_shard_size="20KB")
    shard = sorted((tmp_path / "bad").glob("model-*.safetensors"))[1]
    held = shard.read_bytes()
    shard.unlink()
    refused(f"lacks the shard {shard.name}", base, tmp_path / "bad")
    save_file({"other": torch.zeros(1)}, shard)
    refused(f"the shard {shard.name} .* lacks the tensor", base, tmp_path / "bad")
    shard.write_bytes(held)
    (tmp_path / "bad" / "model.safetensors.index.json").write_text("{")
    refused(r"cannot load .*index.json", base, tmp_path / "bad")


def test_other_architectures_and_shapes(tmp_path, make_llama, base):
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    refused(r"base is a llama model but .*gpt2 is a gpt2 model", base, tmp_path / "gpt2")
    make_llama(tied=True, layers=3).save_pretrained(tmp_path / "deeper")
    refused(r"deeper has the tensor model.layers.2.* but .*base has not", base, tmp_path / "deeper")
    make_llama(tied=True, vocab_size=400).save_pretrained(tmp_path / "wider")
    refused(r"embed_tokens.weight is \(384, 32\) in .*base but \(400, 32\)", base, tmp_path / "wider")


def test_things_that_are_no_checkpoint(tmp_path, make_llama, base):
    refused("GGUF file", tmp_path / "model.gguf")
    (tmp_path / "file").write_text("x")
    refused("is a file", tmp_path / "file")
    (base / "config.json").unlink()
    refused(r"configuration \(config.json\)", base)


def test_values_that_are_not_finite(tmp_path, make_llama, base):
    bad = tuned(make_llama, tmp_path / "bad")
    with torch.no_grad():
        bad.model.norm.weight[0] = float("nan")
    bad.save_pretrained(tmp_path / "bad")
    pair = pair_of(open_checkpoint(base), open_checkpoint(tmp_path / "bad"))
    with pytest.raises(ModelError, match=r"model.norm.weight of .*bad holds values that are not finite"):
        list(pair.changes())


def test_adapters_that_do_not_fit(tmp_path, make_llama, base):
    folder = tmp_path / "adapter"
    adapter(make_llama, base, folder, **CONFIGS["plain"])
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def saved(**changed):
        save_file({k: v for k, v in {**tensors, **changed}.items() if v is not None}, file)

    saved(**{key: None})
    refused("incomplete: .*q_proj.weight has only its factor B", folder)
    saved(**{key: torch.zeros(4, 7)})
    refused(r"factors for model.layers.0.self_attn.q_proj.weight are \(32, 4\) and \(4, 7\)", folder)
    saved(**{"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.zeros(4, 48)})
    refused("its base has no parameter model.layers.9.mlp.down_proj.weight", folder)
    saved(**{"base_model.model.model.norm.weight": torch.zeros(3)})
    refused(r"norm.weight is \(3,\), expected \(32,\)", folder)
    saved()
    for change, word in (({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3")):
        config.write_text(json.dumps({**settings, **change}))
        refused(f"is {word}; only LoRA", folder)
    config.write_text(json.dumps(settings))
    file.write_bytes(file.read_bytes()[:50])
    refused("cannot load the adapter weights", folder)
    file.unlink()
    refused("pickled weights .* are not read", folder)
