"""Two processes of one job, without a launcher: what a test needs of them is imported once, then the process forks.

Run as a script, it is the process that forks: importing takes longer than most of what is tested, and a process that
has run a backward pass may not fork.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    returncode: int
    stderr: str


def two(test_file: str, jobs: dict[str, list[str]], folder: Path, timeout: float = 400) -> dict[str, list[Ended]]:
    """Run functions of a test file in two processes each, one after the other.

    Args:
        test_file: `__file__` of the test.
        jobs: name of a function -> its arguments; it finds its rank in the environment.
        folder: what the processes say goes there.
        timeout: for all of them, seconds.

    Returns: name -> how the first and the second ended.
    """
    room = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, test_file, json.dumps(jobs), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout, env=room, check=True)
    codes: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return {
        name: [Ended(code, (folder / f"{name}-{rank}.err").read_text()) for rank, code in enumerate(held)]
        for name, held in codes.items()
    }


def free_port() -> str:
    """A port nobody listens at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def _rank(module: str, name: str, given: list[str], rank: int, port: str, folder: str) -> None:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(own, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.dup2(os.open(f"{folder}/{name}-{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    code = 1
    try:
        getattr(sys.modules[module], name)(*given)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _main(test_file: str, jobs: dict[str, list[str]], folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    path = Path(test_file)
    sys.path.insert(0, str(path.parent))
    importlib.import_module(path.stem)
    codes: dict[str, list[int]] = {}
    for name, given in jobs.items():
        port, children = free_port(), []
        for rank in range(2):
            child = os.fork()
            if not child:
                _rank(path.stem, name, given, rank, port, folder)
            children.append(child)
        codes[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
