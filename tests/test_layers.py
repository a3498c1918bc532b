"""Imports point one way: cli -> report -> jobs -> {predictors, guards, tracking, lm, store, demo} -> geometry."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "tiltmeter"

#: What each part may import besides itself.
ALLOWED = {
    "errors": set(),
    "geometry": {"errors"},
    "store": {"errors"},
    "demo": {"errors", "lm", "store"},
    "lm": {"geometry", "errors"},
    "predictors": {"geometry", "lm", "errors"},
    "guards": {"geometry", "lm", "errors"},
    "tracking": {"geometry", "lm", "store", "errors"},
    "jobs": {"predictors", "guards", "tracking", "lm", "store", "demo", "geometry", "errors"},
    "report": {"store", "errors"},
    "commands": {"report", "jobs", "predictors", "guards", "tracking", "lm", "store", "demo", "geometry", "errors"},
    "commands_finetune": {
        "commands",
        "report",
        "jobs",
        "predictors",
        "guards",
        "tracking",
        "lm",
        "store",
        "demo",
        "geometry",
        "errors",
    },
    "commands_evaluate": {"commands", "report", "jobs", "lm", "store", "errors"},
    "commands_catalogue": {"demo"},
    "commands_demo": {"commands", "report", "jobs"},
    "commands_theory": {"jobs", "store"},
    "commands_report": {"report", "store"},
    "commands_rank": {"commands", "report", "jobs", "store", "errors"},
    "commands_validate": {"commands", "report", "jobs", "errors"},
    "__main__": {"cli"},
    "cli": {
        "commands",
        "commands_catalogue",
        "commands_demo",
        "commands_evaluate",
        "commands_finetune",
        "commands_rank",
        "commands_report",
        "commands_theory",
        "commands_validate",
        "errors",
    },
}

#: Packages that exactly one file, or one folder, may import.
ONLY_IN = {
    "torch.func.functional_call": "lm/forward.py",
    "matplotlib": "report/plots.py",
    "typer": "cli.py",
    "transformers.Trainer": "jobs/training.py",
    "trl": "jobs/training.py",
    "ray": "jobs/validation_workers.py",
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_one_way():
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in _imports(path):
            pieces = name.split(".")
            if pieces[0] != "tiltmeter" or len(pieces) < 2 or pieces[1] == "__version__":
                continue
            assert pieces[1] in ALLOWED[part] | {part}, f"{path.relative_to(SOURCE)} imports {name}"


def test_some_packages_are_imported_in_one_place_only():
    for path in SOURCE.rglob("*.py"):
        place = str(path.relative_to(SOURCE))
        for name in _imports(path):
            for package, home in ONLY_IN.items():
                if name == package or name.startswith(package + "."):
                    assert place == home, f"{place} imports {name}, which belongs in {home}"
