"""A canary: a few percent of the steps really run, and the forecast as prior for the rest.

The canary's mean slope of the margin and the forecast's are two estimates of one number. The forecast's variance is
that of the rows it was made from and the square of what half of its looks at the gradient change, less what noise of
the rows has in that; the canary's is the luck of its few batches, carried to the end of the recipe. They are weighed by
their inverse squares, and the change of slope is added to the forecast for the whole recipe. The KL is treated by its
root, which grows like the path, and the canary's root is compared with the one that its luck would give on average,
which is below the root that was told: the mean of a square is the square of the mean and the variance.

Source: this project; the conjugate normal update. The two are taken to be independent, which they are not quite: the
canary's rows are some of those in the forecast's first look.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tiltmeter.geometry.metric import Adam, Sgd
from tiltmeter.geometry.space import norm
from tiltmeter.predictors.contract import CANARY_SHARE, FEWER, REHEARSED, Canary, Case, Risk, Trend, known, passes


def canary_steps(case: Case) -> int:
    """Steps of a canary: a twentieth of the run, at least one."""
    return max(1, round(CANARY_SHARE * case.clock.steps))


def run_canary(case: Case) -> Canary:
    """Run the recipe's optimiser on the sample's batches, one after the other; weight decay is left out.

    Cost: a forward+backward pass over each batch, one forward pass over answers and openings.
    """
    if case.canary is not None:
        return case.canary
    steps = canary_steps(case)
    moved = descend(case, steps)
    margin = -case.negative_margin.losses(moved).double().cpu()
    return Canary(steps, norm(moved), margin, case.divergence.losses(moved).double().cpu())


def descend(case: Case, steps: int) -> Tensor:
    """Displacement [n] after `steps` steps of torch's SGD or Adam, on flat vectors."""
    metric, rates = case.metric, case.clock.rates.tolist()
    moved: Tensor | None = None
    first = second = torch.zeros(())
    for index in range(steps):
        gradient = case.tuning.gradient(case.batches[index % len(case.batches)], moved)
        size = norm(gradient)
        if case.clip is not None and size > case.clip:
            gradient = gradient * (case.clip / size)
        if isinstance(metric, Adam):
            b1, b2 = metric.betas
            first = first * b1 + gradient * (1 - b1)
            second = second * b2 + gradient.square() * (1 - b2)
            root = (second / (1 - b2 ** (index + 1))).sqrt_().add_(metric.epsilon)
            step = first / (1 - b1 ** (index + 1)) / root
        elif isinstance(metric, Sgd):
            first = first * metric.momentum + gradient
            step = gradient + metric.momentum * first if metric.nesterov else first
        else:
            raise TypeError(f"expected Sgd or Adam, got {type(metric).__name__}")
        moved = step * -rates[index] if moved is None else moved - rates[index] * step
    if moved is None:
        raise ValueError("a canary has at least one step")
    return moved


def canary_margin(case: Case) -> Risk:
    """Margin drop at the end, nats. Cost: the rehearsal's and the canary's."""
    price = _price(case)
    anchor = case.anchor_margin.double().cpu().mean()
    drops = {name: anchor - v.margin.mean(-1) for name, v in case.measured.paths.items()}
    canary = run_canary(case)
    seen = float(anchor - canary.margin.mean())
    noise = float(case.measured.margin_noise[canary.steps])

    def heard(told: float) -> tuple[float, float]:
        return seen - told, noise

    doubt, apart = float(case.measured.margin_doubt[-1]), float(case.measured.margin_apart[-1])
    return _blend(case, drops, heard, doubt, apart, canary.steps, "nats", price, root=False)


