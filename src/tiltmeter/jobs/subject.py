"""The aligned model and its safety set, measured once; any number of tuning sets can then be assessed against them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from tiltmeter.errors import DegenerateError, UnsupportedModel
from tiltmeter.geometry.forecast import Standing
from tiltmeter.geometry.motion import LARGE
from tiltmeter.geometry.objective import Passes
from tiltmeter.geometry.sensitivity import Sensitivity, lanczos_sensitivity, measure_sensitivity, split_half_overlap
from tiltmeter.geometry.space import norm
from tiltmeter.jobs.inputs import Opened
from tiltmeter.jobs.memory import memory_now, tokens_within
from tiltmeter.jobs.recipe import Lora
from tiltmeter.lm.distributed import Sharded, shared_divergence, shared_objective, shared_standing
from tiltmeter.lm.divergence import DivergenceObjective, divergence_objective
from tiltmeter.lm.forward import Forward
from tiltmeter.lm.four_bit import holds_four_bits
from tiltmeter.lm.gram import Gram, gram, per_layer_name
from tiltmeter.lm.kl_and_margin import reads_packed, standing
from tiltmeter.lm.memory import release, within_memory
from tiltmeter.lm.model import Loaded, add_lora, trainable
from tiltmeter.lm.objective import LanguageObjective, likelihood_objective, negative_margin_objective
from tiltmeter.lm.processes import least_of_all
from tiltmeter.lm.rows import RowSet
from tiltmeter.lm.safety import SafetySet, prepare_safety
from tiltmeter.lm.scores import Score, sampled_labels, score_loss

#: Tokens per micro-batch in a large space, where vectors of the space take the memory.
LARGE_TOKENS = 192

#: Gram matrix, subspace (or why there is none) and split-half overlaps.
Subspace = tuple[Gram | None, Sensitivity | None, str | None, Tensor | None]

#: Why what the forecast does without is not there, and what its interval and horizon are made of.
FORECAST_ONLY, SCREEN = "left out (--forecast-only)", "left out (--screen)"


class Report(Protocol):
    """Receives the name of each stage as it begins."""

    def __call__(self, stage: str) -> None:
        """Begin a stage."""
        ...


def silent(stage: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Options:
    """How much to measure.

    Attributes:
        max_safety: most safety prompts.
        max_tuning: most tuning rows.
        response_tokens: length of the answers the aligned model gives to the safety prompts.
        max_length: longest sequence, tokens; the model's context if that is shorter.
        rank: sensitive directions to keep.
        score: whose gradients span the safety subspace; see `lm.scores`.
        groups: disjoint groups of tuning batches whose scatter gives the sampling error.
        grid: steps at which the forecast is evaluated.
        looks: gradients that the rehearsal measures on its way; half as many in the one that judges it.
        rehearsal_rows: tuning rows in all looks of a rehearsal together, at least, but for those that the run itself
            takes or the sample has; each takes those of a step at least. Their noise is part of the forecast's, and
            twice the looks with half the rows each carry the same.
        curved: whether to follow the curved path too (a gradient of the whole sample more).
        krylov: Hessian products for the Krylov path of SGD; 0 for none.
        coupling: whether to measure the curvature coupling (gamma, crossover); the forecast does without.
        forecast_only: whether to leave out all that the forecast does without: the coupling, the safety subspace, the
            overlap (but under SGD, where the interval needs it), the straight path beyond its first stretch and random
            directions.
        screen: whether to leave out what interval and horizon are made of as well: the rehearsal with fewer looks, the
            scatter of the rows, their loss and the margin's gradient. Every look, the first too, then takes the rows of
            one step, `max_tuning` at most. The KL is not corrected for the noise of the rows.
        max_tokens: most tokens per micro-batch.
        memory_gb: largest memory the assessment may take; micro-batches are made small enough. None for no limit.
        level: of the intervals.
        budget_kl: largest tolerable safety KL, nats per token.
        budget_margin: smallest tolerable mean refusal margin, nats.
        budget_refusal: smallest tolerable refusal rate.
        seed: of LoRA's start, bootstraps and random directions.
    """

    max_safety: int = 32
    max_tuning: int = 32
    response_tokens: int = 24
    max_length: int = 512
    rank: int = 8
    score: Score = "response"
    groups: int = 4
    grid: int = 5
    looks: int = 16
    rehearsal_rows: int = 64
    curved: bool = False
    krylov: int = 0
    coupling: bool = True
    forecast_only: bool = False
    screen: bool = False
    max_tokens: int = 512
    memory_gb: float | None = None
    level: float = 0.9
    budget_kl: float | None = None
    budget_margin: float | None = None
    budget_refusal: float | None = None
    seed: int = 0

    @property
    def left_out(self) -> str | None:
        """Why there is nothing but the forecast; None if there is more."""
        return SCREEN if self.screen else FORECAST_ONLY if self.forecast_only else None

    def both_looks(self, steps: int) -> tuple[int, int]:
        """Looks of the two rehearsals of a run of so many steps: fewer, and all.

        A run of no more steps than looks is rehearsed step by step, and there is nothing to judge: both are its steps.
        So are both alike in a screening, where nothing is judged.
        """
        if steps <= self.looks:
            return steps, steps
        if self.screen:
            return self.looks, self.looks
        return max(1, self.looks // 2), self.looks


@dataclass(frozen=True)
class Subject:
    """What is known of the aligned model before any tuning set is looked at.

    Attributes:
        opened: the model and its openings.
        forward: the model as a function of the parameters to be trained; counts all passes.
        rows: the safety rows.
        safety: tokenised safety set.
        divergence: safety KL.
        negative_margin: minus the refusal margin.
        standing: both, at a displacement.
        anchor_margin: [m], nats.
        sensitivity: the safety subspace, or None.
        no_sensitivity: why there is none.
        random_form: u' F u of a random direction u of length one, mean over prompts: what any direction overlaps; None
            where the forecast alone is asked for.
        split_half: overlap of the subspaces of random halves of the prompts, or None.
        gram: per-parameter inner products of the scores, or None where no Gram matrix was formed.
        score: per-example scores, or None.
        seconds: time spent.
        hessian: how Hessian products are taken in this space.
        lora: the LoRA configuration, or None for full fine-tuning.
        spent: passes that measuring the subject took.
        max_tokens: tokens per micro-batch.
        token_seconds: seconds of a forward and backward pass per token, from the margin's gradient; NaN if that was not
            measured with the subject.
        measured_gradient: `margin_gradient`, or None where it is left out (a screening).
    """

    opened: Opened
    forward: Forward
    rows: RowSet
    safety: SafetySet
    divergence: DivergenceObjective | Sharded
    negative_margin: LanguageObjective | Sharded
    standing: Standing
    anchor_margin: Tensor
    sensitivity: Sensitivity | None
    no_sensitivity: str | None
    random_form: float | None
    split_half: Tensor | None
    gram: Gram | None
    score: LanguageObjective | None
    seconds: float
    hessian: Literal["exact", "difference"] = "exact"
    lora: Lora | None = None
    spent: Passes = field(default_factory=Passes)
    max_tokens: int = 512
    token_seconds: float = math.nan
    measured_gradient: Tensor | None = None

    @property
    def loaded(self) -> Loaded:
        """Model and tokenizer."""
        return self.opened.loaded

    @cached_property
    def margin_gradient(self) -> Tensor:
        """Gradient of minus the mean margin, [n].

        Cost: none, or one forward and backward pass of the openings where it was not measured with the subject.
        """
        if self.measured_gradient is not None:
            return self.measured_gradient
        return _shares(self.negative_margin.gradient(), self.forward)

    def layer_of(self, parameter: str) -> str:
        """Part of the model that a parameter is in."""
        return per_layer_name(parameter)


def with_lora(opened: Opened, lora: Lora | None, seed: int) -> Opened:
    """The model with the parameters that the recipe trains marked as trainable: a fresh LoRA adapter, or all.

    Raises:
        UnsupportedModel: all of them, and some are packed into four bits.
    """
    if lora is None:
        if holds_four_bits(opened.loaded.model):
            raise UnsupportedModel(
                f"{opened.loaded.name} holds its weights in four bits, which cannot be trained themselves: give a LoRA "
                "recipe (--lora-r 8), or load the weights whole (--dtype float32)"
            )
        opened.loaded.model.requires_grad_(True)
        return opened
    loaded = add_lora(
        opened.loaded,
        r=lora.r,
        alpha=lora.alpha,
        targets=None if lora.targets is None else list(lora.targets),
        seed=seed,
    )
    return Opened(loaded, opened.refusal_opening, opened.compliance_opening)


def measure_subject(
    opened: Opened,
    rows: RowSet,
    lora: Lora | None,
    options: Options,
    *,
    safety: SafetySet | None = None,
    report: Report = silent,
    listen: Callable[[Passes], None] | None = None,
) -> Subject:
    """Measure what does not depend on the tuning set.

    Args:
        opened: the aligned model, with the trainable parameters marked (`with_lora`).
        rows: safety rows.
        lora: the LoRA configuration that `opened` carries, or None.
        options: how much to measure.
        safety: the tokenised safety set, if it was prepared before (a model at B = 0 answers as its base does).
        report: told of every stage.
        listen: given the pass counts before the first pass.

    Raises:
        DegenerateError: the prompts do not determine `options.rank` directions.

    Cost: answers of the model, one forward pass over answers and openings each, and two forward passes over the longest
        prompt; one gradient of the margin unless this is a screening; one Gram matrix and one JVP of the answers unless
        the forecast alone is asked for.
    """
    begin = time.perf_counter()
    loaded = opened.loaded
    forward = Forward(loaded.model, trainable(loaded.model, parts=True))
    if listen is not None:
        listen(forward.passes)
    # in a large space Hessian products are differences of gradients: two passes, and no second graph in memory; of
    # divided weights too, for backward mode twice, by which exact ones are tried, would need the parts of all processes
    plain = forward.whole.size <= LARGE and not forward.in_parts
    hessian: Literal["exact", "difference"] = "exact" if plain else "difference"
    if safety is None:
        report("answers of the aligned model")
        safety = answer_safety(opened, rows, options, forward.passes)
    if options.rank > safety.m and options.left_out is None:
        raise DegenerateError(
            f"asked for {options.rank} sensitive directions but only {safety.m} safety prompts can be used. "
            f"Add safety prompts or ask for rank <= {safety.m}."
        )
    if forward.whole.size > LARGE:
        options = replace(options, max_tokens=min(options.max_tokens, LARGE_TOKENS))
    if options.memory_gb is not None:
        longest = max(len(e.tokens) for e in (*safety.responses, *safety.refusals, *safety.compliances))
        held, _ = memory_now(forward.device)
        config, most = loaded.model.config, max(longest, min(options.max_length, loaded.context))
        fits = tokens_within(options.memory_gb, held, forward.space.size, options.groups, config, most)
        options = replace(options, max_tokens=least_of_all(min(options.max_tokens, fits)))
    pad = loaded.tokenizer.pad_token_id
    report("anchor")
    kl = divergence_objective(forward, safety.responses, pad, options.max_tokens, hessian=hessian)
    packed = reads_packed(forward, safety, pad)
    openings = safety.refusals, safety.compliances
    negative = negative_margin_objective(forward, *openings, pad, options.max_tokens, packed=packed)
    both = shared_standing(standing(kl, negative, safety, pad, packed=packed), forward)
    divergence, margin = shared_divergence(kl), shared_objective(negative)
    anchor_margin = -margin.losses()
    margin_gradient, token_seconds = None, math.nan
    if not options.screen:
        began = time.perf_counter()
        margin_gradient = _shares(margin.gradient(), forward)
        token_seconds = (time.perf_counter() - began) / margin.work
    release()
    score, random_form = None, None
    subspace: Subspace = None, None, options.left_out, None
    if options.left_out is None:
        report("safety subspace")
        score = _score(forward, safety, options, pad)
        subspace = _subspace(score, divergence, options)
        release()
        random = random_direction(forward, 1.0, options.seed)
        random_form = float(divergence.fisher_form([random])[:, 0, 0].mean())
        del random
        release()
    products, sensitivity, reason, halves = subspace
    return Subject(
        opened,
        forward,
        rows,
        safety,
        divergence,
        margin,
        both,
        anchor_margin,
        sensitivity,
        reason,
        random_form,
        halves,
        products,
        score,
        time.perf_counter() - begin,
        hessian,
        lora,
        snapshot(forward.passes),
        options.max_tokens,
        token_seconds,
        margin_gradient,
    )


def _shares(gradient: Tensor, forward: Forward) -> Tensor:
    """The margin's gradient as it is kept: it tells shares and sampling errors, for which three digits are enough."""
    return gradient.to(torch.bfloat16) if forward.whole.size > LARGE else gradient


