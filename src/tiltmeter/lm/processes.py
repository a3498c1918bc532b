"""The processes of one job: who they are, sums over them, and failures that all of them hear of."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from tiltmeter.errors import TiltmeterError


def launched() -> int:
    """Processes that the launcher of this one has started, whether they have met yet or not."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def speaks() -> bool:
    """Whether this process writes results and messages, told from the launcher's own variables."""
    return launched() == 1 or int(os.environ.get("RANK") or 0) == 0


def join(device: str = "auto") -> None:
    """Meet the other processes of `accelerate launch` or torchrun; nothing where there are none.

    Args:
        device: of the models; on "cpu" the processes talk over gloo.
    """
    if launched() > 1 and not dist.is_initialized():
        PartialState(cpu=True) if device == "cpu" else PartialState()


def processes() -> int:
    """How many processes work together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes() == 1 or dist.get_rank() == 0


def summed(product: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    """A product's sum over all processes; if it fails in one it fails in all.

    Args:
        product: of this process.
        shape: of the product, for a process where it fails.

    Raises:
        TiltmeterError: another process failed; says which.
    """
    failure: Exception | None = None
    value = torch.zeros(shape)
    try:
        value = product()
    except Exception as error:  # the others must hear of it before it ends this process
        failure = error
    device = _device(value)
    failed = torch.tensor(0 if failure is None else dist.get_rank() + 1, device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if int(failed):
        raise TiltmeterError(f"process {int(failed) - 1} failed; its own message says why. Mend that and run again.")
    there = value.to(device).contiguous()
    dist.all_reduce(there)
    return there.to(value.device)


def agreed(value: Tensor) -> Tensor:
    """The main process's tensor, in all of them: what a next step is chosen by must not differ in a last digit."""
    if processes() == 1:
        return value
    there = value.to(_device(value)).contiguous()
    dist.broadcast(there, 0)
    return there.to(value.device)


def least_of_all(number: int) -> int:
    """The smallest of the processes' numbers."""
    return -largest_of_all(-number)


def largest_of_all(number: int) -> int:
    """The largest of the processes' numbers."""
    if processes() == 1:
        return number
    held = torch.tensor(number)
    held = held.to(_device(held))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def together(work: Callable[[], None]) -> None:
    """Do something in the main process while the others wait; if it fails there, it fails in all.

    Raises:
        TiltmeterError: in the others, when the main process failed.
    """
    if processes() == 1:
        work()
        return

    def main_alone() -> Tensor:
        if is_main():
            work()
        return torch.zeros(1)

    summed(main_alone, (1,))


def everywhere(work: Callable[[], None]) -> None:
    """Do something in every process; if it fails in one it fails in all, and none goes on before all have done it.

    Raises:
        TiltmeterError: in the others, when one failed.
    """
    if processes() == 1:
        work()
        return

    def own() -> Tensor:
        work()
        return torch.zeros(1)

    summed(own, (1,))


def _device(value: Tensor) -> torch.device:
    """Where the process group can add: NCCL knows GPUs only."""
    if "nccl" in str(dist.get_backend()) and value.device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return value.device
