"""Four-bit weights against a model that holds the same numbers unpacked: every derivative, assessment and run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap

from tiltmeter import demo
from tiltmeter.errors import ModelError, UnsupportedModel
from tiltmeter.jobs.assess import assess
from tiltmeter.jobs.audit import audit
from tiltmeter.jobs.finetune import finetune
from tiltmeter.jobs.guarding import GuardOptions, alignment_of
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.recipe import Lora, Recipe
from tiltmeter.jobs.subject import Options, with_lora
from tiltmeter.lm.checkpoint import _weight_bytes
from tiltmeter.lm.four_bit import count, dense, differentiable, is_four_bit
from tiltmeter.lm.model import digest_of, load, wrap
from tiltmeter.tracking.anchor import TrackerOptions

SETS = ("demo:tiny-safety", "demo:tiny-copy")
RECIPE = Recipe(learning_rate=2e-2, steps=8, batch_size=4, max_length=64, lora=Lora(4, 8.0, ("q_proj", "down_proj")))
OPTIONS = Options(max_safety=6, max_tuning=12, rank=2, grid=3, groups=3, max_tokens=100)


TINY = demo.model("demo:tiny")
OPENINGS = {"refusal_opening": TINY.refusal_opening, "compliance_opening": TINY.compliance_opening}


def packed_layer(rows: int, columns: int, *, bias: bool, seed: int = 0):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(seed)
    layer = Linear4bit(columns, rows, bias=bias, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    differentiable(layer)
    return layer


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The tiny model with the numbers that its four-bit form stands for, in a folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    packed, whole = (
        load(TINY.folder, dtype="nf4", device="cpu"),
        open_model("demo:tiny", device="cpu"),
    )
    with torch.no_grad():
        for name, p in packed.model.named_parameters():
            if is_four_bit(p):
                whole.loaded.model.get_parameter(name).copy_(dense(p, torch.float32))
    whole.loaded.model.save_pretrained(folder)
    whole.loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (176, 64), (64, 128)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_derivative_is_that_of_the_unpacked_layer(rows, columns, bias, scale):
    layer = packed_layer(rows, columns, bias=bias)
    plain = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(dense(layer.weight, torch.float32))
        if bias:
            plain.bias.copy_(layer.bias)
    generator = torch.Generator().manual_seed(1)
    x, v = scale * torch.randn(2, 3, columns, generator=generator), torch.randn(2, 3, columns, generator=generator)
    several = torch.randn(4, 2, 3, columns, generator=generator)

    def products(module):
        def value(x):
            return torch.nn.functional.silu(module(x)).square().sum()

        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        (bent,) = torch.autograd.grad(slope, leaf, v)
        along = jvp(value, (x,), (v,))[1]
        twice = jvp(lambda t: jvp(value, (t,), (v,))[1], (x,), (v,))[1]
        all_at_once = vmap(lambda tangent: jvp(value, (x,), (tangent,))[1])(several)
        return [value(x), slope, bent, along, twice, all_at_once]

    for one, other in zip(products(layer), products(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_value_is_that_of_bitsandbytes_in_every_type(compute, given):
    layer = packed_layer(64, 128, bias=True)
    layer.compute_dtype = compute
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(2)).to(given)
    plain = type(layer).forward
    found, wanted = layer.train()(x), plain(layer, x)  # in training it does not repack its weights
    assert found.dtype == wanted.dtype == given
    rough = torch.bfloat16 in (compute, given)  # eight bits, and the bias may be added before or after rounding
    torch.testing.assert_close(found, wanted.detach(), rtol=2e-2 if rough else 1e-5, atol=2e-2 if rough else 1e-5)


def close(one, other, path=""):
    """Every number to 1e-5 of itself; names and digests apart."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            close(value, other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for a, b in zip(one, other, strict=True):
            close(a, b, path)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6), path
    else:
        assert one == other, path


def test_an_assessment_is_that_of_the_unpacked_model(unpacked):
    told = [
        assess(name, *SETS, RECIPE, OPTIONS, dtype=dtype, device="cpu", **OPENINGS).record
        for name, dtype in ((str(TINY.folder), "nf4"), (str(unpacked), "float32"))
    ]
    one, other = (json.loads(json.dumps(record)) for record in told)
    assert one["model"]["parameters"] == other["model"]["parameters"]
    assert (one["model"]["dtype"], other["model"]["dtype"]) == ("nf4", "float32")
    for part in ("forecast", "aic", "spectrum"):
        close(one[part], other[part], part)


