"""Everything `assess` measures, in order, on one subject and one tuning set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltmeter.errors import NumericalError
from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.forecast import PathValues, follow, joined, read_along
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.motion import (
    Coupling,
    Slope,
    measure_acceleration,
    measure_coupling,
    measure_krylov,
    narrow,
)
from tiltmeter.geometry.noise import Mixture, RowNoise, row_noise, unknown_noise
from tiltmeter.geometry.path import CurvedPath, KrylovPath, LinearPath, pieces
from tiltmeter.geometry.rehearsal import Rehearsal
from tiltmeter.geometry.space import dot, norm
from tiltmeter.jobs.recipe import Recipe
from tiltmeter.jobs.subject import SCREEN, Options, Report, Subject, random_direction
from tiltmeter.jobs.tuning import Tuning
from tiltmeter.lm.gram import per_layer_name
from tiltmeter.lm.memory import release

SINGLE = "a single tuning batch cannot tell curvature from noise; raise --max-tuning or lower the batch size"

NOT_ASKED = "left out (--no-coupling)"


@dataclass(frozen=True)
class Judge:
    """A rehearsal with fewer looks at the gradient.

    Attributes:
        values: margin and KL along it.
        noise: what its rows and the luck of one run's batches do to them.
    """

    values: PathValues
    noise: RowNoise


@dataclass(frozen=True)
class Findings:
    """Raw results of one assessment; curves are per safety prompt.

    Attributes:
        clock: learning rates of the recipe.
        covered: multiple of the initial direction covered after 0, 1, ... steps, flow time.
        tuning_loss: mean loss of the sample, nats per token; NaN in a screening.
        gradient_norm: of the mean gradient (after clipping).
        batch_norms: of every batch gradient before clipping.
        projected: norm of the gradient inside the safety subspace, or None.
        overlap_groups: g_i' F g_j per prompt for the groups of batches under gradient flow, [m, J, J]; None if J = 1.
        coupling: overlap and curvature coupling under gradient flow, or None with a reason.
        no_coupling: why not.
        no_overlap: why `overlap_groups` is None.
        random_overlap: overlap of a random direction of the gradient's norm; None if the forecast alone is asked for.
        ritz: Ritz values of the task Hessian, if a Krylov space was built.
        values: path name -> quantities at `steps`; the straight one only where more than the forecast is asked for.
        check: a rehearsal with half as many looks at the gradient; None where every step has a look of its own.
        look_rows: tuning rows in each look of the reported rehearsal; the whole sample in the first.
        random_walk: KL [m] and margin [m] after a random displacement as long as the forecast's; None likewise.
        length: norm of the forecast displacement at the end.
        noise: what the finite tuning sample and the luck of one run's batches do to margin and KL, on a straight path.
        rehearsed: the same on the rehearsal.
        layer_slopes: layer -> change of the mean margin per flow time, nats; empty for a screening.
    """

    clock: Clock
    covered: Tensor
    tuning_loss: float
    gradient_norm: float
    batch_norms: Tensor
    projected: float | None
    overlap_groups: Tensor | None
    no_overlap: str | None
    coupling: Coupling | None
    no_coupling: str | None
    random_overlap: float | None
    ritz: Tensor | None
    values: dict[str, PathValues]
    check: Judge | None
    look_rows: tuple[int, ...]
    random_walk: tuple[Tensor, Tensor] | None
    length: float
    noise: RowNoise
    rehearsed: RowNoise
    layer_slopes: dict[str, float]


def measure(subject: Subject, tuning: Tuning, recipe: Recipe, options: Options, report: Report) -> Findings:
    """Measure motion, coupling and forecast.

    Cost: a gradient of the tuning sample, one of a recipe's batch for each further look of both rehearsals, and one
    Hessian product; 2 groups + 4 directional passes over the answers; a forward pass over prompts, answers and openings
    for every grid step, and one for each rehearsal where it has left the straight path. Of the forecast alone: one
    gradient, those of the looks, `groups` directional passes, and no step of the straight path that neither rehearsal
    begins with. Of a screening: a gradient of a step's rows for each look, and a reading for every grid step.
    """
    clock, metric = recipe.clock(), recipe.metric
    report = _releasing(report)
    if options.screen:
        return _screened(subject, tuning, recipe, options, report)
    objective, divergence = tuning.objective, subject.divergence
    clip = recipe.max_grad_norm or None
    report("gradient of the tuning set")
    slope, size = _slope(tuning, clip, options.groups)
    random_overlap = None if subject.random_form is None else size * math.sqrt(subject.random_form)
    projected = None
    if subject.sensitivity is not None:
        projected = float(subject.sensitivity.coordinates(slope.mean).double().norm())
    report("curvature of the tuning loss")
    alone = len(slope.groups) < 2 or not options.coupling or options.left_out is not None
    acceleration = None if alone else measure_acceleration(objective, slope)
    report("overlap")
    # under SGD the interval of the KL is made of it
    overlap = None if options.left_out and isinstance(metric, Adam) else divergence.fisher_form(slope.groups)
    groups = list(slope.groups)
    slope = replace(
        slope, groups=()
    )  # as large as two copies of the model: turned into directions one by one, then freed
    losses, rows = _row_slopes(subject, tuning, metric, slope, clip)
    forms = _forms(subject, metric, slope, groups, overlap)
    report("curvature coupling")
    coupling = None if acceleration is None else measure_coupling(divergence, slope, acceleration, overlap)
    single = SINGLE if len(forms) == 1 else None
    del acceleration
    linear = LinearPath(metric, clock, slope, _decayed(subject, recipe))
    grid, covered = clock.grid(options.grid), metric.flow_time(clock)
    fewer, all_looks = options.both_looks(recipe.steps)
    report("straight path")
    straight = follow(linear, _straight_steps(linear, grid, fewer, options), subject.standing)[0]
    values = {} if options.left_out else {"linear": straight}
    ritz = None
    if options.krylov and isinstance(metric, Sgd):
        report("Krylov space of the task Hessian")
        krylov = measure_krylov(objective, slope, options.krylov)
        ritz = krylov.ritz()[0]
        values["krylov"] = follow(KrylovPath(metric, clock, krylov), grid, subject.standing)[0]
        del krylov
    if options.curved:
        report("curved path")
        values["curved"] = _curved(subject, tuning, linear, clip, grid)
    # what drives both first stretches waits in three digits: in a look memory is fullest
    slope = replace(slope, mean=narrow(slope.mean))
    linear = replace(linear, slope=slope)
    check = None
    if fewer < all_looks:
        report("rehearsal with few looks")
        few = _rehearse(subject, tuning, linear, fewer, all_looks - 1, recipe, straight, grid)
        check = few.values, few.mixture
        del few  # its end is as large as the model
    report("rehearsal")
    most = _rehearse(subject, tuning, linear, all_looks, 0, recipe, straight, grid)
    values["rehearsed"], look_rows, mixture = most.values, most.rows, most.mixture
    length, sample = norm(most.end), len(tuning.encoded.examples)
    layer_slopes = _layer_slopes(subject, most.end, float(covered[-1]))
    del most
    walk = None
    if options.left_out is None:
        walk = subject.standing(random_direction(subject.forward, length, options.seed))
    every = sample / len(forms), metric, clock, recipe.batch_size, sample, tuning.usable
    noise = row_noise(rows, forms, *every)
    return Findings(
        clock,
        covered,
        float(losses.mean()),
        size,
        slope.norms,
        projected,
        None if single else overlap,
        single or (options.left_out if overlap is None else None),
        coupling,
        None if coupling is not None else single or options.left_out or NOT_ASKED,
        random_overlap,
        ritz,
        values,
        None if check is None else Judge(check[0], replace(noise, path=check[1])),
        look_rows,
        walk,
        length,
        noise,
        replace(noise, path=mixture),
        layer_slopes,
    )


def _slope(tuning: Tuning, clip: float | None, groups: int) -> tuple[Slope, float]:
    """Gradients of the sample and the norm of their mean."""
    slope = tuning.slope(clip, None, groups)
    size = norm(slope.mean)
    if not 0 < size < math.inf:
        raise NumericalError(
            f"the gradient of the tuning loss has norm {size}; expected a positive number. "
            "Either nothing in the tuning set is supervised, or the model already predicts it with certainty."
        )
    return slope, size


def _screened(subject: Subject, tuning: Tuning, recipe: Recipe, options: Options, report: Report) -> Findings:
    """The rehearsal and nothing else: all that judges it is left out.

    Cost: a gradient of a step's rows for each look, and a reading of KL and margin for every grid step.
    """
    clock, metric, clip = recipe.clock(), recipe.metric, recipe.max_grad_norm or None
    report("gradient of the tuning set")
    slope, size = _slope(tuning, clip, 1)
    linear = LinearPath(metric, clock, replace(slope, mean=narrow(slope.mean), groups=()), _decayed(subject, recipe))
    grid, covered = clock.grid(options.grid), metric.flow_time(clock)
    looks = options.both_looks(recipe.steps)[1]
    early = [step for step in grid if step <= _first_turn(linear, looks)]
    straight = follow(linear, early, subject.standing)[0] if early else None
    report("rehearsal")
    most = _rehearse(subject, tuning, linear, looks, 0, recipe, straight, grid)
    noise = unknown_noise(metric, clock, recipe.batch_size, tuning.usable, most.mixture)
    return Findings(
        clock,
        covered,
        math.nan,
        size,
        slope.norms,
        None,
        None,
        SCREEN,
        None,
        SCREEN,
        None,
        None,
        {"rehearsed": most.values},
        None,
        most.rows,
        None,
        norm(most.end),
        noise,
        noise,
        {},
    )


def _releasing(report: Report) -> Report:
    """Give memory back to the system before every stage."""

    def begin(stage: str) -> None:
        release()
        report(stage)

    return begin


def _straight_steps(linear: LinearPath, grid: Sequence[int], looks: int, options: Options) -> Sequence[int]:
    """Steps at which the straight path is read: all, or, of the forecast alone, those before the first turn."""
    if options.left_out is None:
        return grid
    first = _first_turn(linear, looks)  # with fewer looks it is the longer one
    return [step for step in grid if step <= first]


def _first_turn(linear: LinearPath, looks: int) -> int:
    """Step after which a rehearsal leaves the straight path."""
    return Rehearsal(linear.metric, linear.clock, looks).stretches()[0][1]


def _curved(
    subject: Subject, tuning: Tuning, linear: LinearPath, clip: float | None, grid: Sequence[int]
) -> PathValues:
    """The curved path. Cost: a gradient of the sample, and a reading of KL and margin for every grid step."""
    probe_step = max(1, linear.clock.steps // 2)
    found = tuning.slope(clip, narrow(linear.displacement(probe_step)), 1)
    mean = narrow(found.mean)  # three digits are enough here
    path = CurvedPath(linear, replace(found, mean=mean, groups=(mean,)), probe_step)
    return follow(path, grid, subject.standing)[0]


@dataclass(frozen=True)
class _Rehearsed:
    """What came of a rehearsal.

    Attributes:
        values: KL and margin along it.
        rows: tuning rows in each look.
        mixture: which rows its path is made of.
        end: its last displacement [n].
    """

    values: PathValues
    rows: tuple[int, ...]
    mixture: Mixture
    end: Tensor


def _rehearse(
    subject: Subject,
    tuning: Tuning,
    linear: LinearPath,
    looks: int,
    before: int,
    recipe: Recipe,
    straight: PathValues | None,
    grid: Sequence[int],
) -> _Rehearsed:
    """A rehearsal whose first look is the anchor's.

    Args:
        subject: the safety side.
        tuning: the sample.
        linear: the straight path, which both follow until their second look.
        looks: how many.
        before: looks of another rehearsal that have had their rows already.
        recipe: of the run.
        straight: what was read along the straight path, in the first stretch at least; None where no step of the grid
            lies there.
        grid: steps to read at.

    Cost: a gradient of `rows_in_look` rows for every look but the first, a reading of KL and margin for every grid step
        after the first stretch.
    """
    path = Rehearsal(linear.metric, linear.clock, looks, linear.decayed)
    stretches = path.stretches()
    members = [range(len(tuning.encoded.examples)), *(tuning.members(before + i) for i in range(len(stretches) - 1))]
    rows, mixture = tuple(map(len, members)), path.mixture(members, tuning.distinct)
    later = [step for step in grid if step > stretches[0][1]]
    if straight is not None and not later:  # the anchor's gradient drives it all
        return _Rehearsed(straight, rows, mixture, linear.displacement(linear.clock.steps))

    def look(number: int, displacement: Tensor | None) -> Slope:
        if number == 0:
            return linear.slope
        return tuning.look(before + number - 1, recipe.max_grad_norm or None, displacement)

    values, end = read_along(path.walk(look, later), subject.standing)
    return _Rehearsed(values if straight is None else joined(straight, values), rows, mixture, end)


def _preconditioned(metric: Adam | Sgd, slope: Slope, vector: Tensor) -> Tensor:
    """D v [n] in the metric that all batches together give, in the dtype of v."""
    if isinstance(metric, Sgd):
        return vector
    out = torch.empty_like(vector)
    for part in pieces(vector):
        out[part] = (metric.preconditioner(slope.mean[part], slope.spread[part]) * vector[part]).to(vector.dtype)
    return out


def _row_slopes(
    subject: Subject, tuning: Tuning, metric: Adam | Sgd, slope: Slope, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Loss of each tuning row, and what it adds to the margin's slope beyond a row of its length; both [m], nats.

    A trainer's loss is a mean over tokens: a row of c tokens with slope s pulls by s - c (sum s / sum c). Clipping
    shortens every batch's pull; on average by the same share for all rows.

    Cost: one JVP of the tuning sample.
    """
    losses, pulled = tuning.objective.losses_and_slopes(_preconditioned(metric, slope, subject.margin_gradient))
    counts = torch.tensor([example.supervised for example in tuning.encoded.examples], dtype=torch.float64)
    kept = 1.0 if clip is None else float((clip / slope.norms).clamp_max(1.0).mean())
    return losses, kept * (pulled - counts * pulled.sum() / counts.sum())


def _forms(subject: Subject, metric: Adam | Sgd, slope: Slope, groups: list[Tensor], overlap: Tensor | None) -> Tensor:
    """Fisher forms [J, J] of the groups' directions in the optimiser's metric, mean over prompts; empties `groups`."""
    if isinstance(metric, Sgd) and overlap is not None:
        return overlap.mean(0)
    directions = []
    while groups:
        directions.append(_preconditioned(metric, slope, groups.pop(0)))
    return subject.divergence.fisher_form(directions).mean(0)


def _decayed(subject: Subject, recipe: Recipe) -> Tensor | None:
    """The parameters that weight decay pulls to zero; biases and norms are left out, as transformers does."""
    if not recipe.weight_decay:
        return None
    forward = subject.forward
    parts = {
        name: p if p.ndim > 1 and not name.endswith("bias") else torch.zeros_like(p) for name, p in forward.at().items()
    }
    return forward.space.flatten(parts)


def _layer_slopes(subject: Subject, displacement: Tensor, covered: float) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, part, _ in subject.forward.space.slices():
        layer = per_layer_name(name)
        change = -dot(subject.margin_gradient[part], displacement[part]) / covered if covered else 0.0
        out[layer] = out.get(layer, 0.0) + change
    return out