def random_direction(forward: Forward, length: float, seed: int) -> Tensor:
    """A random direction of a given length, [n]."""
    out = forward.random(seed)
    return out.mul_(length / norm(out))


def snapshot(passes: Passes) -> Passes:
    """The counts as they stand now."""
    return Passes(+passes.calls, +passes.tokens)


def answer_safety(opened: Opened, rows: RowSet, options: Options, passes: Passes) -> SafetySet:
    """Tokenise the safety set, with the model's own answers; counts the generated tokens as forward passes."""
    safety = prepare_safety(
        opened.loaded,
        rows.rows,
        limit=options.max_safety,
        max_length=min(options.max_length, opened.loaded.context),
        response_tokens=options.response_tokens,
        refusal_opening=opened.refusal_opening,
        compliance_opening=opened.compliance_opening,
    )
    if safety.source.startswith("generated"):
        passes.add("forward", sum(len(example.tokens) for example in safety.responses))
    return safety


def _score(forward: Forward, safety: SafetySet, options: Options, pad: int) -> LanguageObjective | None:
    if options.score == "gauss-newton":
        return None
    if options.score == "margin":
        return negative_margin_objective(forward, safety.refusals, safety.compliances, pad, options.max_tokens)
    examples = safety.responses
    if options.score == "sampled":
        examples = sampled_labels(forward, examples, pad, options.max_tokens, options.seed)
    return likelihood_objective(forward, examples, pad, options.max_tokens, per="root")


