"""Freezing: leave the layers that safety feels most as they are.

Source: safety-critical layers stay frozen, Li et al. 2024 (Safety Layers, arXiv:2408.17003), chosen here by the share
of the score energy sum_i ||grad log p_i||^2 in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tiltmeter.errors import UnsupportedModel
from tiltmeter.geometry.space import dot
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.trainee import Trainee, require_examples
from tiltmeter.lm.gram import per_layer_name

#: Random sign vectors that the energies are estimated with; exact for fewer examples than this.
PROBES = 16


@dataclass(frozen=True)
class FreezeLayers:
    """Settings of freezing.

    Attributes:
        strength: share of the score energy that is frozen, most sensitive layers first; at least one layer is, and at
            least one is not.
    """

    strength: float = 0.5
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    every: int = 1

    def start(self, model: Trainee) -> None:
        """Choose the layers. Cost: at most 16 backward passes over the safety examples."""
        require_strength("freeze", self.strength)
        require_examples(model.safety, 1, "freeze")
        energy = _energies(model)
        if len(energy) < 2:
            raise UnsupportedModel(
                "freezing needs at least two layers with trainable parameters, to freeze one and train another; "
                f"this space has {len(energy)}"
            )
        total, frozen = sum(energy.values()), 0.0
        mask = torch.zeros(model.space.size, dtype=torch.bool)
        names: list[str] = []
        for name in sorted(energy, key=lambda layer: -energy[layer])[:-1]:
            if names and frozen + energy[name] > self.strength * total:
                break
            names.append(name)
            frozen += energy[name]
        for name, part, _ in model.space.slices():
            mask[part] = per_layer_name(name) in names
        weights = model.vector()
        mask = mask.to(weights.device)
        self.memory.tensors.update(frozen=mask, weights=weights[mask])
        self.memory.note(model.step, f"frozen: {', '.join(names)}", f"{frozen / total:.0%} of the score energy")

    def shape_gradient(self, model: Trainee) -> None:
        """Frozen layers have no gradient."""
        model.write_gradient(model.gradient().masked_fill_(self.memory.tensors["frozen"], 0.0))

    def shape_update(self, model: Trainee) -> None:
        """Take back what weight decay moved."""
        weights = model.vector()
        weights[self.memory.tensors["frozen"]] = self.memory.tensors["weights"]
        model.write(weights)

    def finish(self, model: Trainee) -> None:
        """Nothing."""


def _energies(model: Trainee) -> dict[str, float]:
    """Energy of the scores in every layer."""
    scores = model.safety.scores
    generator = torch.Generator().manual_seed(model.seed)
    signs = torch.randint(0, 2, (PROBES, scores.m), generator=generator).double() * 2 - 1
    probes = torch.eye(scores.m, dtype=torch.float64) if scores.m <= PROBES else signs / PROBES**0.5
    out: dict[str, float] = {}
    for weights in probes:
        gradient = scores.gradient(weights)
        for name, part, _ in model.space.slices():
            layer = per_layer_name(name)
            out[layer] = out.get(layer, 0.0) + dot(gradient[part], gradient[part])
    return out
