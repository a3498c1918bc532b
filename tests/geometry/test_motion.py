"""Slopes, acceleration and coupling against dense derivatives, and unbiasedness by simulation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev
from torch.testing import assert_close

from tiltmeter.errors import DegenerateError, NumericalError
from tiltmeter.geometry import motion
from tiltmeter.geometry.motion import (
    Acceleration,
    Slope,
    between_groups,
    measure_acceleration,
    measure_coupling,
    measure_krylov,
    measure_slope,
)
from tiltmeter.geometry.objective import FunctionObjective, SoftmaxFunction

SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
N, M = 5, 12


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(scale: float = 1.0) -> FunctionObjective:
    a, b = normal(0, M, N), normal(1, M, N)
    return FunctionObjective(lambda x: scale * (torch.sin(a @ x) + (b @ x) ** 3 / 6), normal(2, N))


def batches(count: int) -> Tensor:
    """Disjoint batches of M / count examples each."""
    return torch.eye(count, dtype=torch.float64).repeat_interleave(M // count, 1) * count / M


@SCALES
@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("displaced", [False, True])
def test_slope_is_mean_and_population_spread_of_dense_gradients(scale: float, count: int, displaced: bool) -> None:
    loss, where = objective(scale), normal(3, N) if displaced else None
    at = loss.anchor if where is None else loss.anchor + where
    gradients = (batches(count) @ jacrev(loss.function)(at)).numpy()
    slope = measure_slope(loss, batches(count), displacement=where)
    assert_close(slope.mean.numpy(), gradients.mean(0))
    assert_close(slope.spread.numpy(), gradients.std(0), rtol=1e-6, atol=1e-9 * scale)
    assert_close(slope.norms.numpy(), np.linalg.norm(gradients, axis=1))
    members = np.array_split(np.arange(count), 4)
    for group, weights, chosen in zip(slope.groups, slope.group_weights, members, strict=True):
        assert_close(group.numpy(), gradients[chosen].mean(0))
        assert_close(weights, batches(count)[chosen].mean(0))


@SCALES
def test_slope_clips_every_batch_as_torch_does(scale: float) -> None:
    loss, count = objective(scale), 6
    gradients = batches(count) @ jacrev(loss.function)(loss.anchor)
    clip = float(gradients.norm(dim=1).median())
    clipped = []
    for row in gradients:
        parameter = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        parameter.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([parameter], clip)
        clipped.append(parameter.grad)
    dense = torch.stack(clipped)
    slope = measure_slope(loss, batches(count), clip=clip)
    assert_close(slope.mean, dense.mean(0), rtol=1e-4, atol=1e-5 * scale)  # torch divides by norm + 1e-6
    assert_close(slope.spread, dense.std(0, correction=0), rtol=1e-4, atol=1e-4 * scale)
    assert_close(slope.norms, gradients.norm(dim=1))
    assert float((slope.mean - gradients.mean(0)).norm()) > 1e-3 * scale


def test_one_batch_has_no_spread_and_one_group() -> None:
    slope = measure_slope(objective(), batches(1))
    assert_close(slope.spread, torch.zeros(N, dtype=torch.float64))
    assert len(slope.groups) == 1
    assert_close(slope.groups[0], slope.mean)
    with pytest.raises(DegenerateError, match="at least two tuning batches"):
        measure_acceleration(objective(), slope)


def test_no_batch_at_all() -> None:
    with pytest.raises(DegenerateError, match="got none"):
        measure_slope(objective(), torch.zeros(0, M, dtype=torch.float64))


def test_gradient_that_is_not_finite() -> None:
    loss = FunctionObjective(lambda x: x.log(), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(NumericalError, match="tuning batch 0"):
        measure_slope(loss, torch.eye(2, dtype=torch.float64))


@SCALES
@pytest.mark.parametrize(("count", "groups"), [(2, 4), (3, 4), (4, 4), (6, 4), (12, 5)])
def test_acceleration_is_the_dense_cross_product(scale: float, count: int, groups: int) -> None:
    loss = objective(scale)
    slope = measure_slope(loss, batches(count), groups=groups)
    members = np.array_split(np.arange(count), min(groups, count))
    weights = torch.stack([batches(count)[chosen].mean(0) for chosen in members])
    jacobian, curvature = jacrev(loss.function)(loss.anchor), hessian(loss.function)(loss.anchor)
    parts = np.array_split(np.arange(len(members)), 4 if len(members) >= 4 else 2)
    w = [weights[part].mean(0) for part in parts]
    h, g = [torch.einsum("m,mij->ij", x, curvature) for x in w], [x @ jacobian for x in w]
    if len(parts) == 2:
        first, second = h[0] @ g[1], h[1] @ g[0]
    else:
        first, second = (h[0] @ g[1] + h[1] @ g[0]) / 2, (h[2] @ g[3] + h[3] @ g[2]) / 2
    got = measure_acceleration(loss, slope)
    assert_close(got.value, (first + second) / 2)
    assert_close(got.half_difference, (first - second) / 2)


class Regression:
    """Squared errors (a.x - y)^2 / 2 at x = 0, with products by hand: H = a a', g = -a y."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def hvp(self, v: Tensor, weights: Tensor) -> Tensor:
        return self.inputs.T @ (weights * (self.inputs @ v))


