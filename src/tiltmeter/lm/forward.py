"""A causal language model as a function of its trainable parameters. The only file that calls a model functionally."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tiltmeter.errors import UnsupportedModel
from tiltmeter.geometry.objective import Passes
from tiltmeter.geometry.space import ParameterSpace, vectors_in_parts
from tiltmeter.lm.conversation import Batch
from tiltmeter.lm.gathered import gathering, own_part, standard_normal
from tiltmeter.lm.model import inputs_as_they_are
from tiltmeter.lm.sharding import is_divided, is_part
from tiltmeter.lm.template import UNSUPERVISED

#: Parts of the names of parameters that PEFT's LoRA layers cast their inputs for.
LORA = ".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector."


@dataclass(frozen=True)
class Forward:
    """Logits of a model at its anchor, or displaced from it, at the positions that predict supervised tokens.

    Attributes:
        model: in evaluation mode.
        parameters: the trainable parameters by name, tied ones once; the anchor.
        passes: what has been computed so far.
    """

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    passes: Passes = field(default_factory=Passes)

    @property
    def space(self) -> ParameterSpace:
        """The trainable parameters; of those that are divided among processes, this one's part."""
        return ParameterSpace.of({name: own_part(p) for name, p in self.parameters.items()})

    @property
    def whole(self) -> ParameterSpace:
        """The trainable parameters of all processes."""
        return ParameterSpace.of(self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def in_parts(self) -> bool:
        """Whether parameters are divided among processes."""
        return any(is_part(p) for p in self.parameters.values())

    def _require_together(self) -> None:
        if self.in_parts and not vectors_in_parts():
            raise UnsupportedModel(
                "trained weights that are divided among processes (FSDP2) can be measured here where they are; they "
                "are not moved elsewhere and have no products. Train a LoRA, or launch without dividing the model."
            )

    def at(self, displacement: Tensor | None = None, v: Tensor | None = None, step: float = 0.0) -> dict[str, Tensor]:
        """Parameters at anchor + displacement + step v, float32 (or float64), detached; the anchor is not copied.

        Sums are made tensor by tensor: no second vector [n] is held on the way. Of parameters that are divided among
        processes these are this one's parts.

        Raises:
            UnsupportedModel: a place other than the anchor, of divided parameters, outside `gathered.parts_together`.
        """
        if displacement is not None or v is not None:
            self._require_together()
        out = {name: _full(own_part(p)) for name, p in self.parameters.items()}
        for shift, scale in ((displacement, 1.0), (v, step)):
            if shift is not None:
                parts = self.space.split(shift.to(self.device))
                out = {name: torch.add(p, parts[name].to(p.dtype), alpha=scale) for name, p in out.items()}
        return out

    def along(self, v: Tensor) -> dict[str, Tensor]:
        """A direction [n] as named tensors of the parameters' dtypes.

        Raises:
            UnsupportedModel: parameters are divided among processes, outside `gathered.parts_together`.
        """
        self._require_together()
        shifts = self.space.split(v.to(self.device))
        return {name: shifts[name].to(_full(p).dtype) for name, p in self.parameters.items()}

    def random(self, seed: int) -> Tensor:
        """Independent standard normal numbers [n], whatever the number of processes, where the parameters are."""
        dtype = next(iter(self.at().values())).dtype
        return standard_normal(self.parameters, seed, dtype).to(self.device)

    def _widened(self) -> dict[str, Tensor]:
        """Frozen weights in half precision as float32 where trained ones, which are widened, would meet them.

        A LoRA casts what goes into it and comes out of it itself, so there they stay as they are.

        Cost: where that is so, a copy of the frozen weights in float32 as long as a micro-batch lasts.
        """
        meet = any(_is_half(p) and not any(part in name for part in LORA) for name, p in self.parameters.items())
        if not meet or self.in_parts:
            return {}
        frozen = ((name, p) for name, p in self.model.named_parameters() if name not in self.parameters)
        return {name: _full(p.detach()) for name, p in frozen if _is_half(p)}

    def logits(self, parameters: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [b, t, vocabulary] and the labels [b, t] they predict, at the t positions any example supervises.

        Where the model's signature allows it, the output layer runs on those positions alone.
        """
        # a PEFT model hands its arguments on to the model inside
        inner = next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        keep, targets = batch.read, batch.targets[0]
        boolean = getattr(inner.config, "_attn_implementation", None) == "sdpa"
        inputs: dict[str, object] = {**batch.inputs(self.device, boolean=boolean), "use_cache": False}
        narrow = "logits_to_keep" in inspect.signature(inner.forward).parameters
        if narrow:
            inputs["logits_to_keep"] = keep.to(self.device)
        whole, parts = {**self._widened(), **parameters}, dict[int, Tensor]()
        if self.in_parts:
            live = dict(self.model.named_parameters())  # what is trained, though the anchor is elsewhere
            whole, parts = {}, {id(live[name]): parameters[name] for name in self.parameters}
        back = torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values())
        together = gathering(self.model, parts, back=back) if is_divided(self.model) else nullcontext()
        with together, inputs_as_they_are(self.model):
            out: Tensor = functional_call(self.model, whole, (), inputs, tie_weights=True).logits
        if not narrow:
            out = out[:, keep.to(self.device)]
        return _full(batch.arrange(out)), targets.to(self.device)


#: Turns logits [b, t, vocabulary] and labels [b, t] of micro-batch number i into one value per sequence [b].
Reading = Callable[[Tensor, Tensor, int], Tensor]


def negative_log_likelihood(logits: Tensor, labels: Tensor, _: int = 0) -> Tensor:
    """Sum over supervised tokens of -log p(token), nats, [b]."""
    supervised = labels != UNSUPERVISED
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return -(picked * supervised).sum(-1)


def divergence(log_probability: Tensor, logits: Tensor, labels: Tensor, opening: int = 0) -> Tensor:
    """Mean over supervised tokens of KL(p_anchor || p), nats per token, [b].

    Args:
        log_probability: of the anchor at the supervised positions, [P, vocabulary], in row-major order.
        logits: [b, t, vocabulary].
        labels: [b, t].
        opening: where it is not zero, the mean over so many first supervised tokens if that is more.

    Written as sum p_anchor (e^d - 1 - d) with d = log p - log p_anchor: the same sum, since both add up to one, but
    every term is of second order and none is negative, so small divergences keep their digits in float32.
    """
    supervised = labels != UNSUPERVISED
    difference = torch.log_softmax(logits[supervised], -1) - log_probability
    terms = (log_probability.exp() * (torch.expm1(difference) - difference)).sum(-1)
    whole = per_sequence(terms, supervised)
    if not opening:
        return whole
    first = supervised & (supervised.cumsum(1) <= opening)
    return torch.maximum(whole, per_sequence(terms[first[supervised]], first))


def per_sequence(values: Tensor, supervised: Tensor) -> Tensor:
    """Mean over each sequence's supervised positions: values [P, ...] and mask [b, t] -> [b, ...]."""
    rows = supervised.nonzero()[:, 0]
    counts = supervised.sum(1).clamp_min(1).to(values.dtype)
    total = values.new_zeros((supervised.shape[0], *values.shape[1:])).index_add(0, rows, values)
    return total / counts.view(-1, *[1] * (values.ndim - 1))


def _is_half(p: Tensor) -> bool:
    return p.dtype in (torch.float16, torch.bfloat16)


def _full(tensor: Tensor) -> Tensor:
    """At least float32: displacements and second differences drown in the rounding of half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
