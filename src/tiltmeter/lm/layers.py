"""Record, wherever a model uses a parameter, what its per-example gradients are made of.

No module is touched. `Recorder` watches the torch functions that the model calls, and acts where one of them is given a
recorded parameter, whatever module or adapter that belongs to. `factors.py` says what it collects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from tiltmeter.lm.factors import Factor, Pieces, wide

#: Nodes looked at before a tensor is no longer taken for a plain function of one parameter, as 1 + w is.
_SHORT = 8


class _Tap(torch.autograd.Function):
    """The identity on `output`; on the way back `report` is told the gradient there and the saved tensor.

    Saving through autograd, rather than in a closure, lets gradient checkpointing drop and recompute the tensor and
    makes a change of it in place an error. The anchor only makes sure that the backward pass comes by.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, report: Callable[..., None], saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.report = report
        return output.detach()  # the same memory without a copy, and not a view, so that models may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.report(gradients[0], *ctx.saved_tensors)
        return None, gradients[0], None, None


class Recorder(TorchFunctionMode):
    """While active, collects the pieces of per-example gradients of `parameters`.

    Recognised are linear layers (`nn.Linear`, GPT-2's `Conv1D`), lookups, scaling or shifting by a vector (also by a
    function of one, as the 1 + w of Gemma), layer norm and RMS norm. Any other use stays in the autograd graph, where
    `reached` finds it: nothing is lost unnoticed. The batch must be the first axis of every activation.

    Attributes:
        anchor: a leaf to ask autograd the gradient of; it has none, but asking makes the backward pass visit every use.
        pieces: what was collected, by parameter name.
        used: names of the parameters that the model used.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], m: int, ready: Callable[[str], None]) -> None:
        """Record these parameters over m examples; `ready(name)` is told when the last batch has no more of one."""
        super().__init__()
        self.anchor = torch.zeros((), requires_grad=True)
        self.pieces = {name: Pieces(p.shape) for name, p in parameters.items()}
        self.used: set[str] = set()
        self._names = WeakIdKeyDictionary({p: name for name, p in parameters.items()})
        self._m, self._ready = m, ready
        self._first = self._b = 0
        self._forward = self._last = False
        self._open: Counter[str] = Counter()

    def stands_for(self, tensor: Tensor, name: str) -> None:
        """The model uses this leaf in the place of a parameter, as long as it lives."""
        self._names[tensor] = name

    def begin(self, first: int, b: int, last: bool) -> None:
        """A forward pass over examples `first` to `first + b` comes next."""
        self._first, self._b, self._last, self._forward = first, b, last, True
        self._open.clear()

    def end_forward(self, odd: Collection[str]) -> None:
        """The backward pass comes next; the gradients of the `odd` parameters will be completed by `add_rows`."""
        self._forward = False  # what gradient checkpointing runs again is not another use
        self._open.update(odd)
        self.used.update(odd)

    def reached(self, losses: Tensor) -> dict[str, list[Tensor]]:
        """Names of the parameters with a use that was not recorded, and the leaves there that stand for them."""
        out: dict[str, list[Tensor]] = {}
        for leaf in _leaves(losses.grad_fn):
            if leaf in self._names:
                out.setdefault(self._names[leaf], []).append(leaf)
        return out

    def add_rows(self, name: str, rows: Tensor) -> None:
        """Add gradients [b, size] of the present examples."""
        pieces = self.pieces[name]
        if pieces.rows is None:
            pieces.rows = rows.new_zeros(self._m, rows.shape[1])
        pieces.rows[self._first : self._first + len(rows)] += rows

    def _add_factor(self, name: str, factor: Factor, gradient: Tensor) -> None:
        packed = factor.packed(gradient)
        if packed is not None:
            self.pieces[name].factors.append(packed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a torch function, recorded if it uses a parameter in a way that is understood."""
        kwargs = kwargs or {}
        recorder = _RECORDERS.get(func)
        recorded = recorder(self, *args, **kwargs) if recorder else None
        return func(*args, **kwargs) if recorded is None else recorded

    def _tap(self, output: Tensor, names: Sequence[str | None], report: Callable[..., None], saved: Tensor) -> Tensor:
        """Have `report` called with the output's gradient and `saved` on the way back, and count the use till then."""
        used = [name for name in names if name]
        if self._forward:
            self._open.update(used)
            self.used.update(used)

        def close(gradient: Tensor, saved: Tensor) -> None:
            with torch.no_grad():
                report(gradient, saved)
            self._open.subtract(used)
            for name in used:
                if self._last and self._open[name] == 0:
                    self._ready(name)

        tapped: Tensor = _Tap.apply(self.anchor, output, close, saved)  # type: ignore[no-untyped-call]
        return tapped

    def _name_of(self, tensor: Tensor) -> str | None:
        name: str | None = self._names.get(tensor, None)  # type: ignore[no-untyped-call]
        return name

    def _named(self, *tensors: Tensor | None) -> list[str | None] | None:
        """Names of the recorded ones among the tensors; None if there are none, or if another one needs a gradient."""
        names = [None if t is None else self._name_of(t) for t in tensors]
        lost = any(t is not None and t.requires_grad and not name for t, name in zip(tensors, names, strict=True))
        return None if lost or not any(names) else names

    def _batch_first(self, x: Tensor, trailing: int = 1) -> bool:
        """Whether x, less its trailing axes, is known to run over the positions of one example after the other."""
        if self._b == 1:
            return True
        if x.ndim > 1 + trailing:
            return x.shape[0] == self._b and not isinstance(x, nn.Parameter)
        base = x._base  # [b t, d] is fine as a view of [b, t, d]; otherwise its rows may have been chosen or shuffled
        if base is None or base.ndim < 3 or base.shape[0] != self._b or base.numel() != x.numel():
            return False
        span = 1 + sum((size - 1) * step for size, step in zip(base.shape[1:], base.stride()[1:], strict=True))
        side_by_side = base.stride(0) * self._b == base.numel() and span <= base.stride(0)
        return x.is_contiguous() and side_by_side and x.storage_offset() == base.storage_offset()

    def _matrix(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor | None:
        """Record y = x W^T + b, or y = x W + b if transposed."""
        names = self._named(weight, bias)
        if names is None or weight.ndim != 2 or not self._batch_first(x):
            return None
        first, b, (matrix, vector) = self._first, self._b, names

        def report(gradient: Tensor, x: Tensor) -> None:
            gradient, x = gradient.reshape(b, -1, gradient.shape[-1]), x.reshape(b, -1, x.shape[-1])
            if matrix:
                factor = Factor(first, x, gradient) if transposed else Factor(first, gradient, x)
                self._add_factor(matrix, factor, gradient)
            if vector:
                self.add_rows(vector, _total(wide(gradient), b, 1))

        weight, bias = weight.detach(), bias if bias is None else bias.detach()
        plain = F.linear(x, weight.T if transposed else weight, bias)
        return self._tap(plain, names, report, x.detach())

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        return self._matrix(input, weight, bias, transposed=False)

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
        return None if scales or input.ndim != 1 else self._matrix(mat1, mat2, input, transposed=True)

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None, max_norm: float | None, **options: Any
    ) -> Tensor | None:
        """Record rows of a table; the row `padding_idx` is one that autograd never trains."""
        names = self._named(weight)
        if names is None or max_norm is not None or options["scale_grad_by_freq"] or input.ndim < 2:
            return None
        first, b, name = self._first, self._b, str(names[0])
        ids = input.expand(b, -1) if input.shape[0] == 1 and input.ndim == 2 else input  # one set of position ids
        if not self._batch_first(ids, trailing=0):
            return None

        def report(gradient: Tensor, ids: Tensor) -> None:
            ids, gradient = ids.reshape(b, -1), gradient.reshape(b, -1, gradient.shape[-1])
            if padding_idx is not None:
                gradient = gradient.masked_fill((ids == padding_idx % len(weight))[..., None], 0)
            self._add_factor(name, Factor(first, ids, gradient), gradient)

        return self._tap(F.embedding(ids, weight.detach()), [name], report, ids)

    def _mul(self, input: Any, other: Any, **out: Any) -> Tensor | None:
        return None if out else self._by_vector(torch.mul, input, other, lambda gradient, x: gradient * x)

    def _add(self, input: Any, other: Any, **scales: Any) -> Tensor | None:
        return None if scales else self._by_vector(torch.add, input, other, lambda gradient, x: gradient)

    def _by_vector(
        self, func: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any, slope: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor | None:
        """Record the scaling or shifting of activations by a vector that is, or is made from, one parameter."""
        x, vector = (b, a) if isinstance(a, Tensor) and a.ndim == 1 else (a, b)
        if not (isinstance(x, Tensor) and isinstance(vector, Tensor) and vector.requires_grad and vector.ndim == 1):
            return None
        leaves = [vector] if vector.is_leaf else _leaves(vector.grad_fn, _SHORT)
        name = self._name_of(leaves[0]) if len(leaves) == 1 else None
        if name is None or x.ndim < 2 or x.shape[-1] != len(vector) or not self._batch_first(x):
            return None
        examples, leaf = self._b, leaves[0]

        def report(gradient: Tensor, x: Tensor) -> None:
            rows = _total(slope(wide(gradient), wide(x)), examples, 1)
            if leaf is not vector:  # onward through 1 + w and the like
                with torch.enable_grad():
                    chain = [torch.autograd.grad(vector, leaf, row.to(vector), retain_graph=True)[0] for row in rows]
                rows = wide(torch.stack(chain))
            self.add_rows(name, rows)

        return self._tap(func(x, vector.detach()), [name], report, x.detach())

    def _layer_norm(
        self, input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor | None:
        """Record scale and shift of a layer norm."""
        plain = partial(F.layer_norm, normalized_shape=shape, eps=eps)
        return self._norm(plain, input, len(shape), weight=weight, bias=bias)

    def _rms_norm(self, input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor | None:
        """Record the scale of a fused RMS norm."""
        return self._norm(partial(F.rms_norm, normalized_shape=shape, eps=eps), input, len(shape), weight=weight)

    def _norm(self, norm: Callable[..., Tensor], x: Tensor, trailing: int, **vectors: Tensor | None) -> Tensor | None:
        names = self._named(*vectors.values())
        if names is None or not self._batch_first(x, trailing):
            return None
        b, scale, shift = self._b, names[0], names[1] if len(names) > 1 else None

        def report(gradient: Tensor, x: Tensor) -> None:
            gradient = wide(gradient)
            if scale:
                self.add_rows(scale, _total(gradient * norm(wide(x)), b, trailing))
            if shift:
                self.add_rows(shift, _total(gradient, b, trailing))

        plain = norm(x, **{key: t if t is None else t.detach() for key, t in vectors.items()})
        return self._tap(plain, names, report, x.detach())


_RECORDERS: dict[Any, Callable[..., Tensor | None]] = {
    F.dropout: lambda _, input, **options: input,  # layers that checkpoint think they are in training
    F.linear: Recorder._linear,
    torch.addmm: Recorder._addmm,
    F.embedding: Recorder._embedding,
    F.layer_norm: Recorder._layer_norm,
    F.rms_norm: Recorder._rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), Recorder._mul),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), Recorder._add),
}


def _total(x: Tensor, b: int, trailing: int) -> Tensor:
    """Sum over the positions of every example: [b, ..., trailing axes] -> [b, size]."""
    return x.reshape(b, -1, x.shape[x.ndim - trailing :].numel()).sum(1)


def _leaves(root: Any, limit: int | None = None) -> list[Tensor]:
    """Leaf tensors that autograd goes back to from a graph node; none if there are more nodes than `limit`."""
    leaves, seen, todo = [], set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if limit is not None and len(seen) > limit:
            return []
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        todo.extend(parent for parent, _ in node.next_functions)
    return leaves