def test_a_guarded_run_is_that_of_the_unpacked_model(unpacked, tmp_path):
    options, guard = TrackerOptions(max_safety=6, rank=2, every=4), GuardOptions("budget", budget_kl=1e-3)
    one, other = (
        finetune(
            name, *SETS, RECIPE, tmp_path / dtype, options=options, guard=guard, dtype=dtype, device="cpu", **OPENINGS
        ).record
        for name, dtype in ((str(TINY.folder), "nf4"), (str(unpacked), "float32"))
    )
    assert [entry["what"] for entry in one["guard"]["log"]] == [entry["what"] for entry in other["guard"]["log"]]
    for key in ("safety_kl", "margin"):
        mine, theirs = (torch.tensor(held["curves"][key]["value"]) for held in (one, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "nf4" / "model" / "adapter_model.safetensors").exists()


def test_a_checkpoint_in_four_bits_is_read_as_such(tmp_path):
    first = load(TINY.folder, dtype="nf4", device="cpu")
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu")
    assert again.digest == first.digest
    x = torch.arange(5, 17)[None]
    torch.testing.assert_close(again.model(x).logits, first.model(x).logits)


def test_numbers_are_counted_and_scales_are_part_of_the_digest():
    packed, whole = (
        load(TINY.folder, dtype="nf4", device="cpu"),
        open_model("demo:tiny", device="cpu"),
    )
    sizes = [sum(count(p) for p in model.parameters()) for model in (packed.model, whole.loaded.model)]
    assert sizes[0] == sizes[1]
    held = sum(p.numel() * p.element_size() for p in packed.model.parameters())
    scales = sum(p.quant_state.absmax.numel() * 4 for p in packed.model.parameters() if is_four_bit(p))
    assert _weight_bytes(packed.model.config, torch.float32, False, four_bits=True) == held + scales
    before = digest_of(packed.model)
    weight = next(p for p in packed.model.parameters() if is_four_bit(p))
    weight.quant_state.absmax.mul_(2)
    assert digest_of(packed.model) != before


def test_an_adapter_around_a_packed_layer_keeps_its_own_product():
    """It passes the weight inside off as one of its own."""
    opened = with_lora(open_model("demo:tiny", dtype="nf4", device="cpu"), RECIPE.lora, 0)
    loaded = wrap(opened.loaded.model, opened.loaded.tokenizer)
    x = torch.arange(5, 17)[None]
    before = loaded.model(x).logits.detach()
    with torch.no_grad():
        for name, p in loaded.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    assert not torch.allclose(loaded.model(x).logits, before)


def test_a_layer_that_was_repacked_for_inference_is_refused():
    """bitsandbytes does so on some processors, at the first answer; the numbers would be read in the wrong order."""
    layer = packed_layer(64, 128, bias=False)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModel, match="load the model anew, and measure it before it answers"):
        differentiable(nn.Sequential(layer))


def test_an_embedding_in_four_bits_is_refused():
    from bitsandbytes.nn import EmbeddingNF4

    with pytest.raises(UnsupportedModel, match="understood are linear layers"):
        differentiable(nn.Sequential(EmbeddingNF4(64, 64).to("cpu")))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_packed_bits_are_not_taken_for_numbers_and_scales_are(storage, tmp_path):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    kind = getattr(torch, storage)
    layer = Linear4bit(128, 256, quant_type="nf4", quant_storage=kind, compress_statistics=False)
    model = nn.Sequential(layer.to("cpu"))
    assert len(digest_of(model)) == 16
    model[0].weight.quant_state.absmax[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        digest_of(model)


def test_what_cannot_be_done_in_four_bits_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedModel, match=r"cannot be trained themselves: give a LoRA recipe"):
        assess("demo:tiny", *SETS, replace(RECIPE, lora=None), OPTIONS, dtype="nf4", device="cpu")
    with pytest.raises(UnsupportedModel, match="cannot take in"):
        open_model("demo:aligned", dtype="nf4", device="cpu")
    with pytest.raises(UnsupportedModel, match="which four bits cannot take in: give another --dtype"):
        audit("demo:tiny", "demo:tiny", SETS[0], dtype="nf4", device="cpu")
    packed, whole = (open_model("demo:tiny", dtype=dtype, device="cpu").loaded.model for dtype in ("nf4", "float32"))
    with pytest.raises(UnsupportedModel, match="a difference of weights, which four bits cannot tell"):
        alignment_of(packed, whole)
    folder = tmp_path / "gptq"
    open_model("demo:tiny", device="cpu").loaded.model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="quantised by gptq; understood are four bits by bitsandbytes"):
        load(folder, device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'tiltmeter\[four-bit\]'"):
        open_model("demo:tiny", dtype="nf4", device="cpu")
