"""Predictors by name, ours first."""

from __future__ import annotations

from tiltmeter.predictors.canary import canary_kl, canary_length, canary_margin
from tiltmeter.predictors.commutator import commutator
from tiltmeter.predictors.compliance import compliance_projection
from tiltmeter.predictors.contract import Predictor
from tiltmeter.predictors.gamma_full import gamma_full
from tiltmeter.predictors.gamma_hat import gamma_hat
from tiltmeter.predictors.gradient_matching import gradient_matching
from tiltmeter.predictors.gradient_norm import gradient_norm
from tiltmeter.predictors.initial_loss import initial_loss
from tiltmeter.predictors.krylov import krylov_kl, krylov_margin
from tiltmeter.predictors.overlap import initial_overlap
from tiltmeter.predictors.overlap_cosine import overlap_cosine
from tiltmeter.predictors.path import (
    curved_kl,
    curved_margin,
    linear_kl,
    linear_margin,
    rehearsed_kl,
    rehearsed_margin,
)
from tiltmeter.predictors.polynomial import polynomial
from tiltmeter.predictors.random_direction import random_direction
from tiltmeter.predictors.random_subspace import random_subspace
from tiltmeter.predictors.similarity import representation_similarity
from tiltmeter.predictors.steps_rate import steps_times_rate

#: Predictors that an assessment has paid for already.
MEASURED: dict[str, Predictor] = {
    "rehearsal_margin": rehearsed_margin,
    "rehearsal_kl": rehearsed_kl,
    "curved_margin": curved_margin,
    "curved_kl": curved_kl,
    "linear_margin": linear_margin,
    "linear_kl": linear_kl,
    "krylov_margin": krylov_margin,
    "krylov_kl": krylov_kl,
    "polynomial": polynomial,
    "gamma_full": gamma_full,
    "gamma_hat": gamma_hat,
    "initial_overlap": initial_overlap,
    "overlap_cosine": overlap_cosine,
    "gradient_norm": gradient_norm,
    "initial_loss": initial_loss,
    "steps_times_rate": steps_times_rate,
    "random_direction": random_direction,
}

#: All predictors.
PREDICTORS: dict[str, Predictor] = {
    "canary_margin": canary_margin,
    "canary_kl": canary_kl,
    **MEASURED,
    "canary_length": canary_length,
    "commutator": commutator,
    "gradient_matching": gradient_matching,
    "representation_similarity": representation_similarity,
    "compliance_projection": compliance_projection,
    "random_subspace": random_subspace,
}

#: Those that are ours: forecasts of the margin or the KL itself, in their own units.
OURS = (
    "rehearsal_margin",
    "rehearsal_kl",
    "curved_margin",
    "curved_kl",
    "linear_margin",
    "linear_kl",
    "canary_margin",
    "canary_kl",
)
