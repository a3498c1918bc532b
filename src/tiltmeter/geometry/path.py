"""Where the optimiser will be after k steps, told from the anchor without taking a training step.

A path gives the displacement after any step of the recipe. Safety quantities are then *evaluated* at that displacement,
through the network, so that only the path is expanded and never the safety loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.krylov import Krylov
from tiltmeter.geometry.metric import Metric, Sgd
from tiltmeter.geometry.motion import Slope

#: Values treated at a time.
PIECE = 2**17


class Path(Protocol):
    """A predicted trajectory."""

    def displacement(self, step: int) -> Tensor:
        """The vector theta_step - anchor, [n]."""
        ...


@dataclass(frozen=True)
class LinearPath:
    """The optimiser's own bounded update along the initial gradient: -a_k direction(g).

    Attributes:
        metric: the optimiser.
        clock: learning rates of every step.
        slope: gradients at the anchor.
        decayed: the anchor's decayed parameters [n] (zero where decay does not apply), if there is weight decay.

    Error: O(flow time squared); first-order right for every optimiser in `metric`.
    """

    metric: Metric
    clock: Clock
    slope: Slope
    decayed: Tensor | None = None

    def displacement(self, step: int) -> Tensor:
        """-a_k direction(g) - decay a_k theta, [n]."""
        covered = float(self.metric.flow_time(self.clock)[step])
        mean, spread = self.slope.mean, self.slope.spread
        wide = torch.promote_types(mean.dtype, torch.float32)  # gradients may be kept narrow
        out = torch.empty_like(mean, dtype=wide)
        for part in pieces(out):
            out[part] = self.metric.direction(mean[part].to(wide), spread[part].to(wide)) * -covered
        return _decay(out, self.metric, covered, self.decayed)


@dataclass(frozen=True)
class CurvedPath:
    """The update rule carried along a line of gradients measured at two places.

    Mean and spread of the mini-batch gradient are interpolated in flow time between the anchor and a probe on the
    linear path, and the optimiser's bounded rule is integrated over them. The change of gradient is a secant of the
    true loss, so it stays finite where the Hessian at the anchor (and D H D g under Adam) explodes. Past the probe, a
    gradient that the secant would carry through zero stays at zero: descent stops where the slope ends, and does not
    turn around. What an optimiser remembers is left out; `rehearsal` has it.

    Attributes:
        linear: the path from the anchor's gradients alone.
        probe: gradients at `linear.displacement(probe_step)`.
        probe_step: that step.
        nodes: integration intervals (midpoint rule).

    Error: third order in flow time for gradient descent, t^3/6 H^2 g with the probe half-way, plus the departure of the
        loss from a parabola.
    """

    linear: LinearPath
    probe: Slope
    probe_step: int
    nodes: int = 4

    def displacement(self, step: int) -> Tensor:
        """Minus the integral of direction(mean(tau), spread(tau)) over flow time, [n]."""
        metric, anchor = self.linear.metric, self.linear.slope
        times = metric.flow_time(self.linear.clock)
        covered, probed = float(times[step]), float(times[self.probe_step])
        if not probed > 0:
            raise DegenerateError("the probe of the curved path stands at the anchor; choose a later probe step")
        shares = [(node + 0.5) / self.nodes * covered / probed for node in range(self.nodes)]
        wide = torch.promote_types(anchor.mean.dtype, torch.float32)  # probes may be kept narrow
        out = torch.zeros_like(anchor.mean)
        for part in pieces(out):
            means = [each.mean[part].to(wide) for each in (anchor, self.probe)]
            spreads = [each.spread[part].to(wide) for each in (anchor, self.probe)]
            for share in shares:
                mean, spread = (torch.lerp(near, far, share) for near, far in (means, spreads))
                if share > 1:
                    mean.masked_fill_(mean * means[1] < 0, 0.0)
                    spread.clamp_min_(0)
                out[part].add_(metric.direction(mean, spread), alpha=-covered / self.nodes)
        return _decay(out, metric, covered, self.linear.decayed)


@dataclass(frozen=True)
class KrylovPath:
    """Exact descent on the loss's parabola at the anchor, within a Krylov space; for SGD with or without momentum.

    Attributes:
        metric: plain or momentum SGD.
        clock: learning rates.
        krylov: space of the Hessian from the mean gradient.
        clipped: whether negative Ritz values count as zero (their directions grow without bound on a parabola, and the
            true loss does not).

    Error: exact on a quadratic once k reaches the number of distinct eigenvalues that g feels.
    """

    metric: Sgd
    clock: Clock
    krylov: Krylov
    clipped: bool = False

    def displacement(self, step: int) -> Tensor:
        """f_k(H) g, [n]."""

        def respond(ritz: Tensor) -> Tensor:
            return self.metric.response(self.clock, ritz.clamp_min(0) if self.clipped else ritz)[step]

        return self.krylov.apply(respond)


@dataclass(frozen=True)
class TaylorPath:
    """-a_k g + b_k H g for SGD: second order in flow time, for flow times well below 1 / lambda_max."""

    metric: Sgd
    clock: Clock
    gradient: Tensor
    acceleration: Tensor

    def displacement(self, step: int) -> Tensor:
        """-a_k g + b_k H g, [n]."""
        first = float(self.metric.flow_time(self.clock)[step])
        second = float(self.metric.second_order(self.clock)[step])
        return (self.gradient * -first).add_(self.acceleration, alpha=second)


def pieces(vector: Tensor) -> list[slice]:
    """Slices of a vector [n] that fit a cache; an elementwise rule then holds no temporary of length n."""
    return [slice(start, start + PIECE) for start in range(0, vector.numel(), PIECE)]


def _decay(displacement: Tensor, metric: Metric, covered: float, decayed: Tensor | None) -> Tensor:
    if decayed is not None and metric.weight_decay:
        displacement.add_(decayed, alpha=-covered * metric.weight_decay)
    return displacement
