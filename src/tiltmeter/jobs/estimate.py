"""What an assessment will cost, told before it begins."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass

from tiltmeter.errors import OutOfMemory
from tiltmeter.geometry.objective import Passes
from tiltmeter.geometry.rehearsal import Rehearsal
from tiltmeter.jobs.memory import memory_now, token_gb, vectors_gb
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import Options, Subject
from tiltmeter.jobs.tuning import Tuning
from tiltmeter.lm.divergence import tangents_at_once


@dataclass(frozen=True)
class Estimate:
    """Cost of what is still to be done.

    Attributes:
        passes: planned, in tokens.
        fb_equivalents: forward+backward passes over all data (answers, openings and tuning sample once each).
        seconds: at the speed of the forward+backward pass timed with the subject; None if none was.
        memory_gb: expected peak of the process (on a GPU: of the device).
        free_gb: what is free besides what is held already.
        held_gb: what is held already.
    """

    passes: Passes
    fb_equivalents: float
    seconds: float | None
    memory_gb: float
    free_gb: float = math.inf
    held_gb: float = 0.0

    def check_fit(self) -> None:
        """Refuse to start what cannot end well; an estimate is given a quarter of leeway.

        Raises:
            OutOfMemory: the job is expected to need much more than there is.
        """
        needed = self.memory_gb - self.held_gb
        if needed > 1.25 * self.free_gb:
            raise OutOfMemory(
                f"the assessment is expected to need {needed:.3g} GB besides the model, but {self.free_gb:.3g} GB are "
                "free. Assess with LoRA (--lora-r), fewer or shorter rows (--max-tuning, --max-length), smaller "
                "micro-batches (--memory), a smaller model or a larger machine."
            )


def plan(subject: Subject, tuning: Tuning, recipe: Recipe, options: Options) -> Passes:
    """Passes of `measure.measure`, in tokens, by the same kinds as they will be counted."""
    answers, rows = subject.divergence.work, tuning.objective.work
    groups = min(options.groups, tuning.batches.shape[0])
    krylov = options.krylov if recipe.optimizer == "sgd" else 0
    planned = Passes()
    clock = recipe.clock()
    grid = clock.grid(options.grid)
    fewer, most = options.both_looks(recipe.steps)
    only = options.left_out is not None
    first = Rehearsal(recipe.metric, clock, fewer).stretches()[0][1]
    straight = sum(step <= first for step in grid) if only else len(grid) + 1  # and a random displacement
    points = straight + len(grid) * (bool(krylov) + options.curved)
    gradients = (1 + options.curved) * rows
    for looks, before in (((fewer, most - 1),) if fewer < most else ()) + ((most, 0),):
        stretches = Rehearsal(recipe.metric, clock, looks).stretches()
        later = sum(step > stretches[0][1] for step in grid)
        points += later
        if later:
            gradients += sum(tuning.look_work(before + i) for i in range(len(stretches) - 1))
    planned.add("forward", subject.standing.work * points)
    planned.add("forward_backward", gradients)
    if options.screen:
        return planned
    planned.add("jvp", rows)
    # Fisher forms: the groups as they are and as Adam makes them, and H g twice
    tried = False  # how Hessian products are best taken
    forms = [groups, *([groups] if recipe.optimizer != "sgd" and not only else [])]
    if groups > 1 and options.coupling and not only:
        forms.append(2)
        if subject.hessian == "exact":
            planned.add("hvp", rows)
            planned.add("path", answers)
            tried = True
        else:
            planned.add("forward_backward", 2 * rows)
            forms += [1, 1]
    if krylov:
        kind, cost = ("hvp", 1) if subject.hessian == "exact" else ("forward_backward", 2)
        planned.add(kind, cost * krylov * rows)
        tried |= subject.hessian == "exact"
    if tried:
        planned.add("hvp", tuning.objective.trial)
    # projecting on the subspace: one JVP of its scores, unless its directions are held as they are
    projected = subject.score is not None and subject.sensitivity is not None
    planned.add("jvp", subject.score.work if projected and subject.score else 0)
    at_once = tangents_at_once(subject.forward.whole.size)
    joint = sum(math.ceil(k / at_once) for k in forms)
    planned.add("jvp", joint * answers)
    planned.add("tangent", (sum(forms) - joint) * answers)
    return planned


def data_tokens(subject: Subject, tuning: Tuning) -> int:
    """Tokens of all data, each sequence once."""
    return subject.divergence.work + subject.negative_margin.work + tuning.objective.work


def estimate(subject: Subject, tuning: Tuning, recipe: Recipe, options: Options) -> Estimate:
    """Estimate passes, time and memory of assessing one tuning set, at the speed of the margin's gradient."""
    planned = plan(subject, tuning, recipe, options)
    tokens = data_tokens(subject, tuning)
    equivalents = planned.equivalents(tokens)
    speed = subject.token_seconds
    seconds = None if math.isnan(speed) else equivalents * tokens * speed
    held, free = memory_now(subject.forward.device)
    return Estimate(planned, equivalents, seconds, held + memory_needed(subject, tuning, options), free, held)


def memory_needed(subject: Subject, tuning: Tuning, options: Options) -> float:
    """Memory that `measure.measure` is expected to take at its fullest moment, besides what is held already, GB."""
    most = max(subject.divergence.largest, tuning.objective.largest)
    each = token_gb(subject.loaded.model.config, subject.hessian == "exact")
    return vectors_gb(subject.forward.space.size, 1 if options.screen else options.groups) + most * each


def peak_gb() -> float:
    """Largest memory this process has had, GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
