"""A model that brings its own code along, as some on the hub do."""

from __future__ import annotations

import json
from pathlib import Path

#: Says that it has run by a file beside itself.
REMOTE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).parent.joinpath("has_run").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def bring_code(folder: Path) -> Path:
    """Make a model's folder one that brings its own code along."""
    # transformers knows code it has seen by its contents, and would not run it again
    (folder / "own_model.py").write_text(f"{REMOTE}\n# {folder}\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    return folder
