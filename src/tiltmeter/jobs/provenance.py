"""Where a result comes from: versions, machine, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

import tiltmeter

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scipy")


def provenance(device: str) -> dict[str, Any]:
    """Date, versions and machine, as plain values."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tiltmeter": tiltmeter.__version__,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count() or 1,
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "device": device,
        },
    }


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
