"""Loading a language model, and using it without leaving a trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltmeter.errors import ModelError, OutOfMemory, UnsupportedModel
from tiltmeter.lm.adapter import adapter_folder, base_of, has_tokenizer, merge, quiet
from tiltmeter.lm.checkpoint import cannot, check_memory, read_gguf, read_model, read_tokenizer
from tiltmeter.lm.four_bit import NF4, differentiable, holds_four_bits, is_four_bit, scales
from tiltmeter.lm.frozen import frozen_weights
from tiltmeter.lm.sharding import divided, is_divided, is_part, let_go, whole

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    NF4: torch.float32,
}

#: Context of models that set no limit to it.
UNLIMITED = 2**20


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured.

    Attributes:
        model: a transformers (or PEFT) causal language model in eval mode.
        tokenizer: its tokenizer, with a padding token.
        name: as the user named it, with its adapter.
        digest: sixteen hex digits of the names, shapes, types and values of all parameters.
        context: most tokens it can take.
    """

    model: Any
    tokenizer: Any
    name: str
    digest: str
    context: int


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Weights are read from safetensors or GGUF only. An adapter is merged into its base in float32, so that what is
    measured is one plain model.

    Args:
        name: a hub id, a local folder, a .gguf file, or a PEFT adapter (folder or hub id), which is merged into the
            base that it names.
        adapter: a PEFT adapter (folder or hub id) to merge into `name`.
        dtype: float32, bfloat16, float16, float64, nf4 for four-bit normal floats with float32 around them (LoRA only),
            or auto for that of the checkpoint.
        device: auto (CUDA, else MPS, else CPU) or any device of PyTorch.
        trust_remote_code: run code that comes with the model.

    Returns: the model in eval mode, with its tokenizer.

    Raises:
        ModelError: something cannot be loaded; the message says what and why.
        OutOfMemory: the weights do not fit.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    place = _device(device)
    given = None if adapter is None else str(adapter)
    if dtype == NF4:
        model, tokenizer = _read_four_bits(str(name), given, trust_remote_code, str(place))
    else:
        model, tokenizer = _read(str(name), given, DTYPES[dtype], trust_remote_code, str(place))
    if not is_divided(model) and not holds_four_bits(model):
        model = _move(model, place, str(name))
    _ensure_padding(tokenizer, model)
    full_name = str(name) if adapter is None else f"{name} + {adapter}"
    return Loaded(model.eval(), tokenizer, full_name, digest_of(model), _context(model, tokenizer))


def wrap(model: Any, tokenizer: Any) -> Loaded:
    """A model that somebody else loaded, as it stands; its tokenizer gets a padding token if it has none.

    Layers in four bits get a product that can be differentiated (`four_bit`); their values are what they were.
    """
    _ensure_padding(tokenizer, model)
    differentiable(model)
    return Loaded(
        model, tokenizer, str(model.config.name_or_path or "model"), digest_of(model), _context(model, tokenizer)
    )


@contextmanager
def second_order() -> Iterator[None]:
    """For second derivatives and forward mode: an attention kernel that has them, and no products with known zeros.

    The kernel needs more memory than the fused ones, so use it around such passes only.
    """
    with sdpa_kernel(SDPBackend.MATH), frozen_weights():
        yield


@contextmanager
def inputs_as_they_are(model: nn.Module) -> Iterator[None]:
    """Without the hooks by which transformers and PEFT have the embeddings' output require a gradient.

    Gradient checkpointing needs them in training; inside a derivative of `torch.func` they are an error.
    """
    held = []
    for module in model.modules():
        if any(_asks_for_gradient(hook) for hook in module._forward_hooks.values()):
            held.append((module._forward_hooks, module._forward_hooks.copy()))
    try:
        for hooks, every in held:
            for number, hook in every.items():
                if _asks_for_gradient(hook):
                    del hooks[number]
        yield
    finally:
        for hooks, every in held:  # in their order, which a hook that is put back alone would lose
            hooks.clear()
            hooks.update(every)


