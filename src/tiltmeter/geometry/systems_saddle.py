"""Systems of two or three parameters solved by hand: the saddle, the lopsided answer, the turning subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.geometry.objective import SoftmaxFunction
from tiltmeter.geometry.systems import DOUBLE, Quadratic

#: Angle between the hand-solved coordinates (x, y) and the parameters, so that nothing stands along the axes.
TURN = 0.7


def log_cosh(f: float) -> float:
    """Log cosh f without loss of digits: the KL of a fair coin whose log-odds moved by 2 f."""
    if abs(f) < 1e-4:
        return f * f / 2 - f**4 / 12
    return math.log1p(2 * math.sinh(f / 2) ** 2) if abs(f) < 300 else abs(f) - math.log(2)


@dataclass(frozen=True)
class Saddle:
    """L = y + c x y + k y^2 / 2 from the origin, watched by two fair coins.

    Gradient flow starts along -y and is bent towards x by the curvature c; for k = 0, x = (cosh ct - 1) / c and
    y = -sinh(ct) / c. The coins' half log-odds are

        f_1 = sqrt(lambda) (x + r c y^2 / 2) + e cos(phi) y,     f_2 = e sin(phi) y

    so the KL is log cosh f_1 + log cosh f_2, and fair coins have no third moment: E[phi_1^3] = 0.

    Attributes:
        curvature: c, coupling of x and y, 1 / flow time.
        sharpness: lambda, Fisher eigenvalue of x, nats per parameter unit squared.
        own: k, curvature along y itself.
        overlap: e = ||F^(1/2) g||, initial overlap.
        angle: phi, between the overlap and the coupling, as the Fisher matrix sees them.
        bend: r, curvature of the log-probabilities: 0 flat, -1 cancels the coupling.
    """

    curvature: float = 1.0
    sharpness: float = 1.0
    own: float = 0.0
    overlap: float = 0.0
    angle: float = 0.0
    bend: float = 0.0

    @property
    def _frame(self) -> Tensor:
        c, s = math.cos(TURN), math.sin(TURN)
        return torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)

    @property
    def tuning(self) -> Quadratic:
        """The fine-tuning loss, four examples alike."""
        frame = self._frame
        hessian = torch.tensor([[0.0, self.curvature], [self.curvature, self.own]], dtype=DOUBLE)
        return Quadratic.quiet(frame[:, 1], frame @ hessian @ frame.T)

    def _half_log_odds(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        one = self.sharpness**0.5 * (x + self.bend * self.curvature * y**2 / 2)
        return one + self.overlap * math.cos(self.angle) * y, self.overlap * math.sin(self.angle) * y

    @property
    def safety(self) -> SoftmaxFunction:
        """Both coins as one distribution over four outcomes."""
        frame = self._frame

        def logits(theta: Tensor) -> Tensor:
            x, y = frame.T @ theta
            one, two = self._half_log_odds(x, y)
            return torch.stack([one + two, one - two, two - one, -one - two])[None]

        return SoftmaxFunction(logits, torch.zeros(2, dtype=DOUBLE))

    def position(self, flow_time: float) -> tuple[float, float]:
        """(x, y) under gradient flow, exact."""
        c, k, t = self.curvature, self.own, flow_time
        root = math.sqrt(c * c + k * k / 4)
        if k == 0:
            return 2 * math.sinh(c * t / 2) ** 2 / c, -math.sinh(c * t) / c
        up, down = k / 2 + root, k / 2 - root  # eigenvalues; y' = -(1 + c x + k y), x' = -c y
        y = (math.expm1(-up * t) - math.expm1(-down * t)) / (up - down)
        x = -c * (_integral(up, t) - _integral(down, t)) / (up - down)
        return x, y

    def displacement(self, flow_time: float) -> Tensor:
        """theta(t) - anchor, [2]."""
        return self._frame @ torch.tensor(self.position(flow_time), dtype=DOUBLE)

    def kl(self, flow_time: float) -> float:
        """Safety KL after gradient flow, exact, nats."""
        x, y = (torch.tensor(v, dtype=DOUBLE) for v in self.position(flow_time))
        one, two = self._half_log_odds(x, y)
        return log_cosh(float(one)) + log_cosh(float(two))

    @property
    def crossover(self) -> float:
        """t_x = 2 e / gamma, flow time."""
        return 2 * self.overlap / math.sqrt(self.coupling)

    @property
    def _derivatives(self) -> tuple[float, float, float, float]:
        """First and second derivatives of f_1 and f_2 along the flow at t = 0, without the bend."""
        cos, sin = self.overlap * math.cos(self.angle), self.overlap * math.sin(self.angle)
        return -cos, -sin, self.sharpness**0.5 * self.curvature + cos * self.own, sin * self.own

    @property
    def cross(self) -> float:
        """Cov(phi_1, phi_2): coefficient of t^3 in 2 u."""
        one, two, turn, twist = self._derivatives
        return float(one * (turn + self.sharpness**0.5 * self.curvature * self.bend) + two * twist)

    @property
    def coupling(self) -> float:
        """gamma^2 = (H g)' F (H g), nats per flow time^4."""
        turn, twist = self._derivatives[2:]
        return turn**2 + twist**2

    @property
    def full(self) -> float:
        """Gamma^2, with the curvature of the log-probabilities."""
        turn, twist = self._derivatives[2:]
        return float((turn + self.sharpness**0.5 * self.curvature * self.bend) ** 2 + twist**2)


