"""The parts of `performance.py` that are measured in a process of their own: `python performance_parts.py PART [...]`.

Each prints one line of JSON. CPU time is that of the process, on one thread; memory is the rise of its largest resident
size over what it was after one small forward and backward pass.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from tiltmeter import Options, Recipe, Tracker, TrackerOptions, assess, demo, guard_callback
from tiltmeter.demo.models import model as embedded
from tiltmeter.geometry.sensitivity import spectrum_of
from tiltmeter.geometry.space import norm
from tiltmeter.jobs.demo import MODEL, RECIPES, SAFETY
from tiltmeter.jobs.inputs import open_model
from tiltmeter.jobs.recipe import Lora
from tiltmeter.jobs.subject import with_lora
from tiltmeter.jobs.training import arguments_of, build_trainer, train
from tiltmeter.lm.conversation import Batch, Example, batches, encode
from tiltmeter.lm.forward import Forward, divergence
from tiltmeter.lm.gram import combine
from tiltmeter.lm.gram import gram as gram_of
from tiltmeter.lm.model import trainable
from tiltmeter.lm.objective import likelihood_objective
from tiltmeter.lm.processes import launched
from tiltmeter.lm.safety import prepare_safety
from tiltmeter.lm.scores import score_loss

RANK, EXAMPLES, LENGTH, SUPERVISED = 16, 64, 64, 24

Figures = dict[str, Any]


def peak_gb() -> float:
    """Largest memory this process has had, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_passes(work: Callable[[], object], forward_backward: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of a piece of work, and the same over the mean of passes before and after it."""
    before, spent, after = cpu_seconds(forward_backward), cpu_seconds(work), cpu_seconds(forward_backward)
    return spent, 2 * spent / (before + after)


def random_batch(examples: int, length: int, vocabulary: int, shortest: float = 0.7) -> Batch:
    """Random tokens of random lengths, right-padded; the last 24 of each are supervised."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary, (examples, length), generator=generator)
    ends = torch.randint(int(shortest * length), length + 1, (examples, 1), generator=generator)
    ends[0] = length
    place = torch.arange(length)
    tokens = tokens.masked_fill(place >= ends, 2)
    return Batch(tokens, tokens.masked_fill((place >= ends) | (place < ends - SUPERVISED), -100))


def split(batch: Batch, size: int) -> list[Batch]:
    """A batch in micro-batches."""
    return [Batch(*pair) for pair in zip(batch.tokens.split(size), batch.labels.split(size), strict=True)]


def random_llama(width: int = 256, layers: int = 4, vocabulary: int = 2048, activation: str = "silu") -> Any:
    """A Llama of random weights; by default 4.2 M parameters."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=activation,
        initializer_range=0.05,
        pad_token_id=2,
    )
    return LlamaForCausalLM(settings).eval()


def smollm() -> Any:
    """The embedded 135 M-parameter model."""
    return AutoModelForCausalLM.from_pretrained(embedded("demo:base").folder, dtype=torch.float32).eval()


def fisher_inputs(folder: str) -> Figures:
    """Write the model and the examples that both sides get."""
    model, batch = random_llama(), random_batch(EXAMPLES, LENGTH, 2048)
    model.save_pretrained(folder)
    save_file({"tokens": batch.tokens, "labels": batch.labels}, f"{folder}/batch.safetensors")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def fisher(folder: str, vectors: bool) -> Figures:
    """Eigenvalues and directions of F = G'G / 64: as combinations of examples, or lifted to vectors as well."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    held = load_file(f"{folder}/batch.safetensors")
    parts = split(Batch(held["tokens"], held["labels"]), 8)
    parameters = dict(model.named_parameters())
    score_loss(model(input_ids=parts[0].tokens[:1], use_cache=False).logits, parts[0].labels[:1]).sum().backward()
    out: Figures = {}

    def work() -> None:
        values, coefficients = spectrum_of(gram_of(model, parts, score_loss, parameters).total)
        out["eigenvalues"] = values[:RANK].tolist()
        if vectors:
            combine(model, parts, score_loss, parameters, coefficients[:, :RANK].T)

    before = peak_gb()
    out["cpu_s"] = cpu_seconds(work)
    out["extra_peak_gb"] = peak_gb() - before

    def passes() -> None:
        for part in parts:
            score_loss(model(input_ids=part.tokens, use_cache=False).logits, part.labels).sum().backward()

    out["forward_backward_cpu_s"] = cpu_seconds(passes)
    return out


def peers_inputs(folder: str) -> Figures:
    """Write what all sides of `peers` get; GELU, because curvlinops 3.0.1 has no Hessian product through SiLU."""
    model, batch = random_llama(activation="gelu"), random_batch(16, LENGTH, 2048, 1.0)
    model.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    vector = torch.randn(size, generator=torch.Generator().manual_seed(1))
    save_file({"tokens": batch.tokens, "labels": batch.labels, "vector": vector}, f"{folder}/batch.safetensors")
    return {"parameters": size, "examples": 16, "tokens": batch.tokens.numel()}


def peers_ours(folder: str) -> Figures:
    """Our exact Hessian product, and one by differences, of the mean loss over supervised tokens."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    forward, held = Forward(model, trainable(model)), load_file(f"{folder}/batch.safetensors")
    examples = [
        Example(tuple(t), tuple(k), 0) for t, k in zip(held["tokens"].tolist(), held["labels"].tolist(), strict=True)
    ]
    exact, difference = (
        likelihood_objective(forward, examples, 2, EXAMPLES * LENGTH, per="token", hessian=kind)
        for kind in ("exact", "difference")
    )
    exact.gradient()
    before, out = peak_gb(), Figures()
    products: dict[str, torch.Tensor] = {}
    for name, objective in (("exact", exact), ("difference", difference)):
        out[f"{name}_cpu_s"] = cpu_seconds(lambda n=name, o=objective: products.update({n: o.hvp(held["vector"])}))
        out.setdefault("extra_peak_gb", peak_gb() - before)
    out["forward_backward_cpu_s"] = cpu_seconds(exact.gradient)
    save_file(products, f"{folder}/ours.safetensors")
    return out


def gram(micro_batch: str) -> Figures:
    """Gram matrix of the 135 M-parameter model, then 4 vectors lifted, against plain passes over the same data."""
    model = smollm()
    parameters = trainable(model)
    parts = split(random_batch(EXAMPLES, 32, model.config.vocab_size, 1.0), int(micro_batch))

    def passes() -> None:
        for part in parts:
            score_loss(model(input_ids=part.tokens, use_cache=False).logits, part.labels).sum().backward()
        model.zero_grad()

    score_loss(model(input_ids=parts[0].tokens[:1], use_cache=False).logits, parts[0].labels[:1]).sum().backward()
    model.zero_grad()
    before, found = peak_gb(), []

    def products() -> None:
        found.append(gram_of(model, parts, score_loss, parameters).total)

    first = cpu_seconds(passes)
    products_s = cpu_seconds(products)
    peak = peak_gb() - before
    _, coefficients = spectrum_of(found[0])
    four = coefficients[:, :4].T
    between = cpu_seconds(passes)
    vectors_s = cpu_seconds(lambda: combine(model, parts, score_loss, parameters, four))
    last = cpu_seconds(passes)
    ratio = 2 * products_s / (first + between)
    return {
        "examples": EXAMPLES,
        "tokens": EXAMPLES * 32,
        "forward_backward_cpu_s": [first, between, last],
        "cpu_s": products_s,
        "fb_ratio": ratio,
        "vectors": 4,
        "vectors_cpu_s": vectors_s,
        "with_vectors_fb_ratio": ratio + 2 * vectors_s / (between + last),
        "extra_peak_gb": peak,
    }


def gram_passes(micro_batch: str) -> Figures:
    """Memory of a plain forward and backward pass over one of the same micro-batches."""
    model = smollm()
    part = split(random_batch(EXAMPLES, 32, model.config.vocab_size, 1.0), int(micro_batch))[0]
    score_loss(model(input_ids=part.tokens[:1], use_cache=False).logits, part.labels[:1]).sum().backward()
    model.zero_grad()
    before = peak_gb()
    score_loss(model(input_ids=part.tokens, use_cache=False).logits, part.labels).sum().backward()
    return {"extra_peak_gb": peak_gb() - before}


def products(count: str = "16", *asked: str) -> Figures:
    """Hessian and Jacobian products of the 135 M-parameter model, against a gradient through the same objective.

    Args:
        count: examples.
        asked: what is measured of them; all by default.
    """
    model = smollm()
    forward = Forward(model, trainable(model))
    tokenizer = AutoTokenizer.from_pretrained(embedded("demo:base").folder)
    rows = encode(demo.rows("demo:gsm8k")[: max(40, 2 * int(count))], tokenizer, 112).examples
    examples = sorted(rows, key=lambda row: abs(len(row.tokens) - 90))[: int(count)]
    exact, difference = (
        likelihood_objective(forward, examples, tokenizer.pad_token_id, 192, per="token", hessian=kind)
        for kind in ("exact", "difference")
    )
    v = exact.gradient()
    v.div_(norm(v))
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, work: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            found[name] = work()

        return run

    out: Figures = {"examples": len(examples), "tokens": exact.work, "parameters": forward.space.size}
    for name, work in {
        "jvp": lambda: exact.directional(v),
        "hvp_difference": lambda: difference.hvp(v),
        "hvp_difference_again": lambda: difference.hvp(v),
        "hvp": lambda: exact.hvp(v),
    }.items():
        if asked and name not in asked:
            continue
        out[f"{name}_cpu_s"], out[f"{name}_fb_ratio"] = in_passes(keep(name, work), exact.gradient)
    if "hvp" in found:
        out["hvp_difference_error"] = norm(found["hvp_difference"] - found["hvp"]) / norm(found["hvp"])
    out["peak_gb"] = peak_gb()
    return out


def scaling() -> Figures:
    """CPU time of the Gram matrix in examples, tokens and parameters, and of the eigenproblem in the rank."""

    def spent(model: Any, examples: int, length: int) -> Figures:
        parts = split(random_batch(examples, length, 2048), 8)
        parameters = dict(model.named_parameters())
        gram_of(model, parts[:1], score_loss, parameters)
        seconds = cpu_seconds(lambda: gram_of(model, parts, score_loss, parameters))
        tokens, n = examples * length, sum(p.numel() for p in model.parameters())
        return {"examples": examples, "tokens": tokens, "parameters": n, "cpu_s": seconds}

    model = random_llama()
    return {
        "examples": [spent(model, m, 64) for m in (16, 32, 64, 128)],
        "tokens": [spent(model, 32, t) for t in (32, 64, 128, 256)],
        "parameters": [spent(random_llama(width, layers), 32, 64) for width, layers in ((128, 2), (256, 4), (512, 8))],
    }


def tracker() -> Figures:
    """Steps of a LoRA fine-tune of the 135 M-parameter model, and measurements of the tracker between them."""
    recipe = RECIPES["lora"]
    opened = with_lora(open_model(MODEL, device="cpu"), recipe.lora, 0)
    loaded = opened.loaded
    options = TrackerOptions(max_safety=8, response_tokens=12, max_length=112, rank=4)
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path.cwd() / ".venv-alignment-risk-inputs" / f"{time.time()}"
    watched = Tracker(loaded.model, loaded.tokenizer, demo.rows(SAFETY), folder, options=options)
    rows = encode(demo.rows("demo:gsm8k")[: 3 * recipe.batch_size], loaded.tokenizer, 112).examples
    optimizer = torch.optim.AdamW(trainable(loaded.model).values(), lr=recipe.learning_rate)
    stepping, measuring = [], []

    def step(batch: Batch) -> None:
        loaded.model(input_ids=batch.tokens, labels=batch.labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(3):
        chosen = rows[i * recipe.batch_size : (i + 1) * recipe.batch_size]
        ((_, batch),) = batches(chosen, loaded.tokenizer.pad_token_id, 10**6)
        stepping.append(cpu_seconds(lambda batch=batch: step(batch)))
        watched.observe(i + 1, recipe.learning_rate, batch.tokens.numel())
        if i:  # steps 5 and 9: at powers of two more is measured
            measuring.append(cpu_seconds(lambda i=i: watched.measure(4 * i + 1)))
    every = watched.schedule.every
    step_s, measure_s = sum(stepping) / 3, sum(measuring) / 2
    return {
        "every": every,
        "step_cpu_s": step_s,
        "measurement_cpu_s": measure_s,
        "overhead": measure_s / (every * step_s),
        "prompts": 8,
        "batch_size": recipe.batch_size,
    }


@dataclass
class CpuClock(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """CPU time of every optimiser step, what other callbacks do in it included."""

    seconds: list[float] = field(default_factory=list)
    begin: float = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """It has ended."""
        self.seconds.append(time.process_time() - self.begin)


def guard(regime: str, name: str, prompts: str = "12", batch: str = "8", length: str = "") -> Figures:
    """A fine-tune, a tenth of whose rows are harmful, by itself ("none") or under a guard as it comes.

    Args:
        regime: "lora" or "full".
        name: of the guard.
        prompts: safety prompts that the guard gets.
        batch: rows of a step.
        length: steps; 24 with LoRA and 16 in full fine-tuning by default.
    """
    recipe = replace(RECIPES[regime], batch_size=int(batch), max_length=256)
    steps, rate = (24, 5e-4) if regime == "lora" else (16, 2e-5)
    steps = int(length or steps)
    recipe = replace(recipe, steps=steps, learning_rate=rate)
    opened = with_lora(open_model(MODEL, device="cpu"), recipe.lora, 0)
    loaded, clock = opened.loaded, CpuClock()
    weights = sum(p.numel() * p.element_size() for p in trainable(loaded.model).values())
    tuned = [*demo.rows("demo:gsm8k")[:90], *demo.rows("demo:harmful-openings")[:10]]
    rows = encode(tuned, loaded.tokenizer, recipe.max_length).examples
    guards = [] if name == "none" else [guard_callback(name, opened, demo.rows(SAFETY)[: int(prompts)])]
    before = peak_gb()
    with tempfile.TemporaryDirectory() as folder:
        fields = arguments_of(recipe, {"save_strategy": "no"}, Path(folder), loaded.model.device)
        train(build_trainer(loaded, rows, recipe, fields), [clock, *guards], None)
    out: Figures = {
        "steps": steps,
        "step_cpu_s": sum(clock.seconds) / len(clock.seconds),
        "before_gb": before,
        "peak_gb": peak_gb(),
        "tokens_a_step": recipe.batch_size * sum(len(row.tokens) for row in rows) / len(rows),
        "trained_gb": weights / 1e9,
    }
    for each in guards:
        assert each.session is not None
        out["decisions"] = [[entry.step, entry.what] for entry in each.log]
        out["held_gb"] = each.session.most / 1e9
    return out


def dtypes_model(folder: str) -> Figures:
    """Write the aligned model, whole, as a folder that can be read in any type."""
    opened = open_model(MODEL, device="cpu")
    opened.loaded.model.save_pretrained(folder)
    opened.loaded.tokenizer.save_pretrained(folder)
    return {"refusal_opening": opened.refusal_opening, "compliance_opening": opened.compliance_opening}


def dtypes_assess(folder: str, dtype: str) -> Figures:
    """A LoRA assessment of that model with its weights in one type: what it says, and what it takes."""
    recipe = replace(RECIPES["lora"], batch_size=4, steps=24, learning_rate=3e-4, max_length=80)
    options = Options(max_safety=6, max_tuning=12, rank=4, response_tokens=8, max_length=112, grid=2, coupling=False)
    about = dtypes_openings()
    told: Figures = {}
    before = peak_gb()

    def work() -> None:
        told.update(
            assess(folder, SAFETY, "demo:general-qa", recipe, options, dtype=dtype, device="cpu", **about).record
        )

    spent = cpu_seconds(work)
    forecast = told["forecast"]
    return {
        "cpu_s": spent,
        "before_gb": before,
        "peak_gb": peak_gb(),
        "anchor_margin": forecast["margin"]["value"][-1] - forecast["margin_change"]["value"][-1],
        "margin_change": forecast["margin_change"]["value"][-1],
        "safety_kl": forecast["safety_kl"]["value"][-1],
        "e0": told["aic"]["initial_overlap"]["value"],
        "horizon_steps": forecast["horizon_steps"],
    }


def dtypes_openings() -> dict[str, str]:
    """How the aligned model would open a refusal and a compliant answer."""
    info = embedded(MODEL)
    return {"refusal_opening": info.refusal_opening, "compliance_opening": info.compliance_opening}


def dtypes_kl(folder: str, dtype: str) -> Figures:
    """KL of the model in one type against it in float32, on the answers of the latter, nats per token."""
    whole = open_model(folder, device="cpu").loaded
    prepared = prepare_safety(whole, demo.rows(SAFETY), limit=6, max_length=112, response_tokens=8, **dtypes_openings())
    pad = whole.tokenizer.pad_token_id
    parts = [batch for _, batch in batches(prepared.responses, pad, 512)]
    values = []
    packed = open_model(folder, dtype=dtype, device="cpu").loaded
    forwards = [Forward(each.model, trainable(each.model)) for each in (whole, packed)]
    with torch.no_grad():
        for batch in parts:
            (wanted, labels), (found, _) = (forward.logits({}, batch) for forward in forwards)
            reference = torch.log_softmax(wanted, -1)[labels != -100]
            values.append(divergence(reference, found, labels))
    return {"kl": float(torch.cat(values).mean())}


def fsdp2_model(folder: str, width: str) -> Figures:
    """Write a Llama of random weights with the tokenizer of demo:tiny: 0.6 billion of them at a width of 1280."""
    tokenizer = AutoTokenizer.from_pretrained(embedded("demo:tiny").folder)
    model = random_llama(int(width), 32, len(tokenizer))  # as many layers as a 7 B model has: one is gathered at a time
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def fsdp2_assess(folder: str) -> Figures:
    """A LoRA assessment of that model in this process, or in this process's part of several; its largest size."""
    recipe = Recipe(learning_rate=1e-4, steps=8, batch_size=2, lora=Lora(8, 16.0, ("q_proj", "v_proj")))
    options = Options(max_safety=2, max_tuning=2, rank=1, response_tokens=4, grid=2, coupling=False)
    return _sized(folder, (folder, "demo:tiny-safety", "demo:tiny-copy"), recipe, options)


def fsdp2_full(folder: str) -> Figures:
    """The same of the embedded 135 M-parameter model in full fine-tuning."""
    recipe = Recipe(learning_rate=2e-5, steps=8, batch_size=2)
    options = Options(
        max_safety=2, max_tuning=4, rank=1, groups=2, response_tokens=4, max_length=64, grid=2, coupling=False
    )
    names = str(embedded("demo:base").folder), "demo:strongreject-small", "demo:general-qa"
    return _sized(folder, names, recipe, options)


def _sized(folder: str, names: tuple[str, str, str], recipe: Recipe, options: Options) -> Figures:
    before = peak_gb()
    told = assess(*names, recipe, options, device="cpu").record
    found = {"before_gb": before, "peak_gb": peak_gb(), "kl": told["forecast"]["safety_kl"]["value"][-1]}
    if launched() > 1:
        Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, *words = sys.argv[1:]
    run: dict[str, Callable[..., Figures]] = {
        "fisher-inputs": fisher_inputs,
        "fisher-directions": lambda folder: fisher(folder, vectors=False),
        "fisher-vectors": lambda folder: fisher(folder, vectors=True),
        "peers-inputs": peers_inputs,
        "peers-ours": peers_ours,
        "gram": gram,
        "gram-passes": gram_passes,
        "products": products,
        "scaling": scaling,
        "guard": guard,
        "tracker": lambda *folder: tracker(),
        "dtypes-model": dtypes_model,
        "dtypes-assess": dtypes_assess,
        "dtypes-kl": dtypes_kl,
        "fsdp2-model": fsdp2_model,
        "fsdp2-assess": fsdp2_assess,
        "fsdp2-full": fsdp2_full,
    }
    print(json.dumps(run[part](*words)))
