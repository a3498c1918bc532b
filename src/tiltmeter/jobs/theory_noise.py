"""Claims about mini-batch noise: what it adds to the drift, and what it does to squares of noisy means."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from tiltmeter.geometry.clock import Clock
from tiltmeter.geometry.motion import between_groups
from tiltmeter.geometry.systems import DOUBLE, CurvedSoftmax, Quadratic
from tiltmeter.jobs.theory_claim import OURS, SCALES, Claim, each, measure


def noise_claims(seed: int) -> list[Claim]:
    """All claims of this file."""
    return [_walk(seed), _square_of_mean(seed), _unbiased(seed), _coupling(seed), _correlated(seed), _four_parts(seed)]


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def _model(seed: int) -> tuple[CurvedSoftmax, Tensor]:
    """A safety model with flat logits and its Fisher matrix by hand."""
    model = CurvedSoftmax.random(1, 4, 4, seed)
    model = CurvedSoftmax(model.bias, model.slopes, torch.zeros_like(model.bends))
    return model, model.fisher(torch.zeros(4, dtype=DOUBLE)).mean(0)


def _walk(seed: int) -> Claim:
    """Every one of the 3^4 orders in which 4 steps can draw 3 batches, averaged exactly."""
    steps, count = 4, 3

    def pair(scale: float) -> tuple[float, float]:
        model, fisher = _model(seed)
        noise = scale * _draw(seed + 1, count, 4)
        noise = noise - noise.mean(0)
        slope = _draw(seed + 2, 4)
        rates = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DOUBLE) * 1e-2
        picks = torch.tensor(list(itertools.product(range(count), repeat=steps)))
        ends = -torch.einsum("k,wki->wi", rates, slope + noise[picks])
        walked = float(torch.einsum("wi,ij,wj->w", ends, fisher, ends).mean()) / 2
        straight = float(rates.sum()) ** 2 * float(slope @ fisher @ slope) / 2

        tuning = Quadratic(slope, torch.zeros(4, 4, dtype=DOUBLE), noise, torch.zeros(count, 4, 4, dtype=DOUBLE))
        forms = measure(tuning.objective, model.safety, groups=count).coupling.overlap_groups
        single = torch.diagonal(forms, dim1=1, dim2=2).mean(-1)
        # the scatter of 3 batches around their own mean is a share 2/3 of one batch's covariance
        trace = float((single - between_groups(forms)).mean()) * (count - 1) / count
        return walked - straight, trace * float(Clock(rates).squared_rates[-1]) / 2

    return Claim(
        "noise-walk",
        "Independent batch noise adds 1/2 tr(F Sigma) sum eta^2 (1/2 eta^2 k tr(F Sigma)) to the expected KL.",
        OURS,
        "linear loss, all 81 orders of 3 batches in 4 steps, mean of x'Fx/2 less the noiseless part; scale = noise",
        **each(pair),
        tolerance=1e-6,
    )


def _noisy(seed: int, scale: float, hessian_noise: float) -> tuple[Quadratic, Tensor, Tensor]:
    """A quadratic loss, the noise n of a batch gradient and the noise N of its Hessian."""
    slope, noise = _draw(seed + 2, 4), scale * _draw(seed + 3, 4)
    turned = hessian_noise * _draw(seed + 4, 4, 4)
    return Quadratic.with_spectrum(slope, [2.0, 1.0, -0.5, 0.3], seed), noise, turned + turned.T


@lru_cache(maxsize=16)
def _means(seed: int, scale: float, hessian_noise: float = 0.0, count: int = 2) -> dict[str, float]:
    """Means over all signs s that the noise of `count` batches can have, each batch with gradient s n and Hessian s N.

    `overlap` and `coupling` as measured, `plain` the square of the mean gradient.
    """
    model = _model(seed)[0]
    base, noise, turned = _noisy(seed, scale, hessian_noise)
    seen = []
    for signs in itertools.product((-1.0, 1.0), repeat=count):
        s = torch.tensor(signs, dtype=DOUBLE)
        tuning = Quadratic(base.slope, base.hessian, s[:, None] * noise, s[:, None, None] * turned)
        coupling = measure(tuning.objective, model.safety).coupling
        seen.append([coupling.overlap.mean(), coupling.coupling.mean(), coupling.overlap_groups.mean()])
    means = torch.tensor(seen, dtype=DOUBLE).mean(0).tolist()
    return dict(zip(("overlap", "coupling", "plain"), means, strict=True))


def _square_of_mean(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        fisher, (base, noise, _) = _model(seed)[1], _noisy(seed, scale, 0.0)
        biased = base.slope @ fisher @ base.slope + noise @ fisher @ noise / 2
        return float(biased), _means(seed, scale)["plain"]

    return Claim(
        "square-of-mean",
        "The square of a mean over B batches is too large by tr(F Sigma) / B.",
        OURS,
        "two batches, all four signs of their noise; scale = noise / gradient",
        **each(pair, SCALES),
        tolerance=1e-8,
    )


def _unbiased(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        slope = _draw(seed + 2, 4)
        return float(slope @ _model(seed)[1] @ slope), _means(seed, scale)["overlap"]

    return Claim(
        "unbiased-overlap",
        "Products of different batches have no such bias: their mean is e0^2 at any noise.",
        OURS,
        "the same four cases, measured overlap; scale = noise / gradient",
        **each(pair, SCALES),
        tolerance=1e-8,
    )


def _coupling(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        base = _noisy(seed, scale, 0.0)[0]
        turned = base.hessian @ base.slope
        return float(turned @ _model(seed)[1] @ turned), _means(seed, scale)["coupling"]

    return Claim(
        "unbiased-coupling",
        "gamma^2 from cross products H_1 g_2 and H_2 g_1 has no bias from noise in the gradients.",
        OURS,
        "the same four cases, measured gamma^2; scale = noise / gradient",
        **each(pair),
        tolerance=1e-8,
    )


def _correlated(seed: int) -> Claim:
    """(H_1 g_2)' F (H_2 g_1) holds H_1 together with g_1, so E[H_1 g_1'] = H g' + N n' enters twice."""

    def pair(scale: float) -> tuple[float, float]:
        fisher, (base, noise, turned) = _model(seed)[1], _noisy(seed, 0.5, scale)
        mixed = torch.einsum("ba,d->bad", base.hessian, base.slope) + torch.einsum("ba,d->bad", turned, noise)
        exact = torch.einsum("bad,bc,cda->", mixed, fisher, mixed)
        return float(exact), _means(seed, 0.5, scale)["coupling"]

    return Claim(
        "correlated-coupling",
        "Two halves are not enough where a batch's Hessian noise N goes with its gradient noise n: gamma^2 is biased.",
        OURS,
        "two batches with n and N of one sign; mean of measured gamma^2 against the sum by hand; scale = Hessian noise",
        **each(pair, (1e-2, 0.3, 1.0)),
        tolerance=1e-8,
    )


def _four_parts(seed: int) -> Claim:
    def pair(scale: float) -> tuple[float, float]:
        base = _noisy(seed, 0.5, scale)[0]
        turned = base.hessian @ base.slope
        return float(turned @ _model(seed)[1] @ turned), _means(seed, 0.5, scale, count=4)["coupling"]

    return Claim(
        "four-parts",
        "Four parts are enough: (H_1 g_2 + H_2 g_1) and (H_3 g_4 + H_4 g_3) share no data, and gamma^2 is unbiased.",
        OURS,
        "four batches with n and N of one sign, all sixteen signs; mean of measured gamma^2; scale = Hessian noise",
        **each(pair, (1e-2, 0.3, 1.0)),
        tolerance=1e-8,
    )
