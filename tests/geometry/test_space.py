"""Flat vectors against named tensors, and inner products against math.fsum."""

import math

import pytest
import torch
from torch.testing import assert_close

from tiltmeter.errors import SpaceMismatch
from tiltmeter.geometry.space import PIECE, ParameterSpace, dot, norm, products

SPACE = ParameterSpace(("b", "a", "c"), ((2, 3), (), (4,)))


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(7.0), "b": torch.arange(6.0).view(2, 3), "c": -torch.ones(4), "unused": torch.ones(9)}


def test_flatten_keeps_the_order_of_names_and_split_undoes_it() -> None:
    flat = SPACE.flatten(tensors())
    assert_close(flat, torch.tensor([0.0, 1, 2, 3, 4, 5, 7, -1, -1, -1, -1]))
    back = SPACE.split(flat)
    assert list(back) == ["b", "a", "c"]
    for name, tensor in back.items():
        assert_close(tensor, tensors()[name])
    assert back["b"].data_ptr() == flat.data_ptr()


def test_slices_tile_the_vector() -> None:
    assert [(name, part.start, part.stop) for name, part, _ in SPACE.slices()] == [
        ("b", 0, 6),
        ("a", 6, 7),
        ("c", 7, 11),
    ]
    assert SPACE.size == 11
    assert ParameterSpace((), ()).size == 0


def test_digest_tells_order_and_shape_apart() -> None:
    assert ParameterSpace.of({"x": torch.ones(2, 3)}) == ParameterSpace(("x",), ((2, 3),))
    digests = {
        ParameterSpace(names, shapes).digest
        for names, shapes in [
            (("a", "b"), ((2,), (3,))),
            (("b", "a"), ((2,), (3,))),
            (("a", "b"), ((3,), (2,))),
            (("a", "b"), ((2, 1), (3,))),
        ]
    }
    assert len(digests) == 4
    assert all(len(digest) == 16 for digest in digests)


def test_mismatches_say_what_came() -> None:
    with pytest.raises(SpaceMismatch, match=r"'c': expected shape \(4,\), got nothing"):
        SPACE.flatten({name: value for name, value in tensors().items() if name != "c"})
    with pytest.raises(SpaceMismatch, match=r"'b': expected shape \(2, 3\), got \(3, 2\)"):
        SPACE.flatten({**tensors(), "b": torch.ones(3, 2)})
    with pytest.raises(SpaceMismatch, match="expected a vector of 11"):
        SPACE.split(torch.ones(12))
    with pytest.raises(SpaceMismatch, match="1 parameter names but 2 shapes"):
        ParameterSpace(("a",), ((1,), (2,)))
    with pytest.raises(SpaceMismatch, match="twice"):
        ParameterSpace(("a", "a"), ((1,), (2,)))
    with pytest.raises(SpaceMismatch, match="built on different parameters"):
        SPACE.require_same(ParameterSpace(("a", "b", "c"), ((2, 3), (), (4,))))
    SPACE.require_same(ParameterSpace(SPACE.names, SPACE.shapes))


@pytest.mark.parametrize("n", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dot_keeps_its_promise_at_every_length(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) + 0.1 for _ in "ab")
    exact = math.fsum((a.double() * b.double()).tolist())
    size = math.sqrt(math.fsum(a.double().square().tolist()) * math.fsum(b.double().square().tolist()))
    assert abs(dot(a, b) - exact) <= (1e-6 if dtype == torch.float32 else 1e-14) * size
    assert_close(norm(a), math.sqrt(math.fsum(a.double().square().tolist())), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [7, PIECE, 3 * PIECE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_all_the_inner_products(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    rows, others = (torch.randn(k, n, generator=generator).to(dtype) for k in (3, 2))
    d = torch.rand(n, generator=generator) + 1
    dense = (rows.double() * d.double()) @ others.double().T
    assert_close(products(tuple(rows), tuple(others), d), dense, atol=1e-5 * n**0.5, rtol=0)
    assert_close(products(tuple(rows), tuple(others)), rows.double() @ others.double().T, atol=1e-5 * n**0.5, rtol=0)
