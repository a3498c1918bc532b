"""The four events around any training loop, and what a guard's state is on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tiltmeter.errors import InputError
from tiltmeter.guards.contract import Guard
from tiltmeter.guards.trainee import Trainee
from tiltmeter.lm.processes import everywhere, largest_of_all, together

TENSORS, REST = "guard.safetensors", "guard.json"

#: Two anchors are the same if their fingerprints agree to this share: another machine may round differently.
SAME_ANCHOR = 1e-4


@dataclass
class Session:
    """One guard on one fine-tune.

    Around any loop::

        session = Session(guard, trainee)
        session.begin()
        for batch in data:
            loss(batch).backward()
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
        session.end()

    A guard of strength 0 is not called at all.

    Attributes:
        guard: the method.
        model: what is trained.
        looked: whether the guard has looked at the last step's update.
        most: largest memory that the guard's tensors took between two events, bytes.
        finished: whether the guard has finished: after the last step where that is known, so that what is measured and
            saved there is the guarded model; else at `end`.
    """

    guard: Guard
    model: Trainee
    looked: bool = True
    most: int = 0
    finished: bool = False

    @property
    def active(self) -> bool:
        """Whether the guard does anything."""
        return self.guard.strength > 0

    def begin(self, state: Path | None = None) -> None:
        """Start the guard; with the folder of a saved state, go on where that left off.

        Raises:
            InputError: the guard cannot protect this model, or the state belongs to another guard or anchor.
        """
        if not self.active:
            return
        # what a guard draws must not change the order of the tuning data
        with torch.random.fork_rng(devices=[]), self.model.together():
            self.guard.start(self.model)
        if state is not None:
            self.load(state)

    def before_step(self) -> None:
        """Gradients are ready, the optimiser has not moved."""
        if not self.active:
            return
        with self.model.together():
            self.guard.shape_gradient(self.model)
        self.looked = False
        self.most = max(self.most, self.guard.memory.nbytes)

    def after_step(self) -> None:
        """The optimiser has moved."""
        self.model.step += 1
        if not self.active:
            return
        every, last = self.guard.every, self.model.step == self.model.steps  # a trainer saves before `end`
        if every and (last or self.model.step % every == 0):
            if self.looked:
                raise InputError("after_step without before_step: call both around every optimiser step")
            self._look()
        if last:
            self._finish()

    def end(self) -> None:
        """There are no more steps; those that were not looked at yet are looked at first."""
        if not self.active or self.finished:
            return
        if self.guard.every and not self.looked:
            self._look()
        self._finish()

    def _look(self) -> None:
        with self.model.together():
            self.guard.shape_update(self.model)
        self.looked = True
        self.most = max(self.most, self.guard.memory.nbytes)

    def _finish(self) -> None:
        with self.model.together():
            self.guard.finish(self.model)
        self.finished = True

    def save_in(self, folder: Path, *, main: bool) -> None:
        """`save` in the main process, where a trainer has made the folder; of divided weights, in all."""
        if not self.model.in_parts:
            if main and folder.is_dir():
                self.save(folder)
            return
        made = largest_of_all(int(folder.is_dir()))  # the main one may be ahead; all wait for it here
        if not made:
            return

        def own() -> None:
            if not folder.is_dir():
                raise InputError(f"this process does not see {folder}: to save a guard, all need the run's folder")
            self._save_tensors(folder)

        everywhere(own)
        together(lambda: self._save_rest(folder))

    def save(self, folder: Path) -> None:
        """Write the guard's state: tensors as safetensors, the rest as JSON, the JSON last."""
        self._save_tensors(folder)
        self._save_rest(folder)

    @property
    def _file(self) -> str:
        """Tensors of divided weights are this process's alone."""
        return f"guard-{dist.get_rank() + 1}-of-{dist.get_world_size()}.safetensors" if self.model.in_parts else TENSORS

    def _save_tensors(self, folder: Path) -> None:
        held = {f"memory.{name}": tensor.cpu().contiguous() for name, tensor in self.guard.memory.state()[0].items()}
        save_file(held, folder / self._file)

    def _save_rest(self, folder: Path) -> None:
        about = {
            "guard": type(self.guard).__name__,
            "settings": repr(self.guard),
            "step": self.model.step,
            "looked": self.looked,
            "finished": self.finished,
            "space": self.model.whole.digest,
            "anchor": self.model.safety.fingerprint(),
            "opening": self.model.safety.opening,
            "scored": self.model.safety.scores.m,
            "prompts": getattr(self.model.safety, "prompts", None),
            **self.guard.memory.state()[1],
        }
        (folder / REST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote.

        Raises:
            InputError: it is not there, or of another guard, other settings, other parameters or another anchor.
        """
        try:
            about = json.loads((folder / REST).read_text(encoding="utf-8"))
            tensors = load_file(folder / self._file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot resume the guard from {folder}: {error}. Resume from a checkpoint that was written with the "
                "guard, or train afresh; going on without its state would leave the model unprotected"
            ) from error
        expected = {"guard": type(self.guard).__name__, "settings": repr(self.guard), "space": self.model.whole.digest}
        for key in ("looked", "finished"):
            if key not in about:
                raise InputError(f"the guard saved in {folder} is of an older version, without {key!r}; train afresh")
        for key, value in expected.items():
            if about[key] != value:
                raise InputError(f"the guard saved in {folder} has {key} {about[key]}, this one {value}; use the same")
        if (then := about.get("opening", 0)) != self.model.safety.opening:
            raise InputError(
                f"the guard saved in {folder} took the KL over openings of {then} tokens (0: whole answers), this "
                f"one over {self.model.safety.opening}; resume with --guard-opening {then}, or train afresh"
            )
        scored = self.model.safety.scores.m
        if (held := about.get("scored", scored)) != scored:
            raise InputError(
                f"the guard saved in {folder} took its directions from {held} safety examples, this one from {scored}; "
                "resume with the same safety prompts and guard, or train afresh"
            )
        prompts = getattr(self.model.safety, "prompts", None)
        if about.get("prompts") not in (None, prompts):  # older states name none
            raise InputError(
                f"the guard saved in {folder} was given other safety prompts, or held others out: what it has measured "
                "so far would not be of these; resume with the same ones in the same order, or train afresh"
            )
        now = self.model.safety.fingerprint()
        if abs(about["anchor"] - now) > SAME_ANCHOR * abs(now):
            raise InputError(
                f"the guard saved in {folder} protects another aligned model (fingerprint {about['anchor']:.6g}, here "
                f"{now:.6g}): build the guard from the model that training began with, not from the checkpoint"
                + ("" if "scored" in about else "; or it is of an older version: then train afresh")
            )
        device = next(iter(self.model.parameters.values())).device
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.looked, self.finished = bool(about["looked"]), bool(about["finished"])
        self.guard.memory.restore({name.removeprefix("memory."): t for name, t in moved.items()}, about)
        self.model.step = int(about["step"])
