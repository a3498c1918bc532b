"""How an optimiser turns gradients into motion: the metric in which a fine-tune moves.

Gradient flow is the common clock. An optimiser is described by the direction it moves in for a given gradient (mean and
spread over mini-batches) and by how much of that direction it has covered after k steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock


class Metric(Protocol):
    """An optimiser near the anchor."""

    @property
    def weight_decay(self) -> float:
        """Decay coefficient; both optimisers pull with decay * theta per flow time."""
        ...

    def direction(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Motion per flow time is minus this [n], for mini-batch gradients of this mean and standard deviation [n]."""
        ...

    def flow_time(self, clock: Clock) -> Tensor:
        """Multiple of a constant direction covered after 0, 1, ... steps, [steps + 1]."""
        ...

    def memory(self, clock: Clock) -> Memory:
        """How the gradients of a run are summed up into its updates."""
        ...


@dataclass(frozen=True)
class Memory:
    """Update t of a run is minus [carried_t (g_t + keep g_{t-1} + keep^2 g_{t-2} + ...) + fresh_t g_t].

    Under Adam each parameter's update is this over the root of its second moment, which is taken as it is.

    Attributes:
        keep: share of the past that is left after a step.
        carried: [steps], learning rate that the sum of past gradients is taken at.
        fresh: [steps], learning rate that the newest gradient is taken at besides.
    """

    keep: float
    carried: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with heavy-ball or Nesterov momentum, as in torch.optim.SGD without dampening.

    Momentum multiplies flow time by 1 / (1 - momentum) once it is up to speed.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def direction(self, mean: Tensor, spread: Tensor) -> Tensor:
        """The mean gradient itself."""
        return mean

    def flow_time(self, clock: Clock) -> Tensor:
        """First-order coefficient a_k of theta_k - anchor = -a_k g + b_k H g."""
        velocity = covered = 0.0
        out = [0.0]
        for rate in clock.rates.tolist():  # plain floats: asked for at every displacement, runs have 1e4 steps
            velocity = self.momentum * velocity + 1.0
            covered += rate * (1.0 + self.momentum * velocity if self.nesterov else velocity)
            out.append(covered)
        return torch.tensor(out, dtype=torch.float64)

    def memory(self, clock: Clock) -> Memory:
        """Velocity is a sum of gradients; Nesterov's step looks one further."""
        rates = clock.rates
        if self.nesterov:
            return Memory(self.momentum, self.momentum * rates, rates)
        return Memory(self.momentum, rates, torch.zeros_like(rates))

    def second_order(self, clock: Clock) -> Tensor:
        """Second-order coefficient b_k, [steps + 1]; eta^2 k (k - 1) / 2 at constant rate without momentum."""
        velocity = covered = 0.0
        pull = position = 0.0
        out = [0.0]
        for rate in clock.rates.tolist():
            velocity = self.momentum * velocity + 1.0
            pull = self.momentum * pull + covered
            step_velocity = 1.0 + self.momentum * velocity if self.nesterov else velocity
            step_pull = covered + self.momentum * pull if self.nesterov else pull
            covered += rate * step_velocity
            position += rate * step_pull
            out.append(position)
        return torch.tensor(out, dtype=torch.float64)

    def response(self, clock: Clock, curvature: Tensor) -> Tensor:
        """Position after 0, 1, ... steps on L(x) = x + curvature x^2 / 2 from x = 0, exactly; [steps + 1, k].

        On a quadratic loss theta_k - anchor = f_k(H) g with f_k this function, whatever the schedule.
        """
        position = torch.zeros_like(curvature)
        velocity = torch.zeros_like(curvature)
        out = [position]
        for rate in clock.rates.tolist():
            slope = 1.0 + curvature * position
            velocity = self.momentum * velocity + slope
            position = position - rate * (slope + self.momentum * velocity if self.nesterov else velocity)
            out.append(position)
        return torch.stack(out)


@dataclass(frozen=True)
class Adam:
    """Adam and AdamW (decoupled decay) in the mean over mini-batches.

    With a gradient of mean mu and standard deviation sigma, the moving averages settle at mu and mu^2 + sigma^2, so the
    update per learning rate is mu / (sqrt(mu^2 + sigma^2) + epsilon): at most 1 in size, sign(mu) without noise. Bias
    correction makes this hold from the first step on for a constant gradient. The square of a mini-batch gradient is
    remembered for 1 / (1 - beta_2) steps, so D is frozen over shorter windows and the bounded rule is used beyond.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def preconditioner(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Diagonal D [n] of the frozen metric: direction = D mean."""
        return self._size(mean, spread).reciprocal_()

    def direction(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Bounded update, between -1 and 1."""
        return mean / self._size(mean, spread)

    def _size(self, mean: Tensor, spread: Tensor) -> Tensor:
        """Root mean square of the mini-batch gradient, and epsilon [n]; in place, for it is asked for very often."""
        return mean.square().addcmul_(spread, spread).sqrt_().add_(self.epsilon)

    def flow_time(self, clock: Clock) -> Tensor:
        """The sum of learning rates: Adam's own momentum is bias-corrected, so a constant gradient sees no lag."""
        return clock.flow_time

    def memory(self, clock: Clock) -> Memory:
        """The first moment with its bias corrected."""
        keep = self.betas[0]
        counts = torch.arange(1, clock.steps + 1, dtype=torch.float64)
        return Memory(keep, clock.rates * (1 - keep) / (1 - keep**counts), torch.zeros_like(clock.rates))