def _asks_for_gradient(hook: object) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Work on a model in eval mode and leave no trace, not even if the work fails.

    Gradients, training mode (of every module), requires_grad flags, buffers and PyTorch's random state are put back;
    inside there are no gradients yet. Parameters are not copied: who moves them puts them back. A trainer's mixed
    precision is left out inside: accelerate lays autocast around the model's forward, in whose bfloat16 the anchor
    itself has a KL to what was measured before training.
    """
    cast, plain = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for p, _, _ in parameters:
            p.grad = None
        model.eval()
        if cast is not None and plain is not None:
            model.__dict__["forward"] = plain
        yield
    finally:
        let_go(model)
        if cast is not None and plain is not None:
            model.__dict__["forward"] = cast
        for module, training in modes:
            module.training = training
        for p, gradient, requires in parameters:
            p.requires_grad_(requires)
            p.grad = gradient
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if buffer is not None and value is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def add_lora(
    loaded: Loaded, *, r: int, alpha: float, targets: Sequence[str] | None, seed: int, dropout: float = 0.0
) -> Loaded:
    """Put a fresh LoRA on a model, as a fine-tune with LoRA will.

    Args:
        loaded: the base; its model is taken over and must not be used on its own afterwards.
        r: rank.
        alpha: scale; the update is alpha / r times B A.
        targets: names of the modules to adapt, or ["all-linear"]; None for PEFT's choice for this architecture.
        seed: of A, which is random; B is zero, so that the model computes what it did. The global random state stays.
        dropout: as in the fine-tune; off in eval mode.

    Returns: the PEFT model in eval mode, where only the LoRA parameters require gradients.

    Raises: ModelError: PEFT cannot put this LoRA on this model.
    """
    from peft import LoraConfig, get_peft_model

    modules = "all-linear" if targets is not None and list(targets) == ["all-linear"] else targets
    with torch.random.fork_rng([loaded.model.device] if loaded.model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=r,
                lora_alpha=alpha,
                target_modules=modules if modules is None or isinstance(modules, str) else list(modules),
                lora_dropout=dropout,
            )
            with quiet():
                model = get_peft_model(loaded.model, config)
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise cannot(f"a LoRA of rank {r} on {loaded.name}", error) from error
    return replace(loaded, model=model.eval(), digest=digest_of(model))


def trainable(model: nn.Module, *, parts: bool = False) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, in the model's order; tied ones once.

    Args:
        model: that is trained.
        parts: take parameters that are divided among processes too, for work that keeps to `gathered.parts_together`.

    Raises:
        UnsupportedModel: one of them is divided among processes (FSDP2, tensor parallelism): its products would be
            those of a part.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in found.items():
        if is_part(p) and not parts:
            raise UnsupportedModel(
                f"parameter {name} is divided among processes (a DTensor, as fully_shard makes them), and this work "
                "differentiates whole parameters only. Give a LoRA recipe (--lora-r), whose factors are added to the "
                "divided model and are whole, or launch without dividing it."
            )
    return found


def digest_of(model: nn.Module) -> str:
    """Sixteen hex digits of the names, shapes, types and values of all parameters.

    Raises: ModelError: a parameter is not finite.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        value = whole(p.detach())
        factors = scales(p)
        # what is packed may be kept in a floating type, in which it means nothing
        checked = [each for each in factors if each.is_floating_point()] if is_four_bit(p) else [value]
        if not all(torch.isfinite(each).all() for each in checked):
            raise ModelError(f"parameter {name} holds values that are not finite; the checkpoint is damaged")
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        # Bytes, because numpy has no bfloat16.
        for held in (value, *factors):
            digest.update(held.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read_four_bits(name: str, adapter: str | None, trust_remote_code: bool, device: str) -> tuple[Any, Any]:
    """A plain checkpoint, packed as it is read; nothing can be merged into packed weights."""
    if adapter is not None or name.lower().endswith(".gguf") or adapter_folder(name) is not None:
        raise UnsupportedModel(
            f"{name if adapter is None else adapter} is to be merged or unpacked, which four-bit weights cannot take "
            "in. Save the merged model to a folder first and give that with --dtype nf4."
        )
    place = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    model = read_model(place, torch.float32, trust_remote_code, device, four_bits=True)
    return model, read_tokenizer(place, trust_remote_code)


def _read(
    name: str, adapter: str | None, dtype: torch.dtype | None, trust_remote_code: bool, device: str
) -> tuple[Any, Any]:
    plain = adapter is None and not name.lower().endswith(".gguf")
    if divided(name) is not None and not (plain and adapter_folder(name) is None):
        raise UnsupportedModel(
            f"{name if adapter is None else adapter} is to be merged or unpacked, which needs the whole model in every "
            "process. Save the merged model to a folder first and give that, or launch without --use_fsdp."
        )
    if adapter is not None:
        folder = adapter_folder(adapter)
        if folder is None:
            raise ModelError(f"{adapter} is not a PEFT adapter; expected a folder or hub id with adapter_config.json")
        return _read_merged(name, folder, dtype, trust_remote_code)
    if name.lower().endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ModelError(f"{name} does not exist")
        return read_gguf(path, dtype)
    folder = adapter_folder(name)
    if folder is not None:
        return _read_merged(base_of(folder), folder, dtype, trust_remote_code)
    local = Path(name).expanduser()
    if local.is_file():
        raise ModelError(f"{name} is a file; expected a folder, a hub id or a .gguf file")
    place = str(local) if local.is_dir() else name
    return read_model(place, dtype, trust_remote_code, device), read_tokenizer(place, trust_remote_code)


def _read_merged(base: str, folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> tuple[Any, Any]:
    model, tokenizer = _read(base, None, dtype, trust_remote_code, "cpu")
    if holds_four_bits(model):
        raise UnsupportedModel(f"cannot merge {folder} into {base}, whose weights are packed into four bits")
    wanted = model.dtype
    # In bfloat16 a small update would be rounded away against the weight it is added to.
    merged = merge(model.float(), folder).to(wanted)
    return merged, read_tokenizer(str(folder), trust_remote_code) if has_tokenizer(folder) else tokenizer


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
    return place


def _move(model: Any, place: torch.device, name: str) -> Any:
    if place.type == "cuda":
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        check_memory(name, needed, torch.cuda.mem_get_info(place)[0], "CUDA")
    try:
        return model.to(place)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the weights of {name} do not fit the memory of {place}") from error


def _ensure_padding(tokenizer: Any, model: Any) -> None:
    """Padding is never looked at, so any token the model knows will do; resizing the embeddings would change it."""
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _context(model: Any, tokenizer: Any) -> int:
    try:
        return int(model.config.get_text_config().max_position_embeddings)
    except AttributeError:  # no learned or rotary positions, as in state-space models
        return min(int(tokenizer.model_max_length), UNLIMITED)
