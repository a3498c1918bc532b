"""Open what the user named: hub ids, files, folders, and the embedded `demo:` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiltmeter import demo
from tiltmeter.lm.model import Loaded, load
from tiltmeter.lm.rows import RowSet, digest_of, read_rows
from tiltmeter.lm.safety import COMPLIANCE_OPENING, REFUSAL_OPENING


@dataclass(frozen=True)
class Opened:
    """A loaded model and how it would open a refusal and a compliant answer."""

    loaded: Loaded
    refusal_opening: str = REFUSAL_OPENING
    compliance_opening: str = COMPLIANCE_OPENING


def open_model(
    name: str,
    *,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Opened:
    """Load a hub id, a folder, a GGUF file, an adapter folder, or a `demo:` model.

    Raises:
        ModelError: it cannot be loaded.
        MissingDemoData: a `demo:` model was never fetched and cannot be now.
    """
    if not name.startswith(demo.PREFIX):
        loaded = load(name, adapter=adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return Opened(loaded)
    info = demo.model(name)
    extra = Path(adapter) if adapter is not None else info.adapter
    loaded = load(info.folder, adapter=extra, dtype=dtype, device=device)
    named = Loaded(loaded.model, loaded.tokenizer, name, loaded.digest, loaded.context)
    return Opened(named, info.refusal_opening, info.compliance_opening)


def open_rows(name: str, split: str = "train") -> RowSet:
    """Read a file, a hub id, or a `demo:` data set.

    Raises:
        DataError: it cannot be read.
        MissingDemoData: a `demo:` set was never fetched and cannot be now.
    """
    if not name.startswith(demo.PREFIX):
        return read_rows(name, split)
    rows = tuple(demo.rows(name))
    return RowSet(name, rows, digest_of(rows))