def _integral(rate: float, t: float) -> float:
    """Integral of expm1(-rate s) from 0 to t."""
    if abs(rate * t) < 1e-3:
        z = -rate * t
        return t * z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6))))
    return -math.expm1(-rate * t) / rate - t


@dataclass(frozen=True)
class LopsidedCoin:
    """L = y, watched by one coin of probability p with log-odds rising like e y: the KL has a cubic term of its own.

    Attributes:
        probability: p of heads.
        slope: e, log-odds per parameter unit.
    """

    probability: float = 0.9
    slope: float = 1.0

    @property
    def tuning(self) -> Quadratic:
        """The loss y, four examples alike."""
        return Quadratic.quiet(torch.ones(1, dtype=DOUBLE), torch.zeros(1, 1, dtype=DOUBLE))

    @property
    def safety(self) -> SoftmaxFunction:
        """The coin."""
        odds = math.log(self.probability / (1 - self.probability))
        return SoftmaxFunction(
            lambda theta: torch.stack([odds + self.slope * theta[0], theta.new_zeros(())])[None],
            torch.zeros(1, dtype=DOUBLE),
        )

    def kl(self, flow_time: float) -> float:
        """KL after y = -t: p log(p / p') + (1 - p) log((1 - p) / (1 - p')), written with log1p."""
        change = -self.slope * flow_time
        return math.log1p(self.probability * math.expm1(change)) - self.probability * change

    @property
    def quadratic(self) -> float:
        """Coefficient of t^2 in u: half the Fisher information."""
        return self.probability * (1 - self.probability) * self.slope**2 / 2

    @property
    def cubic(self) -> float:
        """Coefficient of t^3 in u: E[phi_1^3] / 6."""
        p = self.probability
        return -(self.slope**3) * p * (1 - p) * (1 - 2 * p) / 6


@dataclass(frozen=True)
class TurningAxis:
    """L = y, watched by a fair coin with half log-odds sqrt(lambda) (x + q y z): its one direction turns with y.

    At (0, y, 0) the score is sqrt(lambda) (1, 0, q y), so after flow time t the sensitive direction has turned by
    arctan(q t), though nothing has been lost yet.

    Attributes:
        sharpness: lambda.
        turning: q, 1 / parameter unit.
    """

    sharpness: float = 1.0
    turning: float = 1.0

    def logits(self, theta: Tensor) -> Tensor:
        """[1, 2]."""
        f = self.sharpness**0.5 * (theta[0] + self.turning * theta[1] * theta[2])
        return torch.stack([f, -f])[None]

    def displacement(self, flow_time: float) -> Tensor:
        """(0, -t, 0)."""
        return torch.tensor([0.0, -flow_time, 0.0], dtype=DOUBLE)

    def sine(self, flow_time: float) -> float:
        """Sine of the angle turned."""
        return abs(self.turning * flow_time) / math.hypot(1.0, self.turning * flow_time)
