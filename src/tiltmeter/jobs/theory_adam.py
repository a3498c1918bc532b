"""Claims about Adam: its bounded rule, its decay, and descent in a frozen metric."""

from __future__ import annotations

import torch

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.motion import measure_slope
from tiltmeter.geometry.objective import FunctionObjective, SoftmaxFunction
from tiltmeter.geometry.path import CurvedPath, LinearPath, TaylorPath
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic, batches, rotation
from tiltmeter.jobs.theory_claim import OURS, Claim, each, limit, measure
from tiltmeter.jobs.theory_torch import decay_pull, linear_losses, linear_objective, run_torch


def adam_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [
        _adam_first_step(seed),
        _adam_settles(seed),
        _adam_decay(seed),
        _adam_curves(seed),
        _preconditioned_path(seed),
        _preconditioned_law(seed),
    ]


def _adamw(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)


def _adam_first_step(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        slope, test = scale * rotation(6, seed)[0], rotation(6, seed)[1]
        losses = linear_losses(slope[None], 9)
        moved = run_torch(_adamw, torch.zeros_like(slope), losses)
        slopes = measure_slope(linear_objective(slope.expand(2, 6)), batches(2))
        path = LinearPath(Adam(), Clock.constant(1e-3, 9), slopes)
        return float(test @ moved), float(test @ path.displacement(9))

    return Claim(
        "adam-sign",
        "Early Adam, and Adam without noise, moves by the learning rate along sign(g), whatever the size of g.",
        OURS,
        "torch.optim.AdamW, 9 steps on a linear loss; along a random direction; scale = size of g",
        **each(pair),
        tolerance=1e-5,
    )


def _adam_settles(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        slope = torch.randn(6, dtype=DOUBLE, generator=generator)
        noise = scale * torch.randn(8, 6, dtype=DOUBLE, generator=generator)
        gradients = slope + noise - noise.mean(0)
        moved = run_torch(_adamw, torch.zeros_like(slope), linear_losses(gradients, 400))
        path = LinearPath(Adam(), Clock.constant(1e-3, 400), measure_slope(linear_objective(gradients), batches(8)))
        foretold = path.displacement(400)
        return float(foretold @ moved), float(foretold @ foretold)

    return Claim(
        "adam-noise",
        "Under mini-batch noise Adam's motion per learning rate is mu / sqrt(mu^2 + sigma^2).",
        OURS,
        "torch.optim.AdamW, 400 steps over 8 batches of a linear loss, along the forecast; scale = sigma / |g|",
        **each(pair, (1e-2, 1.0, 10.0)),
        tolerance=0.1,
    )


def _adam_decay(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        return decay_pull(
            lambda p: torch.optim.AdamW(p, lr=1e-7, weight_decay=0.3),
            lambda p: torch.optim.AdamW(p, lr=1e-7, weight_decay=0.0),
            (Adam(weight_decay=0.3), Adam()),
            scale * rotation(6, seed)[2],
            1e-7,
        )

    return Claim(
        "adam-decay",
        "AdamW's decay is decoupled: -decay * theta per flow time, not divided by the gradient's size.",
        OURS,
        "torch.optim.AdamW with and without decay, difference along the anchor; scale = size of the anchor",
        **each(pair),
        tolerance=1e-3,
    )


def _adam_curves(seed: int) -> Claim:
    """J H d(g) with J = sigma^2 / (g^2 + sigma^2)^(3/2), the derivative of the bounded rule."""

    def pair(sigma: float) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        slope, test = torch.randn(2, 5, dtype=DOUBLE, generator=generator)
        base = Quadratic.with_spectrum(slope, [2.0, 1.0, -0.5, 0.3, 1.5], seed)
        noise = sigma * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=DOUBLE)[:, None].expand(4, 5)
        tuning = Quadratic(slope, base.hessian, noise, base.hessian_noise).objective
        anchor = measure_slope(tuning, batches(4))

        def second(t: float) -> float:
            linear = LinearPath(Adam(epsilon=0.0), Clock.constant(t / 8, 8), anchor)
            probe = measure_slope(tuning, batches(4), displacement=linear.displacement(8))
            moved = CurvedPath(linear, probe, 8).displacement(8) - linear.displacement(8)
            return float(test @ moved) / (t**2 / 2)

        size = slope.square() + sigma**2
        bent = sigma**2 / size**1.5 * (base.hessian @ (slope / size.sqrt()))
        return float(test @ bent), limit(second, 1e-3 * sigma)

    return Claim(
        "adam-curvature",
        "The bounded rule curves by J H d(g), J = sigma^2 / (g^2 + sigma^2)^(3/2): finite where D H D g explodes.",
        OURS,
        "noisy quadratic; second-order term of the curved path against the rule's derivative; scale = sigma",
        **each(pair, (0.1, 1.0, 10.0)),
        tolerance=1e-3,
    )


def _frozen(seed: int, spread: float) -> tuple[Quadratic, torch.Tensor]:
    """A noisy quadratic and, by hand, the diagonal of Adam's frozen metric on it."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(8, dtype=DOUBLE, generator=generator)
    sigma = spread * (0.5 + torch.rand(8, dtype=DOUBLE, generator=generator))
    base = Quadratic.with_spectrum(slope, [2.0, 1.0, -0.5, 0.3, 1.5, 0.0, 0.7, -1.0], seed)
    noise = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=DOUBLE)[:, None] * sigma
    return Quadratic(slope, base.hessian, noise, base.hessian_noise), (slope.square() + sigma.square()).rsqrt()


def _in_metric(system: Quadratic, diagonal: torch.Tensor) -> Quadratic:
    """Flow preconditioned by D is plain flow of the loss in coordinates D^(-1/2) theta."""
    root = diagonal.sqrt()
    return Quadratic.quiet(root * system.slope, root[:, None] * system.hessian * root)


def _preconditioned_path(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system, diagonal = _frozen(seed, scale)
        tuning, test = system.objective, rotation(8, seed)[0]
        anchor = measure_slope(tuning, batches(4))
        metric = Adam(epsilon=0.0).preconditioner(anchor.mean, anchor.spread)
        direction = metric * anchor.mean
        turned = metric * tuning.hvp(direction)

        straight, steps = diagonal * system.slope, 10
        flow = _in_metric(system, diagonal)

        def bend(t: float) -> float:
            return float(test @ (diagonal.sqrt() * flow.displacement(t) + t * straight)) / (t**2 / 2)

        path = TaylorPath(Sgd(), Clock.constant(scale / steps, steps), direction, turned).displacement(steps)
        # ten steps reach the share 9/10 of the flow's second order
        return limit(bend, 1e-2 * scale), float(test @ (path + scale * straight)) / (0.9 * scale**2 / 2)

    return Claim(
        "preconditioned-path",
        "Descent in a frozen metric D moves by -t D g + t^2/2 D H D g.",
        OURS,
        "noisy quadratic, D by hand from its noise, exact flow in coordinates D^(-1/2) theta; scale = noise sigma",
        **each(pair, (0.1, 1.0, 10.0)),
        tolerance=1e-5,
    )


def _preconditioned_law(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        system, diagonal = _frozen(seed, scale)
        model = CurvedSoftmax.random(2, 4, 8, seed + 1)
        tuning = system.objective
        anchor = measure_slope(tuning, batches(4))
        root = Adam(epsilon=0.0).preconditioner(anchor.mean, anchor.spread).sqrt()
        mean_loss = FunctionObjective(lambda x: tuning.function(root * x).mean().expand(4), tuning.anchor)
        motion = measure(mean_loss, SoftmaxFunction(lambda x: model.safety.logits(root * x), tuning.anchor))
        flow = _in_metric(system, diagonal)
        exact = limit(lambda t: float(model.kl(diagonal.sqrt() * flow.displacement(t)).mean()) / t**2, 1e-3 * scale)
        return exact, float(motion.coupling.overlap.mean()) / 2

    return Claim(
        "preconditioned-law",
        "Every constant holds with g -> D g and H g -> D H D g: here e0^2 = (D g)' F (D g).",
        OURS,
        "noisy quadratic and random curved softmax; exact KL over t^2 of the preconditioned flow; scale = noise sigma",
        **each(pair, (0.1, 1.0, 10.0)),
        tolerance=1e-4,
    )
