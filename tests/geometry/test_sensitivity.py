"""The safety subspace against numpy's eigendecomposition of the dense Fisher matrix."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacrev
from torch.testing import assert_close

from tiltmeter.errors import DegenerateError
from tiltmeter.geometry.objective import FunctionObjective, SoftmaxFunction
from tiltmeter.geometry.sensitivity import (
    DenseBasis,
    Sensitivity,
    gram_matrix,
    lanczos_sensitivity,
    measure_sensitivity,
    projector,
    rank_by_energy,
    spectrum_of,
    split_half_overlap,
)
from tiltmeter.geometry.space import ParameterSpace

SCALES = pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(jacobian: Tensor) -> FunctionObjective:
    return FunctionObjective(lambda x: jacobian @ x, torch.zeros(jacobian.shape[1], dtype=jacobian.dtype))


def dense_top(fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    values, vectors = np.linalg.eigh(fisher.numpy())
    return torch.tensor(values[::-1][:rank].copy()), torch.tensor(vectors[:, ::-1][:, :rank].copy())


@SCALES
@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 9), (6, 6)])
def test_sample_basis_is_the_dense_eigenbasis(scale: float, m: int, n: int) -> None:
    g = scale * normal(m, m, n)
    sensitivity = measure_sensitivity(linear(g), 3)
    values, vectors = dense_top(g.T @ g / m, 3)
    assert_close(sensitivity.eigenvalues, values)
    assert_close(sensitivity.trace, float((g.T @ g / m).trace()))
    assert sensitivity.rank == 3
    theta = normal(1, n)
    z = sensitivity.coordinates(theta)
    assert_close(z.abs(), (vectors.T @ theta).abs())
    assert_close(projector(sensitivity.basis)(theta), vectors @ (vectors.T @ theta))
    columns = torch.stack([sensitivity.lift(unit) for unit in torch.eye(3, dtype=torch.float64)], 1)
    assert_close(columns.T @ columns, torch.eye(3, dtype=torch.float64))
    assert_close(columns @ z, vectors @ (vectors.T @ theta))
    # energy: 1/2 theta' F theta inside the subspace, by the dense matrix
    inside = vectors @ (vectors.T @ theta)
    assert_close(sensitivity.energy(z), inside @ (g.T @ g / m) @ inside / 2)
    assert_close(sensitivity.energy(torch.stack([z, 2 * z])), sensitivity.energy(z) * torch.tensor([1.0, 4.0]).double())


@SCALES
def test_dense_basis_does_what_sample_basis_does(scale: float) -> None:
    g = scale * normal(0, 6, 8)
    sampled = measure_sensitivity(linear(g), 4)
    columns = tuple(sampled.lift(unit) for unit in torch.eye(4, dtype=torch.float64))
    dense = DenseBasis(sampled.basis.space, columns)
    theta, z = normal(1, 8), normal(2, 4)
    assert_close(dense.coordinates(theta), sampled.coordinates(theta))
    assert_close(dense.lift(z), sampled.lift(z))


@SCALES
def test_gram_matrix(scale: float) -> None:
    g = scale * normal(3, 4, 6)
    assert_close(gram_matrix(linear(g)), g @ g.T)


def test_given_gram_matrix_is_used() -> None:
    g = normal(3, 4, 6)
    assert_close(
        measure_sensitivity(linear(g), 2, 9 * (g @ g.T)).eigenvalues, 9 * measure_sensitivity(linear(g), 2).eigenvalues
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_examples_are_told_in_full(dtype: torch.dtype) -> None:
    """Ten examples in three dimensions determine three directions."""
    objective = linear(normal(4, 10, 3).to(dtype))
    assert measure_sensitivity(objective, 3).rank == 3
    with pytest.raises(DegenerateError) as caught:
        measure_sensitivity(objective, 5)
    said = str(caught.value)
    assert "asked for 5 sensitive directions but the 10 safety examples determine only 3" in said
    assert "is below rounding). Add safety examples or ask for rank <= 3." in said


@pytest.mark.parametrize("rank", [0, -1])
def test_no_directions_asked_for(rank: int) -> None:
    with pytest.raises(DegenerateError):
        measure_sensitivity(linear(normal(4, 10, 3)), rank)


def test_scores_that_are_all_zero_determine_nothing() -> None:
    with pytest.raises(DegenerateError, match="determine only 0"):
        measure_sensitivity(linear(torch.zeros(4, 3, dtype=torch.float64)), 1)


def test_columns_of_rounding_noise_are_zero() -> None:
    g = normal(4, 6, 2)
    values, coefficients = spectrum_of(g @ g.T)
    assert_close(coefficients[:, 2:], torch.zeros(6, 4, dtype=torch.float64))
    assert bool((values >= 0).all())
    assert_close(g.T @ coefficients[:, :2] @ (g.T @ coefficients[:, :2]).T, torch.eye(2, dtype=torch.float64))


@SCALES
def test_lanczos_finds_the_exact_fisher_matrix(scale: float) -> None:
    a, anchor = scale * normal(5, 4, 5, 7), normal(6, 7) / scale
    kl = SoftmaxFunction(lambda x: a @ x, anchor)
    p = torch.softmax(a @ anchor, -1)
    s = jacrev(lambda x: torch.log_softmax(a @ x, -1))(anchor)
    fisher = torch.einsum("my,myi,myj->ij", p, s, s) / 4
    values, vectors = dense_top(fisher, 7)
    rank = 3
    found = lanczos_sensitivity(kl, rank, 7, seed=3)
    assert found.trace is None
    assert_close(found.eigenvalues, values[:rank], rtol=1e-6, atol=0)
    assert_close(
        projector(found.basis)(anchor), vectors[:, :rank] @ (vectors[:, :rank].T @ anchor), rtol=1e-5, atol=1e-7
    )


def test_lanczos_says_when_there_is_too_little_curvature() -> None:
    g = normal(4, 2, 6)
    bowl = FunctionObjective(lambda x: (g @ x) ** 2 - (x[:1] ** 2) * 0, torch.zeros(6, dtype=torch.float64))
    assert lanczos_sensitivity(bowl, 2, 6).rank == 2
    with pytest.raises(DegenerateError, match="found only 2 of positive curvature"):
        lanczos_sensitivity(bowl, 3, 6)


@pytest.mark.parametrize(("m", "rank"), [(12, 3), (13, 2)])
def test_split_half_overlap_is_that_of_explicit_subspaces(m: int, rank: int) -> None:
    g = normal(7, m, 20)
    got = split_half_overlap(g @ g.T, rank, splits=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    for value in got:
        order = torch.randperm(m, generator=generator)
        spaces = [torch.linalg.svd(g[half])[2][:rank] for half in (order[: m // 2], order[m // 2 :])]
        assert_close(value, (spaces[0] @ spaces[1].T).square().sum() / rank)


def test_split_half_overlap_of_a_repeated_sample_is_one() -> None:
    g = normal(8, 3, 20)
    g = torch.cat([g] * 40)
    assert float(split_half_overlap(g @ g.T, 3, splits=2).min()) == pytest.approx(1.0)


def test_split_half_overlap_of_unrelated_scores_is_rank_over_n() -> None:
    n, rank, samples = 40, 4, 30
    means = [
        float(split_half_overlap((g := normal(100 + i, 24, n)) @ g.T, rank, splits=4, seed=i).mean())
        for i in range(samples)
    ]
    error = float(np.std(means, ddof=1)) / math.sqrt(samples)
    assert abs(float(np.mean(means)) - rank / n) < 3.3 * error
    assert error < 0.01


def test_split_half_overlap_leaves_out_directions_that_do_not_exist() -> None:
    """Halves of four examples in two dimensions share their plane, whatever rank was asked for."""
    g = normal(9, 8, 2)
    assert_close(split_half_overlap(g @ g.T, 3, splits=2), torch.ones(2, dtype=torch.float64))


def test_rank_by_energy() -> None:
    spectrum = torch.tensor([6.0, 3.0, 1.0])
    assert [rank_by_energy(spectrum, share) for share in (0.1, 0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_energy_is_half_lambda_z_squared() -> None:
    space = ParameterSpace(("x",), ((2,),))
    columns = (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    values = torch.tensor([4.0, 0.5], dtype=torch.float64)
    assert float(Sensitivity(values, values, None, DenseBasis(space, columns)).energy(torch.tensor([3.0, 2.0]))) == 19.0
