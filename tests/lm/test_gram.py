"""Gram matrix of per-example gradients, against a loop of autograd over the examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from tiltmeter.errors import DataError, NumericalError, SpaceMismatch, UnsupportedModel
from tiltmeter.geometry.sensitivity import spectrum_of
from tiltmeter.lm import factors
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.factors import Factor, Pieces
from tiltmeter.lm.gram import Gram, combine, gram, gram_bytes, per_layer_name
from tiltmeter.lm.layers import Recorder

PAD = 5  # a token that is also used, as the end-of-turn token of SmolLM2 is
VOCABULARY = 60
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "attention bias": ("Qwen2", GROUPED),
    "norm of queries": ("Qwen3", GROUPED | {"head_dim": 8}),
    "1 + w": ("Gemma2", GROUPED | {"head_dim": 8}),
    "layer norm": ("GPTNeoX", SMALL),
    "transposed": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32} | SMALL),
}
#: Models that use some parameters in ways that are not recognised.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("Mixtral", GROUPED | {"num_local_experts": 4}),
    "flattened": ("OPT", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A small random model, no parameter of which is at a special value such as 0 or 1."""
    kind, settings = (MODELS | ODD)[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config).to(dtype).eval()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Add noise to all parameters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)


def batch(b: int, length: int, seed: int) -> Batch:
    """Ragged examples: random tokens, the first few not supervised, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (b, length), generator=generator)
    tokens[:, 3] = PAD
    labels = tokens.clone()
    for i in range(b):
        stop = length - 2 * i % 5
        tokens[i, stop:] = PAD
        labels[i, stop:] = -100
        labels[i, : 2 + i % 3] = -100
    return Batch(tokens, labels)


TWO = [batch(4, 12, 1), batch(3, 9, 2)]


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p over supervised tokens."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return -(log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)).sum(-1)


def dense(
    model: Any, batches: list[Batch], loss: Callable[[Tensor, Tensor], Tensor], parameters: Mapping[str, nn.Parameter]
) -> Gram:
    """The same by a loop of autograd over examples."""
    gradients = []
    for tokens, labels in ((b.tokens[i : i + 1], b.labels[i : i + 1]) for b in batches for i in range(len(b.tokens))):
        value = loss(model(input_ids=tokens, use_cache=False).logits, labels).sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
        gradients.append([g.flatten() for g in found])
    blocks = {}
    for k, name in enumerate(parameters):
        rows = torch.stack([g[k] for g in gradients])
        blocks[name] = sum((piece.double() @ piece.double().T for piece in rows.split(2**20, 1)), torch.zeros(()))
    return Gram(torch.stack(list(blocks.values())).sum(0), blocks)


def off(one: Tensor, other: Tensor) -> float:
    """Distance relative to the norm of the second."""
    return float((one - other).norm() / other.norm().clamp_min(1e-300))


def check(measured: Gram, expected: Gram, tolerance: float) -> None:
    """Compare the whole and every parameter."""
    assert list(measured.by_parameter) == list(expected.by_parameter)
    assert off(measured.total, expected.total) < tolerance
    wrong = {n: off(b, expected.by_parameter[n]) for n, b in measured.by_parameter.items()}
    assert max(wrong.values()) < 10 * tolerance, wrong
    assert_close(torch.stack(list(measured.by_parameter.values())).sum(0), measured.total)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", [*MODELS, *ODD])
def test_agrees_with_autograd_for_all_parameters(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = build(name, dtype)
    parameters = dict(model.named_parameters())
    check(gram(model, TWO, loss, parameters), dense(model, TWO, loss, parameters), tolerance)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_agrees_with_autograd_at_several_scales_of_the_loss(scale: float, dtype: torch.dtype, tolerance: float) -> None:
    model = build("tied", dtype)
    parameters = dict(model.named_parameters())

    def scaled(logits: Tensor, labels: Tensor) -> Tensor:
        return scale * loss(logits, labels) ** 2

    check(gram(model, TWO, scaled, parameters), dense(model, TWO, scaled, parameters), tolerance)


@pytest.mark.parametrize("name", list(MODELS))
def test_usual_models_need_one_pass_over_each_batch(name: str) -> None:
    model, calls = build(name, torch.float32), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    gram(model, TWO, loss, dict(model.named_parameters()))
    assert len(calls) == len(TWO)


@pytest.mark.parametrize("name", list(ODD))
def test_odd_models_are_passed_one_example_at_a_time(name: str) -> None:
    model, calls = build(name, torch.float32), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    gram(model, TWO, loss, dict(model.named_parameters()))
    assert len(calls) == 1 + 1 + 7


def test_gradients_that_have_to_be_kept_whole_are_kept_for_few_parameters_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("experts")
    parameters = dict(model.named_parameters())
    most = 0
    plain = Recorder.add_rows

    def spy(self: Recorder, name: str, rows: Tensor) -> None:
        nonlocal most
        plain(self, name, rows)
        most = max(most, sum(p.rows.nbytes for p in self.pieces.values() if p.rows is not None))

    monkeypatch.setattr(Recorder, "add_rows", spy)
    once = gram(model, TWO, loss, parameters)
    whole, most = most, 0
    check(gram(model, TWO, loss, parameters, store_bytes=whole // 3), once, 1e-12)
    assert most < 0.6 * whole


def test_the_test_model_would_show_a_lost_cross_term_of_tied_embeddings() -> None:
    """The tied block must not be the sum of the two that the same weights have untied."""
    tied, untied = build("tied"), build("untied")
    weights = tied.state_dict()
    untied.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    both = gram(tied, TWO, loss, dict(tied.named_parameters())).by_parameter["model.embed_tokens.weight"]
    parts = gram(untied, TWO, loss, dict(untied.named_parameters())).by_parameter
    assert off(parts["model.embed_tokens.weight"] + parts["lm_head.weight"], both) > 0.02


def test_the_test_model_would_show_a_gradient_at_the_padding_row() -> None:
    """Autograd never trains that row, even where its token is part of the text."""
    model = build("untied")
    embedding = {"embedding": model.model.embed_tokens.weight}
    assert model.model.embed_tokens.padding_idx == PAD
    fixed = gram(model, TWO, loss, embedding).total
    model.model.embed_tokens.padding_idx = None
    assert off(fixed, gram(model, TWO, loss, embedding).total) > 0.02


def test_the_test_data_would_show_lost_products_between_batches() -> None:
    model = build("tied")
    total = gram(model, TWO, loss, dict(model.named_parameters())).total
    assert total[:4, 4:].norm() > 0.02 * total.norm()


@pytest.mark.parametrize("name", ["tied", "transposed", "experts"])
def test_batches_chunks_and_groups_change_nothing(name: str) -> None:
    model = build(name)
    parameters = dict(model.named_parameters())
    whole = batch(6, 10, 3)
    once = gram(model, [whole], loss, parameters)
    parts = [Batch(whole.tokens[i : i + 2], whole.labels[i : i + 2]) for i in (0, 2, 4)]
    check(gram(model, parts, loss, parameters), once, 1e-12)
    check(gram(model, parts, loss, parameters, chunk_bytes=5000), once, 1e-12)
    check(gram(model, parts, loss, parameters, store_bytes=40_000), once, 1e-12)
    check(gram(model, [whole], loss, parameters, chunk_bytes=1), once, 1e-12)


def test_groups_pass_more_often_and_keep_less() -> None:
    model, calls = build("tied", torch.float32), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    tokens, supervised = sum(b.tokens.numel() for b in TWO), sum(int((b.labels != -100).sum()) for b in TWO)
    gram(model, TWO, loss, parameters, store_bytes=gram_bytes(model, tokens, supervised, parameters))
    assert len(calls) == 2
    gram(model, TWO, loss, parameters, store_bytes=gram_bytes(model, tokens, supervised, parameters) // 3)
    assert len(calls) > 2 + 2 * 2


def test_estimated_memory_covers_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("untied", torch.float32)
    parameters = dict(model.named_parameters())
    held = []
    plain = Pieces.gram

    def spy(self: Pieces, m: int, chunk_bytes: int) -> Tensor:
        held.extend(t.numel() * 4 for f in self.factors for t in (f.left, f.right) if t.is_floating_point())
        return plain(self, m, chunk_bytes)

    monkeypatch.setattr(Pieces, "gram", spy)
    gram(model, TWO, loss, parameters)
    tokens, supervised = sum(b.tokens.numel() for b in TWO), sum(int((b.labels != -100).sum()) for b in TWO)
    estimate = gram_bytes(model, tokens, supervised)
    # positions of shorter examples are kept at the head as long as they save less than a quarter
    assert sum(held) <= 1.2 * estimate
    assert estimate <= 1.2 * sum(held)


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_agrees_with_autograd_for_lora(start: str, dtype: torch.dtype, tolerance: float) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=start == "zero", lora_dropout=0.5)
    model = get_peft_model(build("tied", dtype), config).to(dtype)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in parameters)
    model.train()  # as a trainer leaves it; dropout must not act
    measured = gram(model, TWO, loss, parameters)
    model.eval()
    check(measured, dense(model, TWO, loss, parameters), tolerance)
    a = sum((b for n, b in measured.by_parameter.items() if "lora_A" in n), torch.zeros(()))
    assert bool(a.any()) == (start == "random")


class _Oddity(nn.Module):
    """A model with parameters that enter in unusual ways, some of them in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.gate = nn.Parameter(torch.randn(()))
        self.twice = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.made = nn.Linear(8, 8)
        self.late = nn.Linear(8, 8)
        self.flat = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        x = self.embed(input_ids)
        x = x + torch.tanh(x @ self.mix) * self.gate
        x = self.twice(x)
        x *= 1.5  # in place on an output
        x = torch.sin(x * self.scale) * torch.exp(self.scale) + torch.einsum("btd,cd->btc", x, self.twice.weight)
        x = self.twice(x) + self.twice.bias.cumsum(0)
        x = F.linear(x, self.made.weight * 2, self.made.bias)
        x = self.late(x.transpose(0, 1)).sin()  # positions first
        x = x.contiguous().transpose(0, 1).sin()  # the batch first again, but not in memory
        x = self.flat(x.transpose(0, 1).reshape(-1, 8)).view(x.shape[1], -1, 8).transpose(0, 1)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x.flatten(0, 1)).view(*x.shape[:2], -1))


