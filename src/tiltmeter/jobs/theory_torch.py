"""Real torch optimisers on small losses: the independent route for claims about optimisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Metric
from tiltmeter.geometry.motion import measure_slope
from tiltmeter.geometry.objective import FunctionObjective
from tiltmeter.geometry.path import LinearPath
from tiltmeter.geometry.systems import batches, rotation

Optimiser = Callable[[list[Tensor]], torch.optim.Optimizer]


def run_torch(make: Optimiser, start: Tensor, losses: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Displacement [n] after one step of a torch optimiser per loss."""
    theta = start.clone().requires_grad_()
    optimiser = make([theta])
    for loss in losses:
        optimiser.zero_grad()
        loss(theta).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return theta.detach() - start


def linear_losses(gradients: Tensor, steps: int) -> list[Callable[[Tensor], Tensor]]:
    """Losses g_b' theta, batch after batch, over and over."""

    def loss(gradient: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda theta: gradient @ theta

    return [loss(gradients[step % len(gradients)]) for step in range(steps)]


def linear_objective(gradients: Tensor) -> FunctionObjective:
    """The same losses as examples around the origin."""
    return FunctionObjective(lambda theta: gradients @ theta, torch.zeros_like(gradients[0]))


def decay_pull(
    decaying: Optimiser, plain: Optimiser, metrics: tuple[Metric, Metric], anchor: Tensor, rate: float
) -> tuple[float, float]:
    """What decay adds along the anchor in 30 steps, per squared length: by torch, and by the linear path."""
    slope, steps = rotation(6, 0)[0], 30
    losses = linear_losses(slope[None], steps)
    pulled = run_torch(decaying, anchor, losses) - run_torch(plain, anchor, losses)
    slopes, clock = measure_slope(linear_objective(slope.expand(2, 6)), batches(2)), Clock.constant(rate, steps)
    paths = [LinearPath(metric, clock, slopes, anchor).displacement(steps) for metric in metrics]
    square = float(anchor @ anchor)
    return float(anchor @ pulled) / square, float(anchor @ (paths[0] - paths[1])) / square
