"""A case on systems solved by hand: a quadratic tuning loss, a curved softmax, a margin that is linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.forecast import Separate, follow, read_along
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.motion import Slope, measure_acceleration, measure_coupling, measure_krylov, measure_slope
from tiltmeter.geometry.objective import FunctionObjective
from tiltmeter.geometry.path import CurvedPath, KrylovPath, LinearPath, Path
from tiltmeter.geometry.rehearsal import Rehearsal
from tiltmeter.geometry.sensitivity import DenseBasis, Sensitivity
from tiltmeter.geometry.systems import CurvedSoftmax, Quadratic, batches
from tiltmeter.predictors.contract import FEWER, REHEARSED, Case, Measured

DOUBLE = torch.float64
N, M = 6, 3


@dataclass(frozen=True)
class World:
    """The system and the case made of it; `pull` [m, n] are the slopes of minus the margins."""

    tuning: Quadratic
    model: CurvedSoftmax
    pull: Tensor
    anchor: Tensor
    case: Case


def world(
    scale: float = 1.0,
    metric: Adam | Sgd | None = None,
    noise: float = 0.0,
    steps: int = 20,
    doubt: float = 0.0,
    apart: float = 0.0,
) -> World:
    """A case; `scale` stretches the gradient, `noise` is the luck of one run's batches, `doubt` the forecast's.

    `apart` is what noise of the rows has in the difference of the two rehearsals.
    """
    metric = metric or Sgd()
    generator = torch.Generator().manual_seed(3)
    slope = torch.randn(N, dtype=DOUBLE, generator=generator) * scale
    tuning = Quadratic.with_spectrum(slope, [2.0, 1.0, 0.5, 0.2, 0.1, 0.0], 1)
    model = CurvedSoftmax.random(M, 4, N, 2)
    pull = torch.randn(M, N, dtype=DOUBLE, generator=generator)
    anchor = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    margin = FunctionObjective(lambda x: pull @ x - anchor, torch.zeros(N, dtype=DOUBLE))
    clock = Clock.constant(0.05, steps)
    objective, safety = tuning.objective, model.safety
    found = measure_slope(objective, batches(4))
    linear = LinearPath(metric, clock, found)
    probe = measure_slope(objective, batches(4), displacement=linear.displacement(steps // 2), groups=1)
    paths: dict[str, Path] = {"linear": linear, "curved": CurvedPath(linear, probe, steps // 2)}
    if isinstance(metric, Sgd):
        paths["krylov"] = KrylovPath(metric, clock, measure_krylov(objective, found, N))
    values = {name: follow(path, clock.grid(4), Separate(safety, margin))[0] for name, path in paths.items()}
    for name, looks in ((REHEARSED, steps), (FEWER, steps // 2)):

        def look(number: int, displacement: Tensor | None) -> Slope:
            return measure_slope(objective, batches(4), displacement=displacement, groups=1)

        walk = Rehearsal(metric, clock, looks).walk(look, clock.grid(4))
        values[name] = read_along(walk, Separate(safety, margin))[0]
    frame = tuple(torch.eye(N, dtype=DOUBLE)[:2])
    covered = metric.flow_time(clock)
    coupling = measure_coupling(safety, found, measure_acceleration(objective, found))
    measured = Measured(
        values,
        coupling.overlap_groups,
        None,
        coupling,
        None,
        float(objective.losses().mean()),
        float(slope.norm()),
        float(slope[:2].norm()),
        safety.losses(torch.full((N,), 0.1, dtype=DOUBLE)),
        covered,
        2.5,
        torch.full((steps + 1,), noise, dtype=DOUBLE),
        torch.full((steps + 1,), noise, dtype=DOUBLE),
        torch.full((steps + 1,), doubt, dtype=DOUBLE),
        torch.full((steps + 1,), doubt, dtype=DOUBLE),
        torch.full((steps + 1,), apart, dtype=DOUBLE),
        torch.full((steps + 1,), apart, dtype=DOUBLE),
        dict.fromkeys(values, torch.ones(steps + 1, dtype=DOUBLE)),
    )
    sensitivity = Sensitivity(torch.ones(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE), 2.0,
                              DenseBasis(objective.space, frame))  # fmt: skip
    case = Case(safety, margin, anchor, pull.mean(0), sensitivity, None, objective, batches(4), metric, clock, measured)
    return World(tuning, model, pull, anchor, case)