def _subspace(score: LanguageObjective | None, divergence: DivergenceObjective | Sharded, options: Options) -> Subspace:
    if score is None:
        n = divergence.space.size
        if n > LARGE:
            raise UnsupportedModel(
                f"the Gauss-Newton subspace holds {2 * options.rank + 10} vectors of {n} parameters; "
                "use --score response, or LoRA"
            )
        return None, lanczos_sensitivity(divergence, options.rank, 2 * options.rank + 10, options.seed), None, None
    forward = score.forward
    products = within_memory(
        score,
        lambda: gram(
            forward.model, [batch for _, batch in score.chunks], score_loss, forward.parameters, store_bytes=3 * 2**29
        ),
    )
    sequences = torch.cat([members for members, _ in score.chunks])
    forward.passes.add("gram", score.work, len(score.chunks))
    mix = torch.zeros(score.m, len(sequences), dtype=torch.float64)
    mix[score.owner[sequences], torch.arange(len(sequences))] = score.factor[sequences]
    shares = {name: mix @ block @ mix.T for name, block in products.by_parameter.items()}
    whole = Gram(mix @ products.total @ mix.T, shares)
    try:
        sensitivity = measure_sensitivity(shared_objective(score), options.rank, whole.total)
    except DegenerateError as error:
        return whole, None, str(error), None
    half = score.m // 2
    halves = split_half_overlap(whole.total, min(options.rank, half), 20, options.seed) if half >= 2 else None
    return whole, sensitivity, None, halves


def layer_sensitivity(products: Gram) -> dict[str, float]:
    """Share of the score energy (trace of the Gram matrix) in every layer."""
    total = float(products.total.trace())
    out: dict[str, float] = {}
    for name, block in products.by_parameter.items():
        layer = per_layer_name(name)
        out[layer] = out.get(layer, 0.0) + float(block.trace()) / total
    return out
