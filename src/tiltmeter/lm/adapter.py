"""PEFT adapters: found, and merged into their base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiltmeter.errors import ModelError
from tiltmeter.lm.checkpoint import cannot

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

#: PEFT's name of the one adapter we load; it stands in the name of every parameter of it.
_ADAPTER = "default"


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the warning that peft asks transformers for an attribute that has a new name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def adapter_folder(name: str) -> Path | None:
    """The folder of an adapter, downloaded if it is on the hub; None if the name is not one of an adapter."""
    folder = Path(name).expanduser()
    if folder.exists():
        return folder if (folder / CONFIG).is_file() else None
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name) is None:
            return None
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "*token*", "*.jinja", "*.model", "*.txt"]))
    except Exception:  # not to be reached, or not on the hub at all: reading the model will say so, and better
        return None


def base_of(folder: Path) -> str:
    """The base that an adapter names; a relative path may start at the adapter, or where we are.

    Raises: ModelError: the adapter names none, or itself.
    """
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise cannot(str(folder / CONFIG), error) from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"the adapter {folder} does not name its base; give the base as the model, and it as adapter")
    for place in (folder / base, Path(base).expanduser()):
        if place.exists():
            if place.resolve() == folder.resolve():
                raise ModelError(f"the adapter {folder} names itself as its base")
            return str(place)
    return base


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved with the adapter."""
    return (folder / "tokenizer_config.json").is_file()


def merge(base: Any, folder: Path) -> Any:
    """Add an adapter to the weights of its base.

    Args:
        base: a plain model in float32; taken over.
        folder: of the adapter.

    Returns: a plain model in float32.

    Raises: ModelError: the adapter's weights are missing, pickled, damaged, do not fit the base, or cannot be merged.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"the adapter {folder} has no {WEIGHTS}; pickled weights (adapter_model.bin) are not read: load it with "
            f"PEFT, if you trust its source, and save it again"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with quiet():
            wrapped = PeftModel(base, config, adapter_name=_ADAPTER)
        result = set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"), _ADAPTER)
    except Exception as error:  # PEFT has no error class of its own
        raise cannot(f"the adapter {folder} on {base.name_or_path}", error) from error
    missing = [key for key in result.missing_keys if _ADAPTER in key.split(".")]
    strays = missing or list(result.unexpected_keys)
    if strays:
        what = "misses" if missing else "has, but its base has no place for,"
        raise ModelError(f"the adapter {folder} does not fit its base: it {what} {strays[0]} ({len(strays)} in all)")
    try:
        return wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise cannot(f"the adapter {folder}: merging it into the weights", error) from error
