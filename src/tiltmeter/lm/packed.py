"""Several continuations of one prompt in one row of tokens, so that the prompt is read once.

The refusal margin and the safety KL ask a model how it would go on after a prompt in three ways: with its own answer,
with a refusal, with a compliance. The prompt is most of the tokens. Here it stands once, and the continuations behind
it side by side; an attention mask hides each from the others and the positions of each begin where the prompt ends, so
that every continuation is read as if it stood there alone.

A model is free to ignore mask or positions (recurrent layers, sliding windows, ALiBi). So nothing here is assumed of a
model: `kl_and_margin.reads_packed` compares both ways on the longest prompt, and whoever packs asks it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltmeter.lm.conversation import Batch, Example
from tiltmeter.lm.template import UNSUPERVISED

#: Prompts of one pack: what each of the j continuations is, as examples that begin alike.
Branches = Sequence[Example]


@dataclass(frozen=True)
class Packed(Batch):
    """b prompts with j continuations each.

    Attributes:
        tokens: [b, T] long: the prompt, padded on the left so that all prompts end in one column, then one stretch of
            columns per continuation, padded on the right.
        labels: [b j, 1 + w] long, as if each continuation stood alone behind one unsupervised token; a row of tokens
            gives j neighbouring rows of labels.
        positions: [b, T] long.
        allowed: [b, T, T] bool, whether the token of a row may look at the token of a column.
        columns: [k] long, ascending: the columns whose outputs predict something.
        unpack: [j, w] long, which of those columns predicts which label (0 where there is none).
    """

    positions: Tensor
    allowed: Tensor
    columns: Tensor
    unpack: Tensor

    @property
    def together(self) -> int:
        """Neighbouring sequences that share their tokens, j."""
        return int(self.unpack.shape[0])

    @property
    def read(self) -> Tensor:
        """Columns of tokens whose outputs are needed."""
        return self.columns

    def inputs(self, device: torch.device, *, boolean: bool) -> dict[str, Tensor]:
        """Tokens, mask and positions."""
        mask = self.allowed[:, None]
        if not boolean:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
        given = {"attention_mask": mask, "position_ids": self.positions}
        return {**super().inputs(device, boolean=boolean), **{name: each.to(device) for name, each in given.items()}}

    def arrange(self, logits: Tensor) -> Tensor:
        """Logits at `columns`, [b, k, vocabulary], by continuation: [b j, t, vocabulary]."""
        return logits[:, self.unpack[:, self.targets[1]].to(logits.device)].flatten(0, 1)

    def only(self, held: Tensor) -> tuple[Tensor, Batch]:
        """The prompts that any of these sequences belongs to, and all sequences they give."""
        rows = torch.unique(held // self.together)
        kept = (rows[:, None] * self.together + torch.arange(self.together)).flatten()
        part = Packed(
            self.tokens[rows], self.labels[kept], self.positions[rows], self.allowed[rows], self.columns, self.unpack
        )
        return kept, part


def common_prompt(branches: Branches) -> int:
    """Length of what all continuations begin with and none supervises, in tokens."""
    length = min(next(i for i, label in enumerate(each.labels) if label != UNSUPERVISED) for each in branches)
    first = branches[0].tokens[:length]
    for each in branches[1:]:
        alike = [a == b for a, b in zip(first, each.tokens, strict=False)]
        first = first[: alike.index(False) if False in alike else len(alike)]
    return len(first)


def pack(prompts: Sequence[Branches], pad_id: int) -> Packed:
    """Lay prompts and their continuations out.

    Args:
        prompts: b prompts with j continuations each, in one order.
        pad_id: token put where there is nothing.

    Raises:
        ValueError: two continuations of a prompt have no token in common before what is supervised.
    """
    shared = [common_prompt(branches) for branches in prompts]
    if min(shared) == 0:
        raise ValueError("continuations of one prompt have nothing in common; expected the prompt's tokens")
    many = len(prompts[0])
    widths = [max(len(p[j].tokens) - c for p, c in zip(prompts, shared, strict=True)) for j in range(many)]
    front, begins = max(shared), [max(shared) + sum(widths[:j]) for j in range(many)]
    b, length, width = len(prompts), front + sum(widths), max(widths)
    tokens = torch.full((b, length), pad_id, dtype=torch.long)
    positions = torch.zeros(b, length, dtype=torch.long)
    branch = torch.full((b, length), -1)  # -1 padding, 0 prompt, 1, 2, ... continuations
    labels = torch.full((b * many, 1 + width), UNSUPERVISED, dtype=torch.long)
    for i, (branches, c) in enumerate(zip(prompts, shared, strict=True)):
        stretches = [(front - c, branches[0].tokens[:c], 0, 0)]
        stretches += [(begins[j], each.tokens[c:], c, j + 1) for j, each in enumerate(branches)]
        for begin, part, position, number in stretches:
            here = slice(begin, begin + len(part))
            tokens[i, here] = torch.tensor(part)
            positions[i, here] = torch.arange(position, position + len(part))
            branch[i, here] = number
        for j, each in enumerate(branches):
            labels[i * many + j, 1 : 1 + len(each.tokens) - c] = torch.tensor(each.labels[c:])
    asks, asked = branch[:, :, None], branch[:, None, :]
    column = torch.arange(length)
    allowed = (asks >= 0) & (column[:, None] >= column) & ((asked == 0) | (asked == asks) & (asked > 0))
    allowed |= torch.eye(
        length, dtype=torch.bool
    )  # padding looks at itself: a row that may look nowhere has no softmax
    columns = [front - 1, *(begins[j] + t for j in range(many) for t in range(widths[j] - 1))]
    unpack = torch.zeros(many, width, dtype=torch.long)
    place = {column: i for i, column in enumerate(columns)}
    for j in range(many):
        for t in range(1, widths[j]):
            unpack[j, t] = place[begins[j] + t - 1]
    return Packed(tokens, labels, positions, allowed, torch.tensor(columns), unpack)


def packs(
    prompts: Sequence[Branches], pad_id: int, max_tokens: int, groups: Sequence[Sequence[int]] | None = None
) -> list[tuple[list[int], Batch]]:
    """Group prompts of similar length and pack each group.

    Args:
        prompts: m prompts with j continuations each; sequence i j + k is continuation k of prompt i.
        pad_id: see `pack`.
        max_tokens: most tokens in a batch, padding included; a longer prompt is alone in its batch.
        groups: which prompts go together, if that is decided already.

    Returns: sequence numbers and batch, for every batch, in the order of their first prompt.
    """
    many = len(prompts[0])
    sizes = [sum(len(each.tokens) for each in p) - (many - 1) * common_prompt(p) for p in prompts]
    chosen = [list(group) for group in groups] if groups is not None else _alike(sizes, max_tokens)
    return [
        ([i * many + k for i in group for k in range(many)], pack([prompts[i] for i in group], pad_id))
        for group in chosen
    ]


def _alike(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices in groups of similar size, whose largest times their number is at most `most`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if groups and (len(groups[-1]) + 1) * sizes[index] <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return sorted(sorted(group) for group in groups)