def squared_acceleration(groups: int, trials: int) -> Tensor:
    """Estimates of ||H g||^2 from fresh data, 16 examples a group."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(trials):
        a = 0.3 + torch.randn(16 * groups, 3, generator=generator, dtype=torch.float64)
        y = -(a[:, 0] + 0.5 + torch.randn(16 * groups, generator=generator, dtype=torch.float64))
        w = torch.eye(groups, dtype=torch.float64).repeat_interleave(16, 1) / 16
        slopes = -(w * y) @ a
        slope = Slope(slopes.mean(0), slopes.std(0), tuple(slopes), w, slopes.norm(dim=1))
        got = measure_acceleration(Regression(a, y), slope)  # type: ignore[arg-type]
        out.append(got.value.square().sum() - got.half_difference.square().sum())
    return torch.stack(out)


def test_coupling_is_unbiased_from_four_groups_and_not_from_two() -> None:
    """The Hessian and the gradient of one example are correlated; z-score at fixed N."""
    mean = torch.full((3,), 0.3, dtype=torch.float64)
    h = torch.eye(3, dtype=torch.float64) + torch.outer(mean, mean)
    truth = float((h @ (h[:, 0] + 0.5 * mean)).square().sum())
    for groups, biased in ((4, False), (2, True)):
        got = squared_acceleration(groups, 400)
        z = (float(got.mean()) - truth) / (float(got.std()) / math.sqrt(len(got)))
        assert z > 4 if biased else abs(z) < 3


def test_krylov_starts_from_the_mean_gradient() -> None:
    loss = objective()
    curvature = hessian(loss.function)(loss.anchor).mean(0)
    slope = measure_slope(loss, batches(4))
    krylov = measure_krylov(loss, slope, N)
    assert_close(krylov.apply(lambda x: x), curvature @ slope.mean)
    assert_close(krylov.ritz()[0], torch.linalg.eigvalsh(curvature))


def safety(scale: float) -> SoftmaxFunction:
    a, b = normal(4, 3, 4, N), normal(5, 3, 4, N)
    anchor = normal(6, N)
    return SoftmaxFunction(lambda x: scale * (a @ (x - anchor)) + (scale * b @ (x - anchor)) ** 2 / 2, anchor)


@SCALES
def test_coupling_against_dense_scores(scale: float) -> None:
    kl = safety(scale)

    def log_p(x: Tensor) -> Tensor:
        return torch.log_softmax(kl.logits(x), -1)

    p, s, curvature = log_p(kl.anchor).exp(), jacrev(log_p)(kl.anchor), hessian(log_p)(kl.anchor)
    fisher = torch.einsum("my,myi,myj->mij", p, s, s)
    groups = tuple(normal(10 + j, N) for j in range(3))
    g = torch.stack(groups).mean(0)
    a, d = normal(20, N), 0.3 * normal(21, N)
    slope = Slope(g, torch.zeros(N), groups, torch.ones(3, 1), torch.ones(3))
    got = measure_coupling(kl, slope, Acceleration(a, d))
    forms = torch.einsum("ki,mij,lj->mkl", torch.stack(groups), fisher, torch.stack(groups))
    assert_close(got.overlap_groups, forms)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    assert_close(got.overlap, torch.stack([forms[:, i, j] for i, j in pairs]).mean(0))
    noise = torch.einsum("i,mij,j->m", d, fisher, d)
    assert_close(got.coupling, torch.einsum("i,mij,j->m", a, fisher, a) - noise)
    first = -(s @ g)
    second = s @ a + torch.einsum("i,myij,j->my", g, curvature, g)
    mean_second = (p * second).sum(-1, keepdim=True)
    assert_close(got.cross, (p * first * (second - mean_second)).sum(-1))
    assert_close(got.full, (p * (second - mean_second) ** 2).sum(-1) - noise)
    t = torch.tensor([0.1, 2.0], dtype=torch.float64)
    expected = torch.stack([(got.overlap * x**2 + got.cross * x**3 + got.full * x**4 / 4) / 2 for x in t])
    assert_close(got.polynomial(t), expected)


def test_full_is_the_quartic_constant_of_the_true_kl() -> None:
    """With F g = 0 the KL along -t g + t^2/2 a is t^4 Gamma^2 / 8 + O(t^5), by evaluating the KL itself."""
    a, b = normal(4, 3, 4, N).clone(), normal(5, 3, 4, N)
    g, turn = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64), normal(6, N)
    a[..., 0] = 0  # no logit feels g to first order
    kl = SoftmaxFunction(lambda x: a @ x + (b @ x) ** 2 / 2, torch.zeros(N, dtype=torch.float64))
    slope = Slope(g, torch.zeros(N), (g, g), torch.ones(2, 1), torch.ones(2))
    got = measure_coupling(kl, slope, Acceleration(turn, torch.zeros(N, dtype=torch.float64)))
    assert_close(got.overlap, torch.zeros(3, dtype=torch.float64))
    assert float((got.full / got.coupling - 1).abs().min()) > 0.05  # gamma alone would be wrong

    def rest(t: float) -> Tensor:
        return kl.losses(-t * g + t**2 / 2 * turn) / t**4

    # two Richardson steps remove t^5 and t^6
    once = [2 * rest(t) - rest(2 * t) for t in (4e-3, 8e-3)]
    assert_close((4 * once[0] - once[1]) / 3, got.full / 8, rtol=1e-4, atol=0)


def test_between_groups_is_unbiased_and_the_plain_square_is_not() -> None:
    """True e0^2 of means under noise, z-score at fixed N; the plain square is trace(F Sigma) / J too large."""
    trials, j = 4000, 4
    fisher = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.1, 3.0], dtype=torch.float64))
    mean = torch.tensor([0.3, -0.2, 0.5, 1.0, 0.0], dtype=torch.float64)
    v = mean + normal(0, trials, j, N)
    got = between_groups(torch.einsum("mki,ij,mlj->mkl", v, fisher, v))
    truth = float(mean @ fisher @ mean)
    z = (float(got.mean()) - truth) / (float(got.std()) / math.sqrt(trials))
    assert abs(z) < 3
    centre = v.mean(1)
    plain = torch.einsum("mi,ij,mj->m", centre, fisher, centre)
    bias = float(fisher.trace()) / j
    assert abs(float(plain.mean()) - truth - bias) < 3 * float(plain.std()) / math.sqrt(trials)
    assert float(plain.mean()) - truth > 20 * float(plain.std()) / math.sqrt(trials)


def test_between_groups_of_one_group_is_the_plain_square() -> None:
    assert_close(between_groups(torch.tensor([[[4.0]], [[9.0]]])), torch.tensor([4.0, 9.0]))


@pytest.mark.parametrize("n", [1, 2**20, 2**20 + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_half_sum_and_half_difference_piece_by_piece(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    one = torch.randn(n, generator=generator, dtype=torch.float64)
    other = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    mean, half = (one + other.double()) / 2, (other.double() - one) / 2
    found = motion._halve(one, other)
    assert_close(one, mean)
    assert found.dtype == dtype
    assert_close(found, half.to(dtype))
