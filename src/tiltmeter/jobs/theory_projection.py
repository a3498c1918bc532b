"""Claims about projecting safety out of a fine-tune: once, every step, refreshed, and in which metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import expm
from torch import Tensor

from tiltmeter.geometry.metric import Adam
from tiltmeter.geometry.motion import measure_slope
from tiltmeter.geometry.projection import project_update
from tiltmeter.geometry.sensitivity import measure_sensitivity
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, batches, orthogonal_slope, score_objective
from tiltmeter.jobs.theory_claim import OURS, SCALES, Claim, each, limit, measure
from tiltmeter.jobs.theory_law import EIGENVALUES
from tiltmeter.jobs.theory_torch import linear_losses, run_torch


def projection_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _orthogonal(seed),
        _smallest(seed),
        _once(seed),
        _every_step(seed),
        _refresh(seed),
        _gradient_only(seed),
        _in_metric(seed),
        _adamw(seed),
        _tail(seed),
    ]


@dataclass(frozen=True)
class Guarded:
    """A fine-tune under a projection whose basis is refreshed at equal intervals; piecewise linear, hence exact.

    Attributes:
        model: the safety model.
        tuning: the fine-tuning loss.
        diagonal: D [n] of the optimiser's metric.
    """

    model: CurvedSoftmax
    tuning: Quadratic
    diagonal: Tensor

    @classmethod
    def random(cls, seed: int, scale: float = 1.0) -> Guarded:
        """A curved softmax of four outcomes in eight dimensions and a loss that starts with F g = 0."""
        model = CurvedSoftmax.random(1, 4, 8, seed)
        slope = orthogonal_slope(model, seed + 1)
        generator = torch.Generator().manual_seed(seed + 2)
        diagonal = (0.7 * torch.randn(8, dtype=DOUBLE, generator=generator)).exp()
        tuning = Quadratic.with_spectrum(slope, [scale * e for e in EIGENVALUES], seed + 3)
        return cls(CurvedSoftmax(model.bias, model.slopes, scale * model.bends), tuning, diagonal)

    def scores(self, x: Tensor) -> list[Tensor]:
        """Scores of every outcome at x: a complete basis of what the model feels there."""
        return list(self.model.scores(x)[0])

    def kl(self, flow_time: float, step: Callable[[Tensor], Tensor], refreshes: int = 1) -> float:
        """Exact KL after flow whose motion is step(x_0) applied to the gradient, x_0 the last refresh.

        Args:
            flow_time: whole flow time.
            step: position of the last refresh -> matrix [n, n] that turns a gradient into motion.
            refreshes: equal intervals.
        """
        x = torch.zeros_like(self.tuning.slope)
        n = x.numel()
        for _ in range(refreshes):
            motion = step(x)
            generator = torch.zeros(n + 1, n + 1, dtype=DOUBLE)
            generator[:n, :n], generator[:n, n] = motion @ self.tuning.hessian, motion @ self.tuning.slope
            flow = torch.from_numpy(expm((generator * (flow_time / refreshes)).numpy()))
            x = flow[:n, :n] @ x + flow[:n, n]
        return float(self.model.kl(x).mean())

    def projected(self, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
        """Motion per gradient [n, n] when the update -D gradient is projected in the metric D."""
        d = torch.ones_like(x) if diagonal is None else diagonal
        basis = self.scores(x)
        return torch.stack([project_update(-update, basis, diagonal) for update in torch.diag(d)], 1)


def _orthogonal(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Guarded.random(seed)
        d, update = scale * system.diagonal, scale * system.tuning.slope + system.diagonal
        basis = system.scores(torch.zeros_like(d))
        left = project_update(update, basis, d)
        return 0.0, max(abs(float(column @ left)) for column in basis) / float(update.norm())

    return Claim(
        "projection-orthogonal",
        "After Delta - D R (R'DR)^-1 R'Delta no score feels the update, though the scores are linearly dependent.",
        OURS,
        "four scores of rank three, random D; largest |r'Delta| over |Delta|; scale = size of D",
        **each(pair),
        tolerance=1e-12,
    )


def _smallest(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Guarded.random(seed)
        d, update = scale * system.diagonal, system.tuning.slope + system.diagonal
        basis = torch.stack(system.scores(torch.zeros_like(d)))
        root = d.sqrt()
        # in the coordinates D^(-1/2) x the metric is the plain one, and least squares give the closest point
        scaled = basis * root
        best = root * (update / root - torch.linalg.pinv(scaled, rtol=1e-10) @ (scaled @ (update / root)))
        test = system.tuning.hessian[0]
        return float(test @ best), float(test @ project_update(update, list(basis), d))

    return Claim(
        "projection-smallest",
        "It is the closest such update in the optimiser's metric x'D^-1 x.",
        OURS,
        "the same; least squares in coordinates D^(-1/2) x, along a random direction; scale = size of D",
        **each(pair),
        tolerance=1e-9,
    )


def _once(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Guarded.random(seed, scale)
        free = -torch.eye(8, dtype=DOUBLE)
        exact = limit(lambda t: system.kl(t, lambda x: free) / t**4, 1e-2 / max(1.0, scale))
        return exact, measure(system.tuning.objective, system.model.safety).law(1.0)

    return Claim(
        "projection-once",
        "A projection at the start alone leaves the whole quartic law, Gamma^2 t^4 / 8.",
        OURS,
        "random curved softmax, gradient orthogonal to all scores at the start; exact KL over t^4; scale = curvature",
        **each(pair),
        tolerance=1e-4,
    )


def _left_over(system: Guarded) -> float:
    return float(system.model.variance(system.model.score_curvature(system.tuning.slope)).mean()) / 8


def _every_step(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Guarded.random(seed, scale)
        found = limit(lambda t: system.kl(t, system.projected) / t**4, 1e-2 / max(1.0, scale))
        return _left_over(system), found

    return Claim(
        "projection-every-step",
        "With a fixed complete basis at every step s'Hg is gone and u = t^4/8 E[(u'Au)^2] is left.",
        OURS,
        "the same, project_update with the scores of the anchor; exact KL over t^4; scale = curvature",
        **each(pair),
        tolerance=1e-3,
    )


def _refresh(seed: int) -> Claim:
    def pair(count: float) -> tuple[float, float]:
        system, n = Guarded.random(seed), round(count)
        return _left_over(system) / n**2, limit(lambda t: system.kl(t, system.projected, n) / t**4, 1e-2)

    return Claim(
        "projection-refreshed",
        "Refreshing the basis n times at equal intervals divides that by n^2.",
        OURS,
        "the same; exact KL over t^4; scale = n",
        **each(pair, (2.0, 4.0, 8.0, 16.0)),
        tolerance=1e-3,
    )


def _gradient_only(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Guarded.random(seed)
        d = scale * system.diagonal

        def step(x: Tensor) -> Tensor:
            basis = system.scores(x)
            plain = torch.stack([project_update(e, basis) for e in torch.eye(8, dtype=DOUBLE)], 1)
            return -d[:, None] * plain

        fisher, slope = system.model.fisher(torch.zeros_like(d))[0], system.tuning.slope
        found = limit(lambda t: system.kl(t, step) / t**2, 1e-3 / scale)
        return float((d * slope) @ fisher @ (d * slope)) / 2, found

    return Claim(
        "projection-of-gradient",
        "Projecting the gradient before a preconditioner leaves the t^2 term of no projection at all, 1/2 (Dg)'F(Dg).",
        OURS,
        "the same with random D, gradient orthogonal to the scores; exact KL over t^2; scale = size of D",
        **each(pair),
        tolerance=1e-4,
    )


def _in_metric(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system = Guarded.random(seed)
        d = scale * system.diagonal
        motion = system.projected(torch.zeros_like(d), d) @ system.tuning.slope
        left = float(system.model.variance(system.model.score_curvature(motion)).mean()) / 8
        return left, limit(lambda t: system.kl(t, lambda x: system.projected(x, d)) / t**4, 1e-2 / scale)

    return Claim(
        "projection-in-metric",
        "Projecting the update in the metric D leaves t^4 only: 1/8 E[(v'Av)^2] with v the projected update.",
        OURS,
        "the same; exact KL over t^4; scale = size of D",
        **each(pair),
        tolerance=1e-3,
    )


def _adamw(seed: int) -> Claim:
    """The gradient is orthogonal to every score already, so projecting it would change nothing."""

    def pair(rate: float) -> tuple[float, float]:
        system = Guarded.random(seed)
        zero, slope = torch.zeros_like(system.diagonal), measure_slope(system.tuning.objective, batches(4))
        losses = linear_losses(slope.mean[None], 5)
        free = run_torch(lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0), zero, losses)
        held = project_update(free, system.scores(zero), Adam().preconditioner(slope.mean, slope.spread))
        return 1e-3, float(system.model.kl(held).mean() / system.model.kl(free).mean())

    return Claim(
        "projection-adamw",
        "Under a real AdamW a projected gradient protects nothing; its update projected in Adam's metric does.",
        OURS,
        "five torch AdamW steps whose gradient no score feels; KL with over KL without; scale = learning rate",
        **each(pair, (1e-4, 1e-3)),
        tolerance=0.0,
        relation="<=",
    )


def _tail(seed: int) -> Claim:
    """Flow under a basis of the top two directions; F has rank three."""

    def pair(scale: float) -> tuple[float, float]:
        model = CurvedSoftmax.random(1, 4, 8, seed, scale)
        slope = torch.randn(8, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed + 7))
        system = Guarded(model, Quadratic.with_spectrum(slope, EIGENVALUES, seed + 8), torch.ones(8, dtype=DOUBLE))
        sensitivity = measure_sensitivity(score_objective(model.safety), 2)
        basis = [sensitivity.lift(e) for e in torch.eye(2, dtype=DOUBLE)]
        motion = torch.stack([project_update(-e, basis) for e in torch.eye(8, dtype=DOUBLE)], 1)
        values, vectors = torch.linalg.eigh(model.fisher(torch.zeros(8, dtype=DOUBLE))[0])
        tail = float((values[:-2] * (vectors[:, :-2].T @ slope).square()).sum()) / 2
        return tail, limit(lambda t: system.kl(t, lambda x: motion) / t**2, 1e-3 / max(1.0, scale**0.5))

    return Claim(
        "projection-tail",
        "A basis of the top d directions leaves a t^2 term, t^2/2 u'F_tail u.",
        OURS,
        "random curved softmax of rank 3 with the top 2 directions projected out; exact KL over t^2; scale = sharpness",
        **each(pair, SCALES),
        tolerance=1e-4,
    )
