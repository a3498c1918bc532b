"""Memory of a long job: given back between its stages, and smaller micro-batches where it runs out."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import sys
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import psutil
import torch

#: Growth that is worth a walk over all objects, bytes.
WORTHWHILE = 2**26

#: mallopt's name for the least size of a block that is mapped on its own.
_M_MMAP_THRESHOLD = -3

#: What was held after the last release.
_after = [0]

logger = logging.getLogger("tiltmeter")

P = ParamSpec("P")
T = TypeVar("T")


class Shrinkable(Protocol):
    """Something that works in micro-batches."""

    def halve(self) -> bool:
        """Make the largest micro-batches half as large; False if this is not the one to do so."""
        ...


S = TypeVar("S", bound=Shrinkable)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def within_memory(held: Shrinkable, work: Callable[[], T]) -> T:
    """Do some work; where memory runs out, do it again in smaller micro-batches, which are kept.

    What was done of the work so far is lost, so that nothing is counted twice.

    Raises:
        OutOfMemory: by `held`, when its micro-batches cannot become smaller.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not held.halve():
                raise
        release(always=True)  # out here, because the error holds on to everything that the work had made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def shrinking(product: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method that is done `within_memory` of its object."""

    @functools.wraps(product)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return within_memory(self, lambda: product(self, *args, **kwargs))

    return run


def release(*, always: bool = False) -> None:
    """Give freed memory back to the system.

    A backward pass frees thousands of blocks that are too small to be mapped on their own; the C library keeps them,
    and the next stage, whose blocks have other sizes, grows the process instead of using them again. On a
    135 M-parameter model that was 1.8 GB after the Gram matrix.

    Args:
        always: also where the process has hardly grown since the last time.

    Cost: a walk over all objects of the process (half a second in one that has imported much) and the page faults of
        what is used again; so nothing is done while it has grown by less than `WORTHWHILE`.
    """
    if not always and held() < _after[0] + WORTHWHILE:
        return
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)
    _after[0] = held()


def map_blocks(least: int) -> None:
    """Have the C library map every block of at least so many bytes on its own, and give it back when it is freed.

    By itself it raises that limit to 32 MB as such blocks are freed, and keeps what lies below. Under FSDP2, the
    blocks that layers are gathered into then add up to a good part of the weights that were divided. Nothing outside
    Linux.

    Cost: page faults for every such block; a few per cent of the time where blocks are of megabytes.
    """
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, least)
        except (OSError, AttributeError):
            logger.debug("this C library has no mallopt")


def held() -> int:
    """Memory of this process now, on the machine and on its GPUs, bytes."""
    out = int(psutil.Process().memory_info().rss)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        out += sum(torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count()))
    return out


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return trim
