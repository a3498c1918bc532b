"""Predict, watch and prevent the collapse of safety alignment when an open-weight language model is fine-tuned.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tiltmeter.errors import InputError, TiltmeterError
    from tiltmeter.geometry.clock import Clock
    from tiltmeter.geometry.metric import Adam, Sgd
    from tiltmeter.geometry.objective import FunctionObjective, Objective
    from tiltmeter.geometry.sensitivity import Sensitivity
    from tiltmeter.geometry.space import ParameterSpace
    from tiltmeter.guards.callback import GuardCallback
    from tiltmeter.jobs.assess import Assessment, assess
    from tiltmeter.jobs.audit import Audit, AuditOptions, audit
    from tiltmeter.jobs.evaluate import EvaluateOptions, Evaluation, evaluate
    from tiltmeter.jobs.finetune import finetune
    from tiltmeter.jobs.guarding import guard_callback
    from tiltmeter.jobs.inputs import open_model
    from tiltmeter.jobs.rank import Ranking, rank
    from tiltmeter.jobs.recipe import Lora, Recipe, read_recipe
    from tiltmeter.jobs.subject import Options, with_lora
    from tiltmeter.jobs.theory import TheoryCheck, run_theory
    from tiltmeter.jobs.track import Track
    from tiltmeter.jobs.validate import Validation, validate
    from tiltmeter.jobs.validation_plan import read_plan
    from tiltmeter.lm.measurement import Measurement
    from tiltmeter.tracking.alarm import Budgets
    from tiltmeter.tracking.anchor import TrackerOptions
    from tiltmeter.tracking.callback import TrackerCallback
    from tiltmeter.tracking.tracker import Tracker

#: Public name -> the module that defines it.
_HOMES = {
    "Adam": "geometry.metric",
    "Assessment": "jobs.assess",
    "Audit": "jobs.audit",
    "AuditOptions": "jobs.audit",
    "Budgets": "tracking.alarm",
    "Clock": "geometry.clock",
    "EvaluateOptions": "jobs.evaluate",
    "Evaluation": "jobs.evaluate",
    "FunctionObjective": "geometry.objective",
    "GuardCallback": "guards.callback",
    "InputError": "errors",
    "Lora": "jobs.recipe",
    "Measurement": "lm.measurement",
    "Objective": "geometry.objective",
    "Options": "jobs.subject",
    "ParameterSpace": "geometry.space",
    "Ranking": "jobs.rank",
    "Recipe": "jobs.recipe",
    "Sensitivity": "geometry.sensitivity",
    "Sgd": "geometry.metric",
    "TheoryCheck": "jobs.theory",
    "TiltmeterError": "errors",
    "Track": "jobs.track",
    "Tracker": "tracking.tracker",
    "TrackerCallback": "tracking.callback",
    "TrackerOptions": "tracking.anchor",
    "Validation": "jobs.validate",
    "assess": "jobs.assess",
    "audit": "jobs.audit",
    "evaluate": "jobs.evaluate",
    "finetune": "jobs.finetune",
    "guard_callback": "jobs.guarding",
    "open_model": "jobs.inputs",
    "rank": "jobs.rank",
    "read_plan": "jobs.validation_plan",
    "read_recipe": "jobs.recipe",
    "run_theory": "jobs.theory",
    "validate": "jobs.validate",
    "with_lora": "jobs.subject",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