def canary_kl(case: Case) -> Risk:
    """Safety KL at the end, nats per token. Cost: as `canary_margin`."""
    price = _price(case)
    factor = case.measured.kl_factor
    roots = {
        name: (v.safety_kl.mean(-1) * factor[name][list(v.steps)]).clamp_min(0).sqrt()
        for name, v in case.measured.paths.items()
    }
    canary = run_canary(case)
    seen, share = float(canary.kl.mean()), float(case.measured.kl_noise[canary.steps])

    def heard(told: float) -> tuple[float, float]:
        # the noise is a share of what was told: a canary that saw little would else pass for a sure one
        expected = told * math.sqrt(max(0.0, 1 - share**2))
        return (0.0 if seen <= 0 else math.sqrt(seen)) - expected, share * told

    end = float(roots[REHEARSED][-1]) if REHEARSED in roots else math.nan
    doubt, apart = float(case.measured.kl_doubt[-1]) * end, float(case.measured.kl_apart[-1]) * end
    return _blend(case, roots, heard, doubt, apart, canary.steps, "nats per token", price, root=True)


def canary_length(case: Case) -> Risk:
    """||delta|| of the canary: how far it moved, wherever to. Cost: the canary's steps."""
    price = passes(case, tuning={"forward_backward": canary_steps(case) / len(case.batches)})
    return known(run_canary(case).length, "parameter units", price, "the canary left the range of numbers")


def _blend(
    case: Case,
    curves: dict[str, Tensor],
    heard: Callable[[float], tuple[float, float]],
    doubt: float,
    apart: float,
    step: int,
    unit: str,
    price: float,
    *,
    root: bool,
) -> Risk:
    """The forecast with its slope moved towards the canary's.

    Args:
        case: what is forecast.
        curves: path -> values at its steps.
        heard: value told at the canary's step -> by how much the canary differs, and the noise of that.
        doubt: standard deviation of the forecast at the end by the noise of its rows.
        apart: standard deviation of what half of its looks change, by the noise of rows.
        step: the canary's last.
        unit: of the risk.
        price: passes.
        root: whether the curves are roots of the quantity.
    """
    if REHEARSED not in curves:
        return Risk(None, unit, price, reason="there is no forecast to correct")
    steps = case.measured.paths[REHEARSED].steps
    covered, main = case.measured.covered, curves[REHEARSED]
    reached = float(covered[step])
    if not reached > 0:
        return Risk(None, unit, price, reason="the canary's steps have a learning rate of zero")
    told = _between(steps, main, covered, step)
    difference, noise = heard(told)
    if root and told == 0:
        return Risk(None, unit, price, reason="the forecast sees no motion at the canary's step to correct")
    if math.isnan(noise) or math.isnan(doubt):
        return Risk(None, unit, price, reason="the noise of the canary's batches is not known")
    stretch = float(covered[steps[-1]]) / reached
    gap = float(curves[FEWER][-1] - main[-1]) if FEWER in curves else 0.0
    prior, luck = doubt**2 + max(0.0, gap**2 - apart**2), (noise * stretch) ** 2
    weight = prior / (prior + luck) if prior + luck > 0 else 0.0
    change = weight * difference / reached
    out = main + change * covered[list(steps)]
    if root:
        out = out.clamp_min(0).square()
    curve = Trend(steps, tuple(out.tolist())) if bool(torch.isfinite(out).all()) else None
    return known(float(out[-1]), unit, price, "the canary or the path left the range of numbers", curve)


def _between(steps: tuple[int, ...], values: Tensor, covered: Tensor, step: int) -> float:
    """A curve at a step between those of the grid, linear in flow time from zero at the anchor."""
    at = [0.0, *(float(covered[s]) for s in steps)]
    known_values: list[float] = [0.0, *values.tolist()]
    here = float(covered[step])
    for (left, low), (right, high) in zip(
        zip(at, known_values, strict=True), zip(at[1:], known_values[1:], strict=True), strict=False
    ):
        if here <= right:
            return low + (high - low) * (here - left) / (right - left) if right > left else high
    return known_values[-1]


def _price(case: Case) -> float:
    path = case.measured.paths.get(REHEARSED)
    points = {"forward": float(len(path.steps) if path is not None else 0) + 1}
    gradients = case.measured.rehearsal_passes + canary_steps(case) / len(case.batches)
    return passes(case, tuning={"forward_backward": gradients}, safety=points, margin=points)
