"""Guards by name, ready for a fine-tune: the safety set in tokens, and what alignment changed in the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltmeter.errors import InputError, UnsupportedModel
from tiltmeter.guards.alignment import plain_name
from tiltmeter.guards.budget import DENSE, CurvatureBudget
from tiltmeter.guards.callback import GuardCallback
from tiltmeter.guards.contract import Guard
from tiltmeter.guards.language import LanguageSafety
from tiltmeter.guards.lox import Extrapolation
from tiltmeter.guards.names import GUARDS
from tiltmeter.guards.safe_lora import SafeLora
from tiltmeter.guards.token_loss import ConstrainedTokens, token_references
from tiltmeter.jobs.inputs import Opened, open_model
from tiltmeter.lm.conversation import Example
from tiltmeter.lm.four_bit import holds_four_bits
from tiltmeter.lm.model import trainable
from tiltmeter.lm.safety import prepare_safety, spread
from tiltmeter.lm.sharding import whole

#: Safety prompts of its own that a guard should have at least.
FEWEST = 12

#: Tokens of the aligned model's answers that a guard looks at.
ANSWER_TOKENS = 24

#: First tokens of every answer that the budget holds for by themselves, too: there a refusal is decided, and a mean
#: over the whole answer leaves room for all of its change there (docs/guards.md).
OPENING_TOKENS = 3

#: Steps between two projections where the directions are too many numbers to keep.
EVERY_IN_LARGE_SPACES = 4

#: Examples whose scores span the directions there: each projection takes a JVP of them.
SCORED_IN_LARGE_SPACES = 12


def guard_named(
    name: str,
    opened: Opened,
    *,
    strength: float | None = None,
    budget_kl: float = 0.05,
    tuning: Sequence[Example] = (),
    base: Any = None,
) -> Guard:
    """A guard by the name it has on the command line.

    Args:
        name: one of `guards.names.GUARDS`.
        opened: the aligned model, with the parameters to be trained marked.
        strength: as the guard understands it; None for its own default.
        budget_kl: for `budget`, nats per token.
        tuning: tuning examples in tokens, for `token_loss`.
        base: the model that the aligned one was made from, for `safe_lora` and `lox`.

    Raises:
        InputError: no such guard, or it lacks what it needs.
    """
    if name not in GUARDS:
        raise InputError(f"unknown guard {name!r}; expected one of {', '.join(sorted(GUARDS))}")
    kind, given = GUARDS[name], dict[str, Any]() if strength is None else {"strength": strength}
    model = opened.loaded.model
    if kind is CurvatureBudget:
        large = 8 * sum(p.numel() for p in trainable(model, parts=True).values()) > DENSE
        return CurvatureBudget(budget_kl=budget_kl, every=EVERY_IN_LARGE_SPACES if large else 1, **given)
    if kind is ConstrainedTokens:
        if not tuning:
            raise InputError("guard token_loss needs the tuning examples, to know what the aligned model makes of them")
        return ConstrainedTokens(token_references(model, tuning, opened.loaded.tokenizer.pad_token_id), **given)
    if kind is SafeLora or kind is Extrapolation:
        if base is None:
            raise InputError(f"guard {name} needs the base model that the aligned one was made from; give it as base")
        wanted = None if kind is Extrapolation else {plain_name(key) for key in trainable(model, parts=True)}
        return kind(alignment_of(model, base, wanted), **given)
    guard: Guard = kind(**given)
    return guard


def alignment_of(aligned: Any, base: Any, wanted: set[str] | None = None) -> Mapping[str, Tensor]:
    """V = W_aligned - W_base of the two-dimensional weights, by plain name.

    Raises:
        UnsupportedModel: the two have no weight in common, or of different shape, or one is packed into four bits.
    """
    if holds_four_bits(aligned) or holds_four_bits(base):
        raise UnsupportedModel(
            "what alignment changed is a difference of weights, which four bits cannot tell: load both whole, or "
            "choose another guard"
        )
    theirs = {plain_name(name): p.detach() for name, p in base.named_parameters()}
    out = {}
    for name, p in aligned.named_parameters():
        key = plain_name(name)
        if ".lora_" in name or p.ndim != 2 or key not in theirs or (wanted is not None and key not in wanted):
            continue
        if p.shape != theirs[key].shape:
            raise UnsupportedModel(
                f"{key} has shape {tuple(p.shape)} in the aligned model and {tuple(theirs[key].shape)} in its base"
            )
        out[key] = whole(p.detach()).float() - whole(theirs[key]).to(p.device).float()
    if not any(bool(v.any()) for v in out.values()):
        raise UnsupportedModel(
            "the base does not differ from the aligned model in any weight that is trained: give the model from before "
            "alignment"
        )
    return out


def safety_source(
    opened: Opened,
    rows: Sequence[dict[str, Any]],
    *,
    limit: int = 48,
    max_length: int = 512,
    response_tokens: int = ANSWER_TOKENS,
    opening_tokens: int = 0,
    scored: int | None = None,
) -> LanguageSafety:
    """What guards may know of the model's safety, from safety prompts; one in three is held out.

    Args:
        opened: the aligned model, untrained, with the parameters to be trained marked.
        rows: safety prompts, with answers or without.
        limit: most prompts.
        max_length: longest prompt with answer, tokens.
        response_tokens: tokens of every answer that count. KL is a mean over them, and a refusal is decided in the
            first few: a budget per token allows the more there, the longer they are.
        opening_tokens: so many first ones over which the KL is taken where it is more than over all; 0 for none.
        scored: most of the guard's own prompts whose scores span the sensitive directions; None for all.

    Raises:
        InputError: `response_tokens` is below one, or `opening_tokens` below zero.
        DataError: too few can be used.
    """
    if response_tokens < 1:
        raise InputError(f"a guard must look at one token of an answer at least, got {response_tokens}")
    if opening_tokens < 0:
        raise InputError(f"the opening of an answer must have 0 tokens (none) or more, got {opening_tokens}")
    prepared = prepare_safety(
        opened.loaded,
        rows,
        limit=limit,
        max_length=min(max_length, opened.loaded.context),
        response_tokens=response_tokens,
        refusal_opening=opened.refusal_opening,
        compliance_opening=opened.compliance_opening,
    )
    responses = [example.answered().opened(response_tokens) for example in prepared.responses]
    model, pad = opened.loaded.model, opened.loaded.tokenizer.pad_token_id
    return LanguageSafety(model, responses, pad, opening=opening_tokens, scored=scored)


@dataclass(frozen=True)
class GuardOptions:
    """A guard as it is asked for on the command line.

    Attributes:
        name: one of `guards.names.GUARDS`.
        strength: as the guard understands it; None for its own default.
        budget_kl: for `budget`, nats per token: limit of the mean over held-out answers of the KL, each over the
            whole or over its opening.
        base: name of the model that the aligned one was made from, for `safe_lora` and `lox`.
        answer_tokens: tokens of the aligned model's answers that the guard looks at.
        opening_tokens: first tokens of them over which the KL is taken where it is more than over the whole; 0 for
            none, None for the guard's own default.
    """

    name: str
    strength: float | None = None
    budget_kl: float = 0.05
    base: str | None = None
    answer_tokens: int = ANSWER_TOKENS
    opening_tokens: int | None = None

    @property
    def opening(self) -> int:
        """First tokens of every answer that count by themselves, too."""
        return usual_opening(self.name) if self.opening_tokens is None else self.opening_tokens

    @property
    def knob(self) -> float | None:
        """The number that is turned: the budget of `budget`, the strength of the others; None for their own default."""
        return self.budget_kl if self.name == "budget" else self.strength

    @property
    def label(self) -> str:
        """Name, knob and what else is asked, fit for a folder."""
        knob = "" if self.knob is None else f"-{self.knob:g}"
        length = "" if self.answer_tokens == ANSWER_TOKENS else f"-{self.answer_tokens}-tokens"
        return self.name + knob + length + (f"-first-{self.opening}" if self.opening else "")

    @property
    def question(self) -> str:
        """All of it as text; settings that were added since the first version only where they differ from that."""
        told = repr(replace(self, opening_tokens=self.opening))
        for addition in (", opening_tokens=0", f", answer_tokens={ANSWER_TOKENS}"):
            told = told.replace(f"{addition})", ")").replace(f"{addition},", ",")
        return told


def usual_opening(guard: str) -> int:
    """First tokens of answers that count by themselves under a guard of this name, if nothing else is asked."""
    return OPENING_TOKENS if guard == "budget" else 0


def attach_guard(
    asked: GuardOptions,
    opened: Opened,
    rows: Sequence[dict[str, Any]],
    tuning: Sequence[Example],
    trainer: Any,
    seed: int,
) -> GuardCallback:
    """The callback of a guard for a trainer of transformers; the caller adds it. Arguments as for `guard_callback`."""
    base = None if asked.base is None else open_model(asked.base).loaded.model
    callback = guard_callback(
        asked.name,
        opened,
        rows,
        strength=asked.strength,
        budget_kl=asked.budget_kl,
        tuning=tuning,
        base=base,
        seed=seed,
        answer_tokens=asked.answer_tokens,
        opening_tokens=asked.opening,
    )
    if isinstance(callback.guard, ConstrainedTokens) and callback.guard.strength:
        trainer.compute_loss_func = callback.guard.trainer_loss
    return callback


def prompts_for_guard(rows: Sequence[dict[str, Any]], measured: int) -> tuple[list[dict[str, Any]], bool]:
    """Safety rows that a tracker of `measured` prompts leaves over, so that what it measures is held out of the guard.

    Returns: the rows, and whether they had to be shared because too few were left.
    """
    taken = set(spread(len(rows), measured))
    left = [row for index, row in enumerate(rows) if index not in taken]
    return (left, False) if len(left) >= FEWEST else (list(rows), True)


def guard_callback(
    name: str,
    opened: Opened,
    safety_rows: Sequence[dict[str, Any]],
    *,
    strength: float | None = None,
    budget_kl: float = 0.05,
    tuning: Sequence[Example] = (),
    base: Any = None,
    seed: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
    opening_tokens: int | None = None,
) -> GuardCallback:
    """A guard by name as a callback for a Trainer, with its safety set.

    Args:
        name: as for `guard_named`, like all that are not named here.
        opened: the aligned model.
        safety_rows: safety prompts.
        strength: of the guard.
        budget_kl: of `budget`.
        tuning: examples, for `token_loss`.
        base: model before alignment.
        seed: of what the guard draws.
        answer_tokens: tokens of every answer that count; see `safety_source`.
        opening_tokens: first ones that count by themselves, too; None for the guard's own default.

    Raises:
        InputError: no such guard, it lacks what it needs, or too few safety prompts can be used.
    """
    guard = guard_named(name, opened, strength=strength, budget_kl=budget_kl, tuning=tuning, base=base)
    with torch.random.fork_rng(devices=[]):
        opening = usual_opening(name) if opening_tokens is None else opening_tokens
        large = isinstance(guard, CurvatureBudget) and guard.every > 1
        scored = SCORED_IN_LARGE_SPACES if large else None
        source = safety_source(
            opened, safety_rows, response_tokens=answer_tokens, opening_tokens=opening, scored=scored
        )
        return GuardCallback(guard, source, seed)
