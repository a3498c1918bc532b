"""The model under training as a guard sees it: one vector of weights, one of gradients, the optimiser's metric."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltmeter.errors import InputError, SpaceMismatch, UnsupportedModel
from tiltmeter.geometry.space import ParameterSpace, dot
from tiltmeter.guards.safety import SafetySource
from tiltmeter.lm.gathered import as_part, evenly_spread, own_part, parts_together
from tiltmeter.lm.sharding import is_part

#: Largest weight in the optimiser's metric, as a multiple of the median. Coordinates that have hardly seen a gradient
#: would otherwise carry every correction, far beyond what the optimiser itself would ever move them.
LARGEST_METRIC = 100.0


@dataclass
class Trainee:
    """What is trained. Where the weights are divided among processes (FSDP2), vectors are this process's parts.

    Attributes:
        parameters: the trainable ones by name, live.
        optimizer: torch's SGD, Adam or AdamW, or a wrapper that carries one as `.optimizer`.
        safety: where guards learn what safety is.
        step: optimiser steps finished.
        seed: for guards that draw examples.
        steps: that the run has in all, if that is known.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: Any
    safety: SafetySource
    step: int = 0
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.parameters:
            raise UnsupportedModel(
                "no parameter is trainable, so there is nothing to guard; unfreeze some, or add LoRA"
            )
        for name, p in self.parameters.items():
            if not (type(p) is nn.Parameter or is_part(p)) or not p.is_floating_point() or p.is_meta:
                raise UnsupportedModel(
                    f"cannot guard {name} ({type(p).__name__}, {p.dtype}, {p.device}): it is quantised or not loaded, "
                    "so its updates cannot be shaped; train an adapter, or load the weights whole"
                )
        if len({p.device for p in self.parameters.values()}) > 1:
            raise UnsupportedModel("the trainable parameters are on several devices; guards need them on one")
        self.space = ParameterSpace.of({name: own_part(p) for name, p in self.parameters.items()})
        self.whole = ParameterSpace.of(self.parameters)
        self.safety.space.require_same(self.space)
        self._require_watched()
        held = {id(p) for group in self.plain_optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.parameters.items() if id(p) not in held]
        if missing:
            raise SpaceMismatch(
                f"the optimiser does not hold {missing[0]} ({len(missing)} of {len(self.parameters)} trainable "
                "parameters): make the optimiser from the parameters of this model, or freeze the others"
            )

    def _require_watched(self) -> None:
        """Check that safety is measured on these very parameters: those of a copy never move."""
        watched = getattr(self.safety, "parameters", None)
        if watched is not None and any(watched[name] is not p for name, p in self.parameters.items()):
            raise SpaceMismatch(
                "the safety source was built from another model object than the one that is trained, and would never "
                "see it move: build it from the very model that the trainer trains, before training"
            )

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser without accelerate's wrapper."""
        inner = self.optimizer
        while not isinstance(inner, torch.optim.Optimizer) or type(inner).__name__ == "AcceleratedOptimizer":
            if not hasattr(inner, "optimizer"):
                raise UnsupportedModel(f"{type(inner).__name__} is not an optimiser of torch; guards need its state")
            inner = inner.optimizer
        return inner

    @property
    def in_parts(self) -> bool:
        """Whether the weights are divided among processes."""
        return any(is_part(p) for p in self.parameters.values())

    def together(self) -> AbstractContextManager[None]:
        """While this lasts, inner products go over all processes that have a part."""
        return parts_together(self.parameters)

    def require_whole(self, what: str) -> None:
        """Check that every process has the weights whole.

        Raises:
            UnsupportedModel: they are divided.
        """
        if self.in_parts:
            raise UnsupportedModel(
                f"{what}, and the trained weights are divided among processes (FSDP2): choose another guard (budget, "
                "safegrad, replay, ...), train a LoRA, or launch without dividing the model"
            )

    def vector(self) -> Tensor:
        """A copy of the weights [n], at least float32."""
        return self._flat({name: own_part(p) for name, p in self.parameters.items()})

    def write(self, vector: Tensor) -> None:
        """Set the weights to a vector [n]."""
        with torch.no_grad():
            for name, part in self.space.split(vector).items():
                own_part(self.parameters[name]).copy_(part)

    def go(self, start: Tensor, direction: Tensor, length: float) -> None:
        """Set the weights to `length` times a direction [n] from a start [n]; no vector of length n is made."""
        towards = self.space.split(direction)
        with torch.no_grad():
            for name, part in self.space.split(start).items():
                own_part(self.parameters[name]).copy_(part.add(towards[name], alpha=length))

    def gradient(self) -> Tensor:
        """A copy of the gradient [n]; zero where there is none."""
        return self._flat(
            {
                name: torch.zeros_like(own_part(p)) if p.grad is None else own_part(p.grad)
                for name, p in self.parameters.items()
            }
        )

    def write_gradient(self, vector: Tensor) -> None:
        """Set the gradient to a vector [n]; a parameter without gradient gets one only where the vector is not zero."""
        for name, part in self.space.split(vector).items():
            p = self.parameters[name]
            if p.grad is not None:
                own_part(p.grad).copy_(part)
            elif dot(part.reshape(-1), part.reshape(-1)) > 0:  # in any process
                p.grad = as_part(part.to(p.dtype).clone(), p)

    def preconditioner(self) -> Tensor | None:
        """Diagonal D [n] of the optimiser's metric as it stands, up to scale; None for plain descent at one rate.

        Adam's is 1 / (sqrt(v) + epsilon), v its bias-corrected second moment; all ones before its first step. Where
        groups of parameters have learning rates of their own, each counts with its rate, and what has none does not
        move. At most `LARGEST_METRIC` times the median of those that move.

        Raises:
            UnsupportedModel: the optimiser's metric is not known.
        """
        optimizer, rates = self.plain_optimizer, self._relative_rates()
        plain = isinstance(optimizer, torch.optim.SGD)
        if plain and set(rates.values()) == {1.0}:
            return None
        self.require_metric()
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        first = next(iter(self.parameters.values()))
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters.values()) else torch.float32
        d = torch.ones(self.space.size, dtype=wide, device=first.device)
        for name, part in self.space.split(d).items():  # in place: a large model has no room for two of these
            p = self.parameters[name]
            group, held = groups[id(p)], optimizer.state.get(p, {})
            if "exp_avg_sq" in held and not plain:
                part.copy_(own_part(held["exp_avg_sq"])).div_(1 - group["betas"][1] ** float(held["step"]))
                part.sqrt_().add_(group["eps"]).reciprocal_()
            if rates[name] != 1:
                part.mul_(rates[name])
        # the median of at most a million entries is enough for a scale
        some = evenly_spread(self.parameters, d, 2**20)
        return d.div_(some[some > 0].median()).clamp_(max=LARGEST_METRIC)

    def _relative_rates(self) -> dict[str, float]:
        """Learning rate of every parameter over the largest; all ones where there is none, as at a warm-up's start."""
        groups = {id(p): group for group in self.plain_optimizer.param_groups for p in group["params"]}
        rates = {name: float(groups[id(p)]["lr"]) for name, p in self.parameters.items()}
        largest = max(rates.values())
        return {name: rate / largest if largest > 0 else 1.0 for name, rate in rates.items()}

    def require_metric(self) -> None:
        """Check that the optimiser is one whose metric is known.

        Raises:
            UnsupportedModel: it is not.
        """
        optimizer = self.plain_optimizer
        if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)):
            raise UnsupportedModel(
                "this guard works in the optimiser's metric, which is known for SGD, Adam and AdamW of torch, "
                f"not for {type(optimizer).__name__}: train with one of these, or choose a guard that works without "
                "(replay, ewc, ema)"
            )

    def moved(self, before: Tensor) -> Tensor:
        """The update [n] since `before`."""
        return self.vector().sub_(before)

    def _flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        flat = self.space.flatten(tensors)
        return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def require_examples(safety: SafetySource, least: int, what: str) -> None:
    """Check that there are enough safety examples.

    Raises:
        InputError: there are not.
    """
    if safety.scores.m < least:
        raise InputError(f"{what} needs at least {least} safety examples, got {safety.scores.m}; add safety prompts")
