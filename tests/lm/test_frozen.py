"""Known zeros are skipped in forward mode and change no value, in models of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import KINDS
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from tiltmeter.lm import frozen
from tiltmeter.lm.frozen import KERNELS, frozen_weights


def case(kind: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    """A model of which one matrix in the first layer is differentiated, so that most weights are frozen."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval().double().requires_grad_(False)
    name = next(n for n, p in model.named_parameters() if p.ndim == 2 and ("q_proj" in n or "c_attn" in n))
    start = {name: model.get_parameter(name).detach().clone()}
    along = {name: torch.randn_like(start[name])}
    tokens = torch.randint(1, 40, (2, 7))

    def logits(at: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(model, at, (), {"input_ids": tokens, "use_cache": False}).logits
        return out

    return model, start, along, logits


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_and_batches_of_them_are_what_they_were(kind: str) -> None:
    _, start, along, logits = case(kind)
    (name,) = start
    many = torch.randn(3, *start[name].shape, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def slope(t: Tensor) -> Tensor:
        derivative: Tensor = jvp(lambda s: logits({name: start[name] + s * along[name]}), (t,), (one,))[1]
        return derivative

    def all_of_them() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            first = jvp(logits, (start,), (along,))
            batch = vmap(lambda v: jvp(logits, (start,), ({name: v},))[1])(many)
            second = jvp(slope, (0 * one,), (one,))[1]
        return [*first, batch, second]

    expected = all_of_them()
    with frozen_weights():
        found = all_of_them()
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 1e-6
        assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_products_with_frozen_weights_are_skipped_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    # per layer of a llama: q, k, v, o, gate, up and down; then the output layer. The first layer's q is differentiated
    # and its k and v see inputs without a tangent
    _, start, along, logits = case("llama")
    skipped = []

    def counted(one: Tensor, other: Tensor) -> Tensor:
        skipped.append(other.shape)
        return KERNELS["mm"](one, other)

    monkeypatch.setattr(frozen, "KERNELS", {**KERNELS, "mm": counted})
    with sdpa_kernel(SDPBackend.MATH), frozen_weights():
        jvp(logits, (start,), (along,))
    # the first q has a tangent of its weight and none of its input; k and v have neither, and are not asked
    assert len(skipped) == 1 + (4 + 7 + 1)


@pytest.mark.parametrize("alpha", [1, -2.5])
def test_sums_and_products_with_known_zeros(alpha: float) -> None:
    x, scalar = torch.randn(3, 4), torch.tensor(2.0, dtype=torch.float64)
    zero, row = torch._efficientzerotensor((3, 4)), torch._efficientzerotensor((4,))
    with frozen_weights():
        assert (x * zero)._is_zerotensor()
        assert (row * x).shape == (3, 4)
        assert torch.equal(torch.add(x, zero, alpha=alpha), x)
        assert torch.equal(torch.add(zero, x, alpha=alpha), alpha * x)
        assert torch.equal(torch.add(row, x, alpha=alpha), alpha * x)
        assert torch.equal(torch.add(x[0], zero, alpha=alpha), x[0].expand(3, 4))
        assert torch.add(zero, row, alpha=alpha)._is_zerotensor()
        assert (scalar * zero).dtype == torch.float32
        assert torch.add(torch._efficientzerotensor((3, 4)), x.double()).dtype == torch.float64
        apart = torch.add(x, zero)
    assert apart.data_ptr() != x.data_ptr()  # who adds in place must not change x


def test_torch_is_left_as_it_was(recwarn: pytest.WarningsRecorder) -> None:
    def products() -> tuple[bool, bool]:
        zero = torch._efficientzerotensor((2, 2))
        return (zero @ torch.eye(2))._is_zerotensor(), (zero * torch.eye(2))._is_zerotensor()

    before = products()
    with frozen_weights():
        assert products() == (True, True)
    assert products() == before
    with pytest.raises(RuntimeError, match="no"), frozen_weights():
        raise RuntimeError("no")
    assert products() == before
    assert not [w for w in recwarn if "kernel" in str(w.message)]
    linear = nn.Linear(2, 2)
    assert_close(jvp(linear, (torch.ones(1, 2),), (torch.ones(1, 2),))[1], linear.weight.sum(1)[None])
