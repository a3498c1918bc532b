"""The tree drawn in the docstring of `tiltmeter.errors` is the real one."""

from __future__ import annotations

import inspect
import re

from tiltmeter import errors
from tiltmeter.errors import TiltmeterError


def drawn() -> dict[str, tuple[str | None, int]]:
    """Class name -> name of its parent and exit code, as drawn; a class without a code has its parent's."""
    out: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    for line in inspect.getdoc(errors).splitlines():
        match = re.match(r"^([\s│├└─]*)(\w+Error|[A-Z]\w+)(?:\s{2,}(.*))?$", line)
        if not match or not line.startswith("    "):
            continue
        depth = (len(match[1]) - 4) // 4
        del path[depth:]
        parent = path[-1] if path else None
        code = re.search(r"exit code (\d)", match[3] or "")
        out[match[2]] = (parent, int(code[1]) if code else out[parent][1] if parent else -1)
        path.append(match[2])
    return out


def test_the_tree_is_drawn_as_it_is() -> None:
    classes = {
        name: (None if kind is TiltmeterError else kind.__base__.__name__, kind.exit_code)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
    }
    assert len(classes) == 15
    assert drawn() == classes


def test_every_class_says_what_it_is_for() -> None:
    assert all(inspect.getdoc(getattr(errors, name)) for name in drawn())
