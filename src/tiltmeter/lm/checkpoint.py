"""Reading weights and tokenizers from disk or the hub; every way this can fail ends in one clear message."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiltmeter.errors import ModelError, OutOfMemory, UnsupportedModel
from tiltmeter.lm.four_bit import asks_for_four_bits, differentiable, four_bit_config
from tiltmeter.lm.memory import map_blocks
from tiltmeter.lm.processes import launched
from tiltmeter.lm.sharding import divided

#: llama.cpp pre-tokenizers that part numbers into digits, which transformers' GGUF converter forgets.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})

#: What is said of weights that only pickle can open.
PICKLED = (
    "{name} holds its weights only as pickle files (.bin), which run code when they are opened, and are not read. If "
    "you trust their source, convert them once: AutoModelForCausalLM.from_pretrained({name!r}, "
    "use_safetensors=False).save_pretrained('converted')"
)


def cannot(what: str, error: Exception) -> ModelError:
    """One line about something that could not be loaded, with the cause."""
    if "contains custom code" in str(error):
        return ModelError(
            f"{what} needs code that comes along with it, which is not run unless asked for: read it, and if you trust "
            "its source give --trust-remote-code (trust_remote_code=True)"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ModelError(f"cannot load {what}: {type(error).__name__}: {lines[0][:300] if lines else 'no message'}")


def read_model(
    name: str, dtype: torch.dtype | None, trust_remote_code: bool, device: str = "cpu", *, four_bits: bool = False
) -> Any:
    """A causal language model from the hub or a local folder, on the CPU; or this process's part of it (`sharding`).

    Args:
        name: hub id or folder.
        dtype: of the parameters; None for that of the checkpoint.
        trust_remote_code: run code that comes with the model.
        device: where a part, or a model in four bits, is put; any other is read on the CPU.
        four_bits: pack the weights of linear layers into four bits (`four_bit`).

    Raises:
        ModelError: no configuration, not a causal model, no safetensors, damaged, incomplete or misshapen weights.
        OutOfMemory: the weights need more memory than is free.
        UnsupportedModel: the launcher asks for a division that is not supported, or the weights are quantised in a way
            that is not understood.
    """
    shares = divided(name)
    if shares is not None:
        map_blocks(2**18)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds, and they change between releases
        raise cannot(f"the configuration (config.json) of {name}", error) from error
    _check_causal(name, config, trust_remote_code)
    _check_pickle(name)
    packed = asks_for_four_bits(config)
    if (packed or four_bits) and shares is not None:
        raise UnsupportedModel(f"{name} in four bits cannot be divided among processes; launch without --use_fsdp")
    needed = _weight_bytes(config, dtype, trust_remote_code, packed or four_bits)
    place: dict[str, Any] = {}
    free, kind = psutil.virtual_memory().available, "main"
    if shares is not None:  # each process has its own device of that type
        needed, place = needed // launched(), {"distributed_config": shares, "device_map": torch.device(device).type}
    if packed or four_bits:  # read where they stay
        place = {"device_map": {"": device}, **({} if packed else {"quantization_config": four_bit_config()})}
        if torch.device(device).type == "cuda":
            free, kind = torch.cuda.mem_get_info(torch.device(device))[0], "CUDA"
    check_memory(name, needed, free, kind)
    try:
        # Missing and misshapen tensors are let through here and reported below, all by name: transformers would only
        # warn of the missing ones, and fill them with random numbers.
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **place,
        )
    except Exception as error:
        if isinstance(error, OSError) and "safetensors" in str(error) and not Path(name).is_dir():
            raise ModelError(PICKLED.format(name=name)) from error
        raise cannot(f"the weights of {name}", error) from error
    _check_complete(name, found)
    differentiable(model)
    return model


def read_gguf(path: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """A model and its tokenizer from one GGUF file, unpacked into an ordinary model that can be trained and saved.

    Raises:
        ModelError: the gguf package is missing; the file is damaged, or of an architecture transformers cannot read.
        OutOfMemory: the unpacked weights need more memory than is free.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"reading {path.name} needs the gguf package: pip install gguf") from error
    place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    dtype = dtype or torch.float32
    try:
        header = gguf.GGUFReader(path)
        numbers = sum(int(tensor.n_elements) for tensor in header.tensors)
        splitter = header.get_field("tokenizer.ggml.pre")
        check_memory(path.name, numbers * dtype.itemsize, psutil.virtual_memory().available, "main")
        tokenizer = AutoTokenizer.from_pretrained(**place)
        packed, found = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **_unpacked()
        )
    except OutOfMemory:
        raise
    except Exception as error:
        raise cannot(str(path), error) from error
    _check_complete(str(path), found)
    if splitter is not None and splitter.contents() in _SINGLE_DIGITS:
        _split_digits(tokenizer)
    return _plain(packed, str(path)), tokenizer


