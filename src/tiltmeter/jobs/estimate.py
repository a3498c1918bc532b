"""What an assessment will cost, told before it begins."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import psutil

from tiltmeter.geometry.objective import Passes
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject
from tiltmeter.jobs.tuning import Tuning

#: Vectors of n parameters alive at the fullest moment, besides what the subject holds: mean, spread, and for a Hessian
#: product its direction, the displaced parameters, the result and an earlier result.
VECTORS = 6

#: Activation memory of one token through one layer of width d, in units of 4 d bytes (measured on a 135 M Llama: 1.1 GB
#: for 512 tokens, logits apart).
ACTIVATIONS = 24


@dataclass(frozen=True)
class Estimate:
    """Cost of what is still to be done.

    Attributes:
        passes: planned, in tokens.
        fb_equivalents: forward+backward passes over all data (answers, openings and tuning sample once each).
        seconds: at the speed of one forward+backward pass timed now; None if nothing was timed.
        memory_gb: expected peak of the process.
    """

    passes: Passes
    fb_equivalents: float
    seconds: float | None
    memory_gb: float


def plan(subject: Subject, tuning: Tuning, recipe: Recipe, options: Options) -> Passes:
    """Passes of `measure.measure`, in tokens, by the same kinds as they will be counted."""
    answers, openings, rows = subject.divergence.work, subject.negative_margin.work, tuning.objective.work
    groups = min(options.groups, tuning.batches.shape[0])
    krylov = options.krylov if recipe.optimizer == "sgd" else 0
    planned = Passes()
    points = len(recipe.clock().grid(options.grid)) * (3 if krylov else 2) + 1
    planned.add("forward", (answers + openings) * points + rows)
    planned.add("forward_backward", 2 * rows)
    directions = 1 + (groups if recipe.optimizer != "sgd" or groups < 2 else 0)
    if groups > 1:
        directions += groups + 2
        if subject.hessian == "exact":
            planned.add("hvp", rows)
            planned.add("path", answers)
        else:
            planned.add("forward_backward", 2 * rows)
            directions += 2
    if krylov:
        kind, cost = ("hvp", 1) if subject.hessian == "exact" else ("forward_backward", 2)
        planned.add(kind, cost * krylov * rows)
    # projecting on the subspace: one JVP of its scores, unless its directions are held as they are
    projected = subject.score is not None and subject.sensitivity is not None
    planned.add("jvp", directions * answers + (subject.score.work if projected and subject.score else 0))
    return planned


def data_tokens(subject: Subject, tuning: Tuning) -> int:
    """Tokens of all data, each sequence once."""
    return subject.divergence.work + subject.negative_margin.work + tuning.objective.work


def time_token(subject: Subject) -> float:
    """Seconds of one forward and backward pass, per token; times the gradient of one micro-batch of openings."""
    members, _ = subject.negative_margin.chunks[0]
    weights = subject.anchor_margin.new_zeros(subject.safety.m)
    weights[subject.negative_margin.owner[members]] = 1.0
    subject.negative_margin.gradient(weights)  # the first pass of a process is slower
    begin = time.perf_counter()
    tokens = subject.forward.passes.tokens["forward_backward"]
    subject.negative_margin.gradient(weights)
    return (time.perf_counter() - begin) / (subject.forward.passes.tokens["forward_backward"] - tokens)


def estimate(subject: Subject, tuning: Tuning, recipe: Recipe, options: Options) -> Estimate:
    """Estimate passes, time and memory of assessing one tuning set.

    Cost: two forward+backward passes over one micro-batch, to learn the speed of this machine.
    """
    planned = plan(subject, tuning, recipe, options)
    tokens = data_tokens(subject, tuning)
    equivalents = planned.equivalents(tokens)
    seconds = equivalents * tokens * time_token(subject)
    return Estimate(planned, equivalents, seconds, memory_estimate(subject, tuning, options))


def memory_estimate(subject: Subject, tuning: Tuning, options: Options) -> float:
    """Expected peak memory of the process, GB."""
    config = subject.loaded.model.config
    n = subject.forward.space.size
    group_bytes = 2 if n > 2**25 else 4
    vectors = 4 * n * VECTORS + group_bytes * n * options.groups
    layer = 4 * config.hidden_size * config.num_hidden_layers * ACTIVATIONS
    graph = 3 if subject.hessian == "exact" else 1
    logits = 4 * config.vocab_size * 4
    most = max(batch.tokens.numel() for _, batch in (*subject.divergence.inner.chunks, *tuning.objective.chunks))
    activations = most * (layer * graph + logits)
    return float(resident_bytes() + vectors + activations) / 1e9


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_gb() -> float:
    """Largest memory this process has had, GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