def test_parameters_used_in_unusual_ways_and_in_several_ways() -> None:
    torch.manual_seed(0)
    model = _Oddity().double()
    parameters = dict(model.named_parameters())
    check(gram(model, TWO, loss, parameters), dense(model, TWO, loss, parameters), 1e-10)


@pytest.mark.parametrize("part", ["late", "flat", "made", "scale", "gate"])
def test_one_parameter_used_in_an_unusual_way_is_enough(part: str) -> None:
    torch.manual_seed(0)
    model = _Oddity().double()
    parameters = {name: p for name, p in model.named_parameters() if part in name}
    check(gram(model, TWO, loss, parameters), dense(model, TWO, loss, parameters), 1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_factors_are_used_up_as_the_last_backward_pass_goes(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("untied", torch.float32)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    order: list[str] = []
    plain = Pieces.gram

    def spy(self: Pieces, m: int, chunk_bytes: int) -> Tensor:
        order.append("products")
        return plain(self, m, chunk_bytes)

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda _: order.append("embedding"))

    monkeypatch.setattr(Pieces, "gram", spy)
    model.model.embed_tokens.register_forward_hook(watch)
    parameters = dict(model.named_parameters())
    gram(model, TWO, loss, parameters)
    assert order.index("embedding") == 0  # the first batch: nothing is complete yet
    assert order[1:] == ["products"] * (len(parameters) - 1) + ["embedding", "products"]


def test_half_precision_weights_are_as_good_as_their_gradients() -> None:
    model = build("tied", torch.bfloat16)
    parameters = dict(model.named_parameters())
    measured, expected = gram(model, TWO, loss, parameters), dense(model, TWO, loss, parameters)
    assert measured.total.dtype == torch.float64
    check(measured, expected, 0.01)


@pytest.mark.parametrize("name", ["tied", "flattened"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    """OPT's layers drop out by their own training flag, which checkpointing has to set."""
    model = build(name)
    parameters = dict(model.named_parameters())
    plain = gram(model, TWO, loss, parameters)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
    function = layer._gradient_checkpointing_func
    calls: list[int] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    norm = next(m for m in layer.modules() if "Norm" in type(m).__name__)
    norm.register_forward_pre_hook(lambda *_: calls.append(10))
    model.train()
    check(gram(model, TWO, loss, parameters), plain, 1e-12)
    assert calls.count(10) == 2 * calls.count(1) - (2 if name == "flattened" else 0)  # once more on the way back
    assert layer._gradient_checkpointing_func is function
    assert layer.training


def test_agrees_under_autocast() -> None:
    model = build("untied", torch.float32)
    parameters = dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        measured, expected = gram(model, TWO, loss, parameters), dense(model, TWO, loss, parameters)
    check(measured, expected, 0.01)


@pytest.mark.parametrize("fails", [None, "loss", "backward"])
def test_the_model_is_left_as_it_was(fails: str | None) -> None:
    model = build("tied", torch.float32).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    gradient = torch.randn_like(model.model.norm.weight)
    model.model.norm.weight.grad = gradient
    weights = copy.deepcopy(model.state_dict())
    state = _state(model)

    class _Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            raise ZeroDivisionError

    def failing(logits: Tensor, labels: Tensor) -> Tensor:
        torch.rand(3)
        if fails == "loss":
            raise ZeroDivisionError
        return loss(_Fail.apply(logits) if fails else logits, labels)

    before = torch.get_rng_state()
    with torch.no_grad():
        if fails:
            with pytest.raises(ZeroDivisionError):
                gram(model, TWO, failing, dict(model.named_parameters()))
        else:
            gram(model, TWO, failing, dict(model.named_parameters()))
    assert torch.equal(before, torch.get_rng_state())
    assert _state(model) == state
    assert model.model.norm.weight.grad is gradient
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.overrides._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def _state(model: nn.Module) -> list[Any]:
    modules = [(sorted(m.__dict__), m.training, id(m.forward.__func__)) for m in model.modules()]  # type: ignore[attr-defined]
    return [modules, [(p.requires_grad, p.grad is None, p.grad_fn) for p in model.parameters()]]


def test_frozen_parameters_can_be_asked_for_and_are_constants_otherwise() -> None:
    model = build("tied")
    parameters = {n: p for n, p in model.named_parameters() if "layers.1" in n}
    expected = dense(model, TWO, loss, parameters)
    model.requires_grad_(False)
    check(gram(model, TWO, loss, parameters), expected, 1e-12)


def test_a_parameter_that_no_loss_depends_on_has_zeros() -> None:
    model = build("untied")
    model.extra = nn.Linear(3, 3)
    parameters = {"norm": model.model.norm.weight, "extra": model.extra.weight}
    measured = gram(model, TWO, loss, parameters)
    assert not measured.by_parameter["extra"].any()
    with pytest.raises(UnsupportedModel, match="do not depend on extra"):
        gram(model, TWO, loss, {"extra": model.extra.weight})


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    model = build("tied")
    norm, table = model.model.norm.weight, model.model.embed_tokens.weight
    with pytest.raises(DataError):
        gram(model, [], loss, {"norm": norm})
    with pytest.raises(SpaceMismatch):
        gram(model, TWO, loss, {})
    with pytest.raises(UnsupportedModel, match="stranger"):
        gram(model, TWO, loss, {"stranger": nn.Parameter(torch.zeros(3))})
    with pytest.raises(SpaceMismatch, match="head and table"):
        gram(model, TWO, loss, {"head": model.lm_head.weight, "table": table})
    with pytest.raises(SpaceMismatch, match="one per example"):
        gram(model, TWO, lambda logits, labels: loss(logits, labels).sum(), {"norm": norm})
    with pytest.raises(NumericalError):
        gram(model, TWO, lambda logits, labels: loss(logits, labels) / 0, {"norm": norm})
    with pytest.raises(NumericalError):
        gram(model, TWO, lambda logits, labels: 1e200 * loss(logits, labels), {"norm": norm})
    model.quantised = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="quantised"):
        gram(model, TWO, loss, {"quantised": model.quantised})
    gram(model, TWO, loss, {"norm": norm})  # beside it, others can be measured


def test_activations_changed_in_place_are_an_error_and_not_a_wrong_result() -> None:
    model = _Oddity()

    def double(module: nn.Module, inputs: Any, output: Tensor) -> None:
        inputs[0].detach().mul_(2.0)

    model.twice.register_forward_hook(double)
    with pytest.raises(RuntimeError, match="inplace operation"):
        gram(model, TWO, loss, {"twice": model.twice.weight, "embed": model.embed.weight})


@pytest.mark.parametrize("r", [3, 40])
@pytest.mark.parametrize("rows", [False, True])
def test_routes_agree_with_gradients_formed_whole(r: int, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of two batches, one of which has a second use and a lookup, and maybe rows known directly."""
    torch.manual_seed(0)
    c, m = 4, 6  # the last example has no factor
    pieces = [
        Factor(0, torch.randn(3, 6, r).double(), torch.randn(3, 6, c).double()),
        Factor(3, torch.randn(2, 5, r).double(), torch.randn(2, 5, c).double()),
        Factor(0, torch.randn(3, 2, r).double(), torch.randn(3, 2, c).double()),
        Factor(0, torch.randint(0, r, (3, 9)), torch.randn(3, 9, c).double()),
    ]
    known = torch.randn(m, r * c).double() if rows else None
    whole = torch.zeros(m, r, c).double() if known is None else known.clone().view(m, r, c)
    for piece in pieces:
        left = F.one_hot(piece.left, r).double() if piece.looks_up else piece.left
        whole[piece.examples] += torch.einsum("btr,btc->brc", left, piece.right)
    expected = whole.flatten(1) @ whole.flatten(1).T
    for ghost in (-1000, 10**9):
        monkeypatch.setattr(factors, "_GHOST_ENTRY", ghost)
        for chunk in (1, 700, 10**6):
            assert_close(Pieces(torch.Size((r, c)), list(pieces), known).gram(m, chunk), expected)


def test_packing_keeps_what_carries_a_gradient() -> None:
    left, right = torch.randn(2, 8, 3), torch.randn(2, 8, 4)
    right[0, 2:] = 0
    right[1, :5] = 0
    packed = Factor(0, left, right).packed(right)
    assert packed is not None
    assert packed.right.shape == (2, 3, 4)
    whole = torch.einsum("btr,btc->brc", left, right)
    assert_close(torch.einsum("btr,btc->brc", packed.left, packed.right), whole)
    assert Factor(0, left, 0 * right).packed(0 * right) is None


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "layers.3"),
        ("model.layers.12.input_layernorm.weight", "layers.12"),
        ("transformer.h.0.attn.c_attn.bias", "layers.0"),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h.weight", "layers.1"),
        ("model.embed_tokens.weight", "embed"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", "embed"),
        ("transformer.wpe.weight", "embed"),
        ("lm_head.weight", "head"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "head"),
        ("model.norm.weight", "final_norm"),
        ("transformer.ln_f.bias", "final_norm"),
        ("base_model.model.model.rotary.scale", "model.rotary"),
        ("theta", "theta"),
    ],
)
def test_parameters_belong_to_parts_of_the_model(parameter: str, layer: str) -> None:
    assert per_layer_name(parameter) == layer


@pytest.mark.real
def test_agrees_with_autograd_on_the_embedded_model() -> None:
    from tiltmeter.demo.models import model as embedded

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(embedded("demo:base").folder, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    torch.manual_seed(0)
    tokens = torch.randint(3, 40_000, (4, 40))
    tokens[:, 4] = 2  # <|im_end|>, which is also the padding token
    labels = tokens.clone()
    labels[:, :20] = -100
    tokens[1, 30:], labels[1, 30:] = 2, -100
    parts = [Batch(tokens[:3], labels[:3]), Batch(tokens[3:, :36], labels[3:, :36])]
    check(gram(model, parts, loss, parameters), dense(model, parts, loss, parameters), 1e-5)


@pytest.mark.parametrize("chunk_bytes", [2**20, 2000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", [*MODELS, *ODD])
def test_weighted_sums_agree_with_autograd(name: str, dtype: torch.dtype, tolerance: float, chunk_bytes: int) -> None:
    """One parameter is of a kind that no loss depends on."""
    model = build(name, dtype)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=dtype)))
    parameters = dict(model.named_parameters())
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 10
    found = combine(model, TWO, loss, parameters, weights, chunk_bytes=chunk_bytes)
    expected = {name: torch.zeros(3, *p.shape, dtype=torch.float64) for name, p in parameters.items()}
    apart = [(b.tokens[i : i + 1], b.labels[i : i + 1]) for b in TWO for i in range(len(b.tokens))]
    for column, (tokens, labels) in zip(weights.T, apart, strict=True):
        value = loss(model(input_ids=tokens, use_cache=False).logits, labels).sum()
        gradients = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            expected[parameter] += torch.einsum("k,...->k...", column, gradient.double())
    assert found.keys() == parameters.keys()
    for parameter, sums in found.items():
        assert sums.shape == expected[parameter].shape
        assert off(sums, expected[parameter]) < 10 * tolerance, parameter
    assert not found["unused"].any()


def test_lifted_eigenvectors_are_orthonormal_and_do_not_depend_on_the_groups() -> None:
    model = build("tied")
    parameters = dict(model.named_parameters())
    _, coefficients = spectrum_of(gram(model, TWO, loss, parameters).total)
    found = combine(model, TWO, loss, parameters, coefficients[:, :4].T)
    rows = torch.cat([v.reshape(4, -1) for v in found.values()], 1)
    assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)
    again = combine(model, TWO, loss, parameters, coefficients[:, :4].T, store_bytes=1)
    for name, rows in found.items():
        assert_close(again[name], rows)


def test_weights_of_another_number_of_examples_are_refused() -> None:
    model = build("tied")
    with pytest.raises(SpaceMismatch, match=r"expected weights \[k, 7\].*got shape \(2, 6\)"):
        combine(model, TWO, loss, dict(model.named_parameters()), torch.ones(2, 6))


def test_sums_that_are_not_finite_name_their_parameter() -> None:
    model = build("tied", torch.float32)
    with pytest.raises(NumericalError, match=r"a gradient of .* is not finite"):
        combine(model, TWO, loss, dict(model.named_parameters()), torch.full((1, 7), 3e38))


def test_a_second_use_by_more_examples_than_the_first_does_not_read_what_was_never_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that nobody wrote is filled with NaN here."""
    torch.manual_seed(0)
    few, more = (Factor(0, torch.randn(b, 3, 5), torch.randn(b, 3, 4)) for b in (2, 4))
    whole = torch.einsum("btr,btc->brc", more.left, more.right)
    whole[:2] += torch.einsum("btr,btc->brc", few.left, few.right)
    monkeypatch.setattr(factors, "_GHOST_ENTRY", 10**9)
    torch.use_deterministic_algorithms(True)
    try:
        pieces = Pieces(torch.Size((5, 4)), [few, more])
        assert_close(pieces.gram(4, 1), (whole.flatten(1) @ whole.flatten(1).T).double())
        assert_close(pieces.combine(torch.eye(4), 1), whole)
    finally:
        torch.use_deterministic_algorithms(False)