def read_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model.

    Raises: ModelError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise cannot(f"the tokenizer of {name}", error) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes up an empty one where files are missing
        raise ModelError(f"{name} comes without a tokenizer; save one there with tokenizer.save_pretrained(...)")
    return tokenizer


def check_memory(name: str, needed: int, free: int, kind: str) -> None:
    """Refuse to start what cannot end well.

    Args:
        name: of the model.
        needed: bytes its weights take.
        free: bytes there are.
        kind: of memory, for the message.
    """
    if needed > free:
        raise OutOfMemory(
            f"the weights of {name} take {needed / 1e9:.3g} GB of {kind} memory but {free / 1e9:.3g} GB are free; "
            f"take dtype bfloat16, a smaller model or a larger machine"
        )


def _check_causal(name: str, config: Any, trust_remote_code: bool) -> None:
    remote = trust_remote_code and "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
    if remote:
        return
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ModelError(f"{name} is a {config.model_type} model, not a causal language model")
    wanted = mapping[type(config)].__name__
    if config.architectures and wanted not in config.architectures:
        raise ModelError(
            f"{name} is a {' or '.join(config.architectures)}, not a causal language model; expected a {wanted}"
        )


def _check_pickle(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            raise ModelError(PICKLED.format(name=name))
        raise ModelError(f"{name} holds no weights; expected model.safetensors")


def _check_complete(name: str, found: dict[str, Any]) -> None:
    if found["mismatched_keys"]:
        key, there, expected = sorted(found["mismatched_keys"])[0]
        raise ModelError(
            f"the weights of {name} do not fit its configuration: {key} is {tuple(there)}, expected {tuple(expected)}"
            f" ({len(found['mismatched_keys'])} such tensors)"
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(f"the weights of {name} are incomplete: {missing[0]} is missing ({len(missing)} such tensors)")


def _weight_bytes(config: Any, dtype: torch.dtype | None, trust_remote_code: bool, four_bits: bool) -> int:
    """Of the weights in memory; in four bits half a byte for each of a linear layer, and an eighth more for scales."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=trust_remote_code
        )
    whole = int(sum(p.numel() * p.element_size() for p in model.parameters()))
    if not four_bits:
        return whole
    linear = {
        id(m.weight): m.weight
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
    }
    return whole - int(sum(p.numel() * p.element_size() - p.numel() * 9 // 16 for p in linear.values()))


def _unpacked() -> dict[str, Any]:
    """Ask transformers to unpack GGUF blocks; releases without this setting always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _plain(packed: Any, name: str) -> Any:
    """The same model without its mark "quantized with gguf", which forbids training and saving."""
    config = copy.deepcopy(packed.config)
    vars(config).pop("quantization_config", None)
    config.name_or_path = name
    with torch.device("meta"):
        plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict(), assign=True)
    for place, buffer in packed.named_buffers():  # those that are not part of the state are still on no device
        module, _, leaf = place.rpartition(".")
        plain.get_submodule(module).register_buffer(leaf, buffer, persistent=False)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    return plain


def _split_digits(tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
