"""The curvature budget: a fine-tune may move as it likes until safety begins to feel it, and then only around it.

Ours, from the second-order law of safety KL (Springer et al. 2026, arXiv:2602.15799, with the constants of
docs/theory.md): with F = V Lambda V' the sensitive directions and z = V'(theta - anchor), KL is 1/2 z' Lambda z. As
long as that stays below the budget nothing is touched; an update that would leave the ellipsoid is moved back onto it
by the smallest change in the optimiser's metric, D V (V'DV)^-1 (z' - z). The directions turn as the model moves, so
they are measured again at intervals that follow how much they turned; z is then read off the log-likelihoods, which
need no expansion.

What the directions miss is seen in the KL on held-out prompts, and answered by degrees. (The directions are those of
whole answers; the KL may count their openings by themselves, too, see `SafetySource.opening`.) As soon as there is any,
what the task's gradient would do against safety is taken out of it before the optimiser sees it (`surgery`): that keeps
the optimiser's memory clean and costs the task next to nothing, but promises nothing under Adam. Where the budget is
nearly used up the same is done in the optimiser's metric, to the gradient and to the update. When KL is about to exceed
the budget the model is pulled back (`pullback`), and where that does not last, finds no way down or would come too late
between two looks, safety is trained (replay). Every such act is in the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltmeter.errors import InputError
from tiltmeter.geometry.motion import narrow
from tiltmeter.geometry.sensitivity import Basis, DenseBasis, SampleBasis
from tiltmeter.geometry.space import blocks, dot, multiply, norm, products
from tiltmeter.guards.contract import Memory, require_strength
from tiltmeter.guards.hold import hold
from tiltmeter.guards.landmark import longest_ways, place, reaches, recall
from tiltmeter.guards.pullback import pull_back
from tiltmeter.guards.safety import draw
from tiltmeter.guards.surgery import remove_conflict
from tiltmeter.guards.trainee import Trainee, require_examples

#: Numbers that the directions may take before they are kept as combinations of examples: 256 MB in float32.
DENSE = 2**26

#: Shares of the budget: below which directions are not measured again, above which KL is near the budget, at which a
#: pull-back begins, and where it ends.
FELT, NEAR, CEILING, RESERVE = 0.1, 0.6, 0.9, 0.85

#: Examples that a pull-back's own gradients are taken of in large spaces, where a gradient is dear.
MOST_PULLED = 12

#: Weight of the past in the mean of safety gradients, where they are of other examples every step.
REMEMBERED = 0.5

#: Looks at an update within which a second pull-back calls for replay. One upon another they fit the few held-out
#: prompts, and the KL on others stays behind.
SOON = 2

#: Largest share of replay, as a multiple of `replay_share`; every further call doubles it.
MOST_REPLAY = 8

#: Rotation (one minus mean squared cosine) above which directions are measured twice, below which half as often.
TURNED, STILL = 0.4, 0.1


@dataclass(frozen=True)
class CurvatureBudget:
    """Settings of the budget.

    Attributes:
        strength: share of a move out of the ellipsoid that is taken back.
        budget_kl: largest tolerable held-out safety KL, nats (per token), as the safety source measures it; 0 keeps
            every sensitive direction still.
        rank: most directions.
        every: steps between two projections; more than one is for large spaces, where each costs passes. There KL is
            measured at every projection, the safety gradient of the step before does at every second step while KL is
            not near the budget, and the weights inside are kept in two bytes a number where the optimiser allows it
            (`landmark`).
        refresh: steps between two measurements of the directions, at first.
        check: most steps between two measurements of held-out KL; 0 for none, and then for the ellipsoid alone: no
            surgery, pull-back or replay, as with a budget of 0.
        carry: read the way that was spent off the log-likelihoods at a refresh; False begins each basis at zero, which
            is projection as it is usually meant.
        steer: adapt `refresh` to the rotation.
        examples: safety examples a step, of which the gradient of the KL is taken; others every step, and a mean over
            the last few steps is what counts.
        replay_share: length of the replayed gradient, as a share of the task's, at first: every further call for
            replay doubles it, every end halves it; 0 for no replay.
    """

    strength: float = 1.0
    budget_kl: float = 0.05
    rank: int = 8
    every: int = 1
    refresh: int = 32
    check: int = 8
    carry: bool = True
    steer: bool = True
    examples: int = 4
    replay_share: float = 0.3
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    def start(self, model: Trainee) -> None:
        """Measure the directions at the anchor.

        Raises:
            InputError: a setting is out of range, there are no safety examples, or the optimiser's metric is not known.
        """
        require_strength("budget", self.strength)
        if not (self.budget_kl >= 0 and math.isfinite(self.budget_kl)):
            raise InputError(f"budget_kl must be a number of nats, at least 0, got {self.budget_kl}")
        for name, least in (("rank", 1), ("every", 1), ("refresh", 1), ("check", 0), ("examples", 1)):
            if getattr(self, name) < least:
                raise InputError(f"guard budget: {name} must be at least {least}, got {getattr(self, name)}")
        require_examples(model.safety, 2, "the curvature budget")
        model.require_metric()
        self.memory.tensors.clear()  # of another run
        self.memory.numbers.clear()
        self.memory.numbers.update(interval=self.refresh, wait=1, next_check=1, replaying=0, share=self.replay_share)
        if self.check and self.budget_kl > 0:
            self._remember(model)
        self._measure(model)

    def shape_gradient(self, model: Trainee) -> None:
        """Keep the task's gradient from raising KL; replay where it is called for.

        The weights before the update are kept, for `shape_update` to compare with, unless they are those inside the
        budget, which are kept in any case.

        Cost: a backward pass over `examples` examples, in large spaces often at every second step only; none at the
            anchor, where KL has no gradient.
        """
        self._keep_before(model)
        if not self.check or self.budget_kl == 0 or model.step == 0:
            return
        numbers, divergence = self.memory.numbers, model.safety.divergence
        past = self.memory.tensors.get("slope")
        replaying = bool(numbers["replaying"])
        if past is None or replaying or not self._calm(model) or model.step % 2:
            safety = divergence.gradient(draw(divergence.m, self.examples, model.seed + model.step))
            slope = safety.clone() if replaying else safety
            if past is not None and self.examples < divergence.m:
                for mine, theirs in blocks(slope, past):
                    mine.lerp_(theirs.to(mine), REMEMBERED)
        else:
            safety = slope = past
        task = model.gradient()
        share = self.strength * numbers["share"] * norm(task) if replaying else 0.0
        metric = model.preconditioner() if self._used() > NEAR else None
        changed = remove_conflict(task, slope, self.strength, metric)
        numbers["shaped"] = numbers.get("shaped", 0) + 1
        numbers["conflicts"] = numbers.get("conflicts", 0) + changed
        if share and (length := norm(safety)) > 0:
            for mine, theirs in blocks(task, safety):
                mine.add_(theirs, alpha=share / length)
            changed = True
        if changed:
            model.write_gradient(task)
        self.memory.tensors["slope"] = narrow(slope)

    def _calm(self, model: Trainee) -> bool:
        """Whether the safety gradient of the step before will do: in large spaces, where a gradient is dear, past the
        first look, before which it still turns fast, while KL is not near the budget, and not after a pull-back.
        """
        pulled = self.memory.numbers.get("pulled") == model.step
        return 1 < self.every < model.step and self._used() <= NEAR and not pulled

    def _keep_before(self, model: Trainee) -> None:
        tensors = self.memory.tensors
        if self.memory.numbers.get("inside_is_before"):
            if "units" in tensors and not reaches(model, tensors["units"], longest_ways(model, self.every)):
                # the learning rate has grown beyond what two bytes can follow
                self._keep_whole(self._inside(model))
        elif "before" not in tensors:
            tensors["before"] = model.vector()

    def _keep_whole(self, inside: Tensor | None) -> None:
        """Keep these weights [n] as those inside the budget; None if they are not known."""
        tensors = self.memory.tensors
        tensors.pop("units", None)
        if inside is None:
            tensors.pop("inside", None)
        else:
            tensors["inside"] = inside

    def _remember(self, model: Trainee) -> None:
        """Keep the weights as they stand as those inside the budget; in two bytes where vectors are large.

        Until the next update they are the weights before it, too.
        """
        tensors = self.memory.tensors
        ways = longest_ways(model, self.every) if self.every > 1 else None
        if ways is None:
            self._keep_whole(model.vector())
        else:
            tensors["inside"], tensors["units"] = place(model, ways)
        self.memory.numbers["inside_is_before"] = 1

    def _inside(self, model: Trainee) -> Tensor | None:
        """Weights [n] that were inside the budget, if they are known; from two bytes only before a guard moves."""
        inside, units = (self.memory.tensors.get(name) for name in ("inside", "units"))
        return inside if inside is None or units is None else recall(model, inside, units)

    def _used(self) -> float:
        """Share of the budget that the held-out KL has used up, when it was last measured; 0 without a budget."""
        kl: float = self.memory.numbers.get("kl", 0.0)
        return kl / self.budget_kl if self.budget_kl > 0 else 0.0

    def shape_update(self, model: Trainee) -> None:
        """Hold the update to the ellipsoid; measure directions and held-out KL when due."""
        numbers, tensors = self.memory.numbers, self.memory.tensors
        inside = self._inside(model)
        before = tensors.pop("before", inside)
        numbers["inside_is_before"] = 0
        if before is None:  # a checkpoint was loaded, say
            self.memory.note(model.step, "not held to the ellipsoid", "something else has moved the weights")
            self._recount(model)
        else:
            self._project(model, before)
            self._level(model, before)
        last = model.step == model.steps  # a checkpoint may be saved before `finish`
        if self.check and (last or self.every > 1 or model.step >= numbers["next_check"]):
            self._control(model, 1.0 if last else CEILING, inside)
        felt = not self.check or numbers.get("kl", 0.0) >= FELT * self.budget_kl
        if felt and not last and model.step >= numbers["next_refresh"]:
            self._measure(model)

    def finish(self, model: Trainee) -> None:
        """Measure held-out KL a last time, unless it was after the last step; pull back if it exceeds the budget."""
        numbers = self.memory.numbers
        if self.check and numbers.get("checked") != model.step:
            self._control(model, 1.0, self._inside(model))
        if shaped := numbers.get("shaped"):
            why = f"task and safety conflicted in {numbers['conflicts']:g} of {shaped:g} steps"
            self.memory.note(model.step, "finished", why)

    def _basis(self, model: Trainee) -> Basis:
        tensors = self.memory.tensors
        if "columns" in tensors:
            return DenseBasis(model.space, tuple(tensors["columns"]))
        return SampleBasis(model.safety.scores, tensors["coefficients"])

    def _measure(self, model: Trainee) -> None:
        """Find the directions here, how far they turned, and where we stand in them."""
        tensors, numbers = self.memory.tensors, self.memory.numbers
        found = model.safety.sensitivity(self.rank)
        if not isinstance(found.basis, SampleBasis):
            raise InputError("the safety source must give its directions as combinations of its examples")
        k, old = found.rank, tensors.get("columns")
        coefficients = found.basis.coefficients
        if k * model.whole.size <= DENSE:
            columns = model.safety.columns(coefficients)
            turned = None if old is None else _rotation(old, columns)
            tensors["columns"] = columns
        else:
            turned = None
            tensors.pop("columns", None)
        tensors["coefficients"] = coefficients
        if self.steer and turned is not None:
            factor = 0.5 if turned > TURNED else 2.0 if turned < STILL else 1.0
            least, most = max(1.0, self.refresh / 2), 16.0 * self.refresh
            numbers["interval"] = min(max(least, numbers["interval"] * factor), most)
        # where a basis begins at zero, what was spent before it is left out of account
        tensors["base"] = torch.zeros(k, dtype=torch.float64)
        spent = self._coordinates(model)
        if not self.carry:
            tensors["base"] = spent
        z = tensors["z"] = spent - tensors["base"]
        tensors["eigenvalues"] = found.eigenvalues.double().cpu()
        numbers["allowed"] = self._allowance(model, float(found.energy(z)))
        numbers["next_refresh"] = model.step + numbers["interval"]
        why = f"{k} directions" if turned is None else f"{k} directions, turned by {turned:.2f} (1 - mean cos^2)"
        self.memory.note(model.step, f"directions measured, again in {numbers['interval']:g} steps", why)

    def _allowance(self, model: Trainee, energy: float) -> float:
        """Energy in these directions at which the KL is expected to reach the budget.

        Where KL is felt already, the two are compared: directions that hold half of the KL get half of the budget.
        """
        if self.budget_kl == 0 or model.step == 0:
            return self.budget_kl
        kl = max(float(model.safety.divergence.losses().mean()), model.safety.heldout())
        if not self.carry:
            return max(0.0, self.budget_kl - kl)
        if kl < FELT * self.budget_kl:
            return self.budget_kl
        return self.budget_kl * min(1.0, energy / kl)

    def _project(self, model: Trainee, before: Tensor) -> None:
        """Move the weights back so that the energy is allowed; the coordinates are kept up to date."""
        tensors = self.memory.tensors
        basis = self._basis(model)
        # a state that was read back is on the device of the weights
        z = tensors["z"].cpu() + basis.coordinates(model.moved(before)).double().cpu()
        eigenvalues, allowed = tensors["eigenvalues"].cpu(), self.memory.numbers["allowed"]
        if float((eigenvalues * z.square()).sum()) / 2 > allowed:
            move, change = hold(basis, z, eigenvalues, model.preconditioner(), allowed)
            model.write(model.vector().add_(move, alpha=self.strength))
            z = z + self.strength * change
            if not self.memory.numbers.get("held"):
                self.memory.note(
                    model.step, "updates are now held to the ellipsoid", f"energy above {allowed:.2e} nats"
                )
            self.memory.numbers["held"] = self.memory.numbers.get("held", 0) + 1
        tensors["z"] = z

    def _level(self, model: Trainee, before: Tensor) -> None:
        """Near the budget, take out of the update what raises KL to first order, as the last gradients tell."""
        slope = self.memory.tensors.get("slope")
        if slope is None or self._used() <= NEAR:
            return
        if (rise := dot(slope, model.moved(before))) <= 0:
            return
        d = model.preconditioner()
        direction = slope.to(before, copy=True) if d is None else multiply(d, slope)
        move = direction.mul_(-self.strength * rise / dot(slope, direction))
        model.write(model.vector().add_(move))
        self.memory.tensors["z"] += self._basis(model).coordinates(move).double().cpu()

    def _control(self, model: Trainee, ceiling: float, inside: Tensor | None) -> None:
        """Measure held-out KL, pull back above a share of the budget, begin or end replay, say when to look again."""
        numbers, tensors, budget = self.memory.numbers, self.memory.tensors, self.budget_kl
        kl, last = model.safety.heldout(), numbers.get("kl", 0.0)
        rate = max(0.0, math.sqrt(max(0.0, kl)) - math.sqrt(max(0.0, last))) / max(
            1, model.step - numbers.get("checked", 0)
        )
        retreated = False
        if kl > ceiling * budget and budget > 0:
            most = MOST_PULLED if self.every > 1 else None
            result = pull_back(model, kl, RESERVE * budget, budget, inside, tensors.get("slope"), most)
            retreated = result.retreated
            self.memory.note(model.step, f"pulled back {result.how}", f"held-out KL {kl:.2e} -> {result.kl:.2e} nats")
            kl = result.kl
            self._recount(model)
            again = model.step - numbers.get("pulled", -math.inf) <= SOON * self.every
            stuck = result.retreated or kl > CEILING * budget
            if (stuck or again) and self.replay_share > 0:
                self._replay(model.step, kl, "a pull-back that failed" if stuck else "one pull-back upon another")
            numbers["pulled"] = model.step
        elif (
            budget > 0 and self.every > 1 and math.sqrt(max(0.0, kl)) + rate * self.every > math.sqrt(CEILING * budget)
        ):
            if not numbers["replaying"] and self.replay_share > 0:
                self._replay(model.step, kl, "a rise that would pass it before the next look")
        elif numbers["replaying"] and kl <= NEAR * budget:
            numbers.update(replaying=0, share=max(self.replay_share, numbers["share"] / 2))
            self.memory.note(model.step, "replay ends", f"held-out KL {kl:.2e} of {budget:g} nats")
        if budget > 0 and (kl <= budget or retreated):  # after a retreat they are inside, or what was there
            self._remember(model)
        else:
            self._keep_whole(inside)
        # KL is a square of the way, so its root grows evenly: the steps that are left, at most twice those of last time
        left = (math.sqrt(CEILING * budget) - math.sqrt(max(0.0, kl))) / rate if rate > 0 else math.inf
        wait = max(1, math.floor(min(self.check, 2 * numbers["wait"], left)))
        numbers.update(kl=kl, checked=model.step, wait=wait, next_check=model.step + wait)

    def _replay(self, step: int, kl: float, why: str) -> None:
        """Begin replay, or make it stronger."""
        numbers = self.memory.numbers
        if numbers["replaying"]:
            numbers["share"] = min(MOST_REPLAY * self.replay_share, 2 * numbers["share"])
        else:
            numbers["replaying"] = 1
            self.memory.note(step, "replay begins", f"held-out KL {kl:.2e} of {self.budget_kl:g} nats after {why}")

    def _recount(self, model: Trainee) -> None:
        """After a leap the coordinates are read off the log-likelihoods, in the basis as it is."""
        self.memory.tensors["z"] = self._coordinates(model)

    def _coordinates(self, model: Trainee) -> Tensor:
        """Coordinates [k] in the basis as it is, read off the log-likelihoods."""
        coefficients = self.memory.tensors["coefficients"]
        z = (coefficients.T @ model.safety.shift().to(coefficients)).double().cpu()
        return z - self.memory.tensors["base"].cpu()


def _rotation(old: Tensor, new: Tensor) -> float:
    """One minus the mean squared cosine between two sets of orthonormal rows, [k, n] and [k', n]."""
    squares = products(tuple(old), tuple(new)).square()
    return max(0.0, 1.0 - float(squares.sum()) / min(len(old), len(new)))
