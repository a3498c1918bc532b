"""What every guard is: frozen settings, one explicit memory, and four events.

The events fall where transformers' Trainer calls `on_train_begin`, `on_pre_optimizer_step` (gradients accumulated and
clipped), `on_optimizer_step` and `on_train_end`. The third is not optional: an adaptive optimiser rescales what the
second has shaped, so only the update itself can be held to a promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.guards.trainee import Trainee


@dataclass(frozen=True)
class Decision:
    """Something a guard did.

    Attributes:
        step: optimiser steps finished.
        what: the act, in a few words.
        why: the figures it was decided on.
    """

    step: int
    what: str
    why: str


@dataclass
class Memory:
    """All that changes in a guard while it works; what is saved and put back.

    Attributes:
        tensors: by name.
        numbers: by name.
        log: decisions, oldest first.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    log: list[Decision] = field(default_factory=list)

    def note(self, step: int, what: str, why: str) -> None:
        """Write a decision down."""
        self.log.append(Decision(step, what, why))

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Copies of the tensors, and the rest in JSON values."""
        log = [[entry.step, entry.what, entry.why] for entry in self.log]
        return {k: v.detach().clone() for k, v in self.tensors.items()}, {"numbers": dict(self.numbers), "log": log}

    def restore(self, tensors: Mapping[str, Tensor], rest: Mapping[str, object]) -> None:
        """Put back what `state` gave."""
        numbers, log = rest["numbers"], rest["log"]
        if not isinstance(numbers, Mapping) or not isinstance(log, list):
            raise InputError("a saved guard state must hold numbers and a log; the file is damaged, train afresh")
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.numbers = {str(name): value for name, value in numbers.items()}
        self.log = [Decision(int(step), str(what), str(why)) for step, what, why in log]


class Guard(Protocol):
    """A method that keeps safety during a fine-tune.

    A guard of strength 0 is never called, so that a run with it is bit-identical to one without (`Session`).
    """

    @property
    def strength(self) -> float:
        """How strongly it acts; 0 is off."""
        ...

    @property
    def every(self) -> int:
        """Optimiser steps from one `shape_update` to the next; 0 if updates are never looked at."""
        ...

    @property
    def memory(self) -> Memory:
        """All of its state."""
        ...

    def start(self, model: Trainee) -> None:
        """Before the first step, at the anchor; after a resume the memory is put back afterwards.

        Raises:
            InputError: this guard cannot protect this model, optimiser or space; says why and what to do.
        """
        ...

    def shape_gradient(self, model: Trainee) -> None:
        """Gradients are accumulated and clipped; the optimiser has not moved yet."""
        ...

    def shape_update(self, model: Trainee) -> None:
        """The optimiser has moved. A guard that compares keeps the weights as they were itself, in its memory."""
        ...

    def finish(self, model: Trainee) -> None:
        """After the last step."""
        ...


def require_strength(name: str, strength: float, most: float | None = 1.0) -> None:
    """Check a strength.

    Raises:
        InputError: it is negative, not a number, or above what the method knows.
    """
    if not strength >= 0 or (most is not None and strength > most) or strength == float("inf"):
        bound = "a number of at least 0" if most is None else f"a number from 0 to {most:g}"
        raise InputError(f"guard {name}: strength must be {bound}, got {strength}")
