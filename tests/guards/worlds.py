"""Small worlds that guards are tested in, and the loop that trains in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tiltmeter.geometry.space import ParameterSpace
from tiltmeter.geometry.systems import DOUBLE, Quadratic
from tiltmeter.guards.contract import Guard
from tiltmeter.guards.safety import SystemSafety
from tiltmeter.guards.session import Session
from tiltmeter.guards.trainee import Trainee

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, rate: torch.optim.SGD(p, lr=rate, momentum=0.9),
    "adamw": lambda p, rate: torch.optim.AdamW(p, lr=rate, weight_decay=0.01),
}


@dataclass
class World:
    """Answer distributions with a few shared sensitive directions, slightly curved, and a quadratic task.

    The logits of 18 prompts are functions of four features of the weights [4, 6]; 12 belong to the guard, 6 are held
    out. The weights are four layers of one flat buffer, and a bystander that is not trained stands beside them.
    """

    optimizer: str = "adamw"
    rate: float = 0.02
    seed: int = 0
    scale: float = 1.0
    bend: float = 0.05
    bystander: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=DOUBLE, generator=generator)

        n = 24
        # most of what safety feels is in the first two layers
        reach = torch.tensor([1.0] * 12 + [0.2] * 12, dtype=DOUBLE)
        self.features = torch.linalg.qr(draw(n, 4))[0].T * self.scale * reach
        self.bends = draw(4, n, n) * self.bend / n**0.5
        self.slopes, self.bias = draw(18, 3, 4), draw(18, 3) / 2
        self.task = Quadratic.with_spectrum(draw(n), [float(x) for x in torch.linspace(0.3, 3, n)], self.seed + 1)
        self.anchor = torch.zeros(n, dtype=DOUBLE)
        self.flat = self.anchor.clone()
        pieces = self.flat.view(4, 2, 3)
        self.parameters = {f"layers.{i}.weight": nn.Parameter(piece) for i, piece in enumerate(pieces)}
        self.bystander = nn.Parameter(torch.ones(3, dtype=DOUBLE))
        self.bystander.requires_grad_(False)

    def alignment(self) -> dict[str, Tensor]:
        """What alignment changed: it undid what the task now does, and a little more."""
        free = World(self.optimizer, self.rate, self.seed, self.scale, self.bend)
        free.train(None)
        return {name: -0.7 * p.detach() for name, p in free.parameters.items()}

    def logits(self, prompts: slice) -> Callable[[Tensor], Tensor]:
        """Logits [m, 3] of some prompts as a function of the weights [n]."""

        def function(theta: Tensor) -> Tensor:
            felt = self.features @ theta + torch.einsum("i,fij,j->f", theta, self.bends, theta) / 2
            return self.bias[prompts] + self.slopes[prompts] @ felt

        return function

    def trainee(self) -> Trainee:
        """The weights under a fresh optimiser."""
        space = ParameterSpace.of(self.parameters)
        safety = SystemSafety(self.logits(slice(0, 12)), self.logits(slice(12, 18)), self.anchor, self.flat, space)
        optimizer = OPTIMIZERS[self.optimizer](list(self.parameters.values()), self.rate)
        return Trainee(self.parameters, optimizer, safety)

    def loss(self) -> Tensor:
        """Task loss at the weights as they stand."""
        x = torch.cat([p.reshape(-1) for p in self.parameters.values()])
        return self.task.slope @ x + x @ self.task.hessian @ x / 2

    def train(self, guard: Guard | None, steps: int = 40, trainee: Trainee | None = None) -> Trainee:
        """Fine-tune under a guard; None leaves the session out altogether."""
        model = trainee or self.trainee()
        session = None if guard is None else Session(guard, model)
        if session is not None:
            session.begin()
        for _ in range(steps):
            step(self, model, session)
        if session is not None:
            session.end()
        return model


def step(world: World, model: Trainee, session: Session | None) -> None:
    """One optimiser step."""
    model.plain_optimizer.zero_grad()
    world.loss().backward()
    if session is not None:
        session.before_step()
    model.plain_optimizer.step()
    if session is not None:
        session.after_step()
