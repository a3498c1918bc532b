"""Freed blocks go back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
import torch

from tiltmeter.lm import memory


def test_small_blocks_are_given_back() -> None:
    """Every second block stays, so that the heap cannot shrink at its end by itself."""
    process = psutil.Process(os.getpid())
    blocks = [torch.ones(16_000) for _ in range(4000)]  # 64 kB each, 256 MB in all
    kept = blocks[-1]
    before = process.memory_info().rss
    del blocks
    memory.release()
    if memory._trim() is not None:  # elsewhere the allocator decides
        assert before - process.memory_info().rss > 150e6
    assert float(kept.sum()) == 16_000


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    memory._trim.cache_clear()
    memory.release()
    assert memory._trim() is None
    memory._trim.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library elsewhere has no such limit")
def test_blocks_of_megabytes_are_given_back_when_they_are_freed() -> None:
    """In a process of its own: once a block of 16 MB was freed, the C library would keep smaller ones below others."""
    code = (
        "import sys, psutil, torch\n"
        "from tiltmeter.lm.memory import map_blocks\n"
        "if sys.argv[1] == 'mapped': map_blocks(2**18)\n"
        "torch.ones(4_000_000)\n"  # freed at once: the limit goes up to 16 MB
        "blocks = [torch.ones(500_000) for _ in range(200)]\n"  # 2 MB each, every second of which stays
        "kept = blocks[1::2]\n"
        "del blocks\n"
        "print(psutil.Process().memory_info().rss)"
    )
    held = {}
    for kind in ("mapped", "as it comes"):
        done = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, check=True)
        held[kind] = int(done.stdout)
    assert held["as it comes"] - held["mapped"] > 100e6
