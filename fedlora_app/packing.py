"""Examples laid end to end without padding, and attention that keeps them apart.

A micro-batch is one row of tokens, so that every linear layer works on real tokens only. Positions
begin anew with each example. Attention alone needs the examples side by side: it pads them for
itself, examples of similar length together, so that plain causal attention does without a mask.
Packing and its contamination: Krell et al. 2021, https://arxiv.org/abs/2107.02027.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DataCollatorWithFlattening, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedlora_app.tokens import Example

ATTENTION = "fedlora_packed"
"""Our attention's name among transformers' implementations."""
FLASH_ATTENTION = "flash_attention_2"
SHORTEST_WIDTH = 16  # of the groups that attention pads to, each twice as wide as the one before

_collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
_trusted: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class PackingError(RuntimeError):
    """The base model lets packed examples see each other."""


@dataclass(frozen=True)
class Group:
    """Examples that attention treats side by side, padded on the right.

    ``sources`` (count * width,) are the places in the packed row that their tokens come from, with
    each example's first in the place of padding, and ``slots`` (N,) the places of real tokens.
    """

    count: int
    width: int
    sources: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class Groups:
    """All examples of a row; ``inverse`` (T,) leads from the groups' order to the row's."""

    groups: list[Group]
    inverse: torch.Tensor


@dataclass(frozen=True)
class PackedBatch:
    """One row of T tokens from several examples, on the model's device.

    ``predicting`` (N,) are the places whose hidden states predict the answers' tokens ``targets``
    (N,), and ``counts`` tells how many of them each example has.
    """

    inputs: dict[str, Any]
    predicting: torch.Tensor
    targets: torch.Tensor
    counts: list[int]


def split_into_packs(examples: Sequence[Example], max_tokens: int | None) -> list[list[Example]]:
    """Return groups of at most ``max_tokens`` tokens, the longest examples first (first fit).

    Args:
        max_tokens: a longer example has a group of its own; None gives each one its own.
    """
    if max_tokens is None:
        return [[example] for example in examples]
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda ex: -len(ex.input_ids)):
        size = len(example.input_ids)
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            packs.append([])
            room.append(max_tokens)
            place = len(packs) - 1
        packs[place].append(example)
        room[place] -= size
    return packs


def pack(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """Lay examples end to end."""
    inputs = _collate([{"input_ids": example.input_ids} for example in examples])
    del inputs["labels"]
    starts = inputs["cu_seq_lens_q"].tolist()
    predicting, targets = [], []
    for start, example in zip(starts, examples, strict=False):
        end = len(example.input_ids)
        predicting += range(start + example.answer_start - 1, start + end - 1)
        targets += example.input_ids[example.answer_start :]
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    inputs["packed_groups"] = _group([len(example.input_ids) for example in examples], device)
    return PackedBatch(
        inputs,
        torch.tensor(predicting, device=device),
        torch.tensor(targets, device=device),
        [example.num_answer_tokens for example in examples],
    )


@contextmanager
def packed_attention(base: PreTrainedModel, implementation: str = ATTENTION) -> Iterator[None]:
    """Have a model's attention keep packed examples apart while the block runs.

    Raises:
        PackingError: it does not, because some layer mixes tokens by other means.
    """
    before = base.config._attn_implementation
    base.set_attn_implementation(implementation)
    try:
        if base not in _trusted:
            _require_separation(base)
            _trusted.add(base)
        yield
    finally:
        base.set_attn_implementation(before)


def compute_hidden_states(base: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Return the last hidden states (T, D); call it within ``packed_attention``."""
    # A cache would make transformers forget where one example ends.
    return base.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]


@torch.compiler.disable  # the groups are never twice the same
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_groups: Groups,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed example; heads as (1, H, T, d), out as (1, T, H, d)."""
    attended = []
    for group in packed_groups.groups:
        parts = (_pad(states, group) for states in (query, key, value))
        padded, _ = sdpa_attention_forward(
            module,
            *parts,
            attention_mask=_window_mask(group.width, sliding_window, query.device),
            dropout=dropout,
            scaling=scaling,
            is_causal=True,
        )  # (count, width, H, d)
        attended.append(padded.flatten(0, 1).index_select(0, group.slots))
    return torch.cat(attended).index_select(0, packed_groups.inverse)[None], None


AttentionInterface.register(ATTENTION, _attend)


def _pad(states: torch.Tensor, group: Group) -> torch.Tensor:
    """Return a group's part of (1, H, T, d) as (count, H, width, d).

    What stands in the place of padding lies behind all real tokens, so that no query that counts
    sees it.
    """
    rows = states[0].transpose(0, 1).index_select(0, group.sources)  # (count * width, H, d)
    return rows.unflatten(0, (group.count, group.width)).transpose(1, 2)


def _window_mask(width: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return what a sliding window hides beside the future (width, width), None if nothing."""
    if window is None or width <= window:
        return None
    ages = torch.arange(width, device=device)
    ages = ages[:, None] - ages[None, :]
    return ((ages >= 0) & (ages < window))[None, None]


def _group(lengths: Sequence[int], device: torch.device) -> Groups:
    by_width: dict[int, list[tuple[int, int]]] = defaultdict(list)
    start = 0
    for length in lengths:
        width = max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())
        by_width[width].append((start, length))
        start += length
    groups, order = [], []
    for members in by_width.values():
        width = max(length for _, length in members)  # no wider than needed
        sources, slots = [], []
        for row, (start, length) in enumerate(members):
            tokens = range(start, start + length)
            sources += [*tokens, *[start] * (width - length)]
            slots += range(row * width, row * width + length)
            order += tokens
        places = (torch.tensor(places, device=device) for places in (sources, slots))
        groups.append(Group(len(members), width, *places))
    return Groups(groups, torch.tensor(order, device=device).argsort())


def _require_separation(base: PreTrainedModel) -> None:
    """Compare what a model makes of an example behind two different ones."""
    device = base.device
    with torch.no_grad():
        first, second = (
            compute_hidden_states(
                base, pack([Example([token] * 3, 1), Example([0, 1, 2], 1)], device)
            )
            for token in (1, 2)
        )
    if not torch.equal(first[3:], second[3:]):
        raise PackingError(
            "The base model's layers let examples that are packed together see each other, so it "
            "would be trained on the wrong context. Set training.packing to false."
        )
