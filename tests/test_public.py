"""The public names, sorted, and nothing else."""

from __future__ import annotations

import importlib

import pytest

import tiltmeter


def test_public_names_are_a_sorted_list_and_exist():
    assert list(tiltmeter.__all__) == sorted(tiltmeter.__all__)
    for name in tiltmeter.__all__:
        getattr(tiltmeter, name)


def test_public_names_are_these():
    assert set(tiltmeter.__all__) == {
        "Adam",
        "Assessment",
        "Audit",
        "AuditOptions",
        "Budgets",
        "Clock",
        "EvaluateOptions",
        "Evaluation",
        "FunctionObjective",
        "GuardCallback",
        "InputError",
        "Lora",
        "Measurement",
        "Objective",
        "Options",
        "ParameterSpace",
        "Ranking",
        "Recipe",
        "Sensitivity",
        "Sgd",
        "TheoryCheck",
        "TiltmeterError",
        "Track",
        "Tracker",
        "TrackerCallback",
        "TrackerOptions",
        "Validation",
        "assess",
        "audit",
        "evaluate",
        "finetune",
        "guard_callback",
        "open_model",
        "rank",
        "read_plan",
        "read_recipe",
        "run_theory",
        "validate",
        "with_lora",
    }


def test_importing_the_package_is_light():
    """`import tiltmeter` must not load torch: the command line answers --help at once."""
    import subprocess
    import sys

    code = "import sys, tiltmeter, tiltmeter.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_unknown_names_are_refused():
    module = importlib.import_module("tiltmeter")
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018
