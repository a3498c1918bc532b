"""Freed blocks go back to the system."""

from __future__ import annotations

import os
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
