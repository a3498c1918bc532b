"""One line on the terminal during a long step."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Show `message` while the block runs, in place of whatever libraries write to standard error.

    Only a terminal shows it. Errors are raised as ever; progress bars of transformers are swallowed.
    """
    with Console(file=sys.stderr).status(message), contextlib.redirect_stderr(io.StringIO()):
        yield
