"""Examples laid end to end without padding, and attention that keeps them apart.

A micro-batch is one row of tokens, so that every linear layer works on real tokens only. Positions
restart with each example. On a GPU, FlashAttention's kernels, which torch brings, take such a row
and where each example begins. Elsewhere attention needs the examples side by side: it pads them
for itself, examples of similar length together, so that plain causal attention does without a mask.
Packing and its contamination: Krell et al. 2021, https://arxiv.org/abs/2107.02027. FlashAttention:
Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, DataCollatorWithFlattening, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedlora_app.data.tokens import Example

ATTENTION = "fedlora_packed"
"""Our attention's name among transformers' implementations."""
SHORTEST_WIDTH = 16  # of the groups that attention pads to, each twice as wide as the one before
TOLERANCE = 0.05  # of hidden states, relative; other kernels and bf16 stay well below it

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some models' attention has beside queries, keys, values and a sliding window."""

_collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
_trusted: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


class PackingError(RuntimeError):
    """The base model computes something else for packed examples than for each alone."""


@dataclass(frozen=True)
class Group:
    """Examples of N tokens in all that attention treats side by side, padded on the right.

    ``sources`` (count * width,) are the places among the N that the padded tokens come from, the
    first one's in the place of padding, which ``is_real`` tells; ``slots`` (N,) leads back.
    """

    count: int
    width: int
    sources: torch.Tensor
    is_real: torch.Tensor
    slots: torch.Tensor


@dataclass
class Groups:
    """All examples of a row of T tokens, laid out when attention first asks for it.

    ``order`` (T,) puts the tokens by group, ``inverse`` back.
    """

    lengths: list[int]
    device: torch.device

    @property
    def groups(self) -> list[Group]:
        """The examples by width."""
        return self._layout[0]

    @cached_property
    def order(self) -> torch.Tensor:
        """The token that stands at each place once they lie by group."""
        return _send(self._layout[1], self.device)

    @cached_property
    def inverse(self) -> torch.Tensor:
        """Where each token went."""
        return _send(self._layout[1].argsort(), self.device)

    @cached_property
    def _layout(self) -> tuple[list[Group], torch.Tensor]:
        return _lay_out(self.lengths, self.device)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [len(group.slots) for group in self.groups]


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


def group_by_width(lengths: Sequence[int]) -> list[list[int]]:
    """Return the places of the examples that attention treats side by side, group by group."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        groups[max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())].append(place)
    return list(groups.values())


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
        name: _send(value, device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    inputs["packed_groups"] = Groups([len(example.input_ids) for example in examples], device)
    return PackedBatch(
        inputs,
        _send(torch.tensor(predicting), device),
        _send(torch.tensor(targets), device),
        [example.num_answer_tokens for example in examples],
    )


def _send(places: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device that need not have finished what it was told before."""
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


@contextmanager
def packed_attention(base: PreTrainedModel, implementation: str = ATTENTION) -> Iterator[None]:
    """Have a model's attention keep packed examples apart while the block runs.

    Raises:
        PackingError: it does not, because some layer mixes tokens by other means.
    """
    before = base.config._attn_implementation
    try:
        base.set_attn_implementation(implementation)
        trusted = _trusted.setdefault(base, set())
        if implementation not in trusted:
            _require_separation(base)
            trusted.add(implementation)
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
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed example; heads as (1, H, T, d), out as (1, T, H, d)."""
    unknown = [name for name in UNSUPPORTED if settings.get(name) is not None]
    if unknown:
        raise PackingError(
            f"The base model's attention asks for {', '.join(unknown)}, which packed examples "
            "cannot be given. Use another base model."
        )
    longest = max(packed_groups.lengths)
    hides = sliding_window is not None and longest > sliding_window
    if _has_flash(query) and not (dropout or hides):
        rows = (heads[0].transpose(0, 1) for heads in (query, key, value))
        starts = settings["cu_seq_lens_q"]
        return _FlashAttention.apply(*rows, starts, longest, scaling)[None], None
    states = (_by_group(heads, packed_groups) for heads in (query, key, value))
    # On a CPU the backward pass takes three times as long in bf16 as in fp32.
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    dtype = torch.promote_types(dtype, query.dtype)
    attended = []
    for group, *parts in zip(packed_groups.groups, *states, strict=True):
        padded, _ = sdpa_attention_forward(
            module,
            *(_pad(part, group).to(dtype) for part in parts),
            attention_mask=_window_mask(group.width, sliding_window, query.device),
            dropout=dropout,
            scaling=scaling,
            is_causal=True,
        )  # (count, width, H, d)
        rows = padded.flatten(0, 1).to(query.dtype)
        attended.append(_Gather.apply(rows, group.slots, group.sources, group.is_real))
    rows = _Gather.apply(torch.cat(attended), packed_groups.inverse, packed_groups.order)
    return rows[None], None


def _has_flash(query: torch.Tensor) -> bool:
    """Return whether torch's FlashAttention kernels take heads (1, H, T, d) like these."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_known = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return is_known and torch.cuda.get_device_capability(query.device) >= (8, 0)


class _FlashAttention(torch.autograd.Function):
    """Causal attention within each example of one row of tokens, the same bits every time.

    Torch's own backward pass takes the faster kernel, whose sums have no fixed order, wherever
    ``use_deterministic_algorithms`` only warns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        scaling: float | None,
    ) -> torch.Tensor:
        """Heads (T, H, d), keys and values with fewer, ``starts`` (N + 1,); out as queries."""
        ctx.lengths = (starts, starts, longest, longest, 0.0, True)  # no dropout, causal
        ctx.scaling = scaling
        attended, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *ctx.lengths, False, scale=scaling
        )
        ctx.save_for_backward(query, key, value, attended, logsumexp, state, unused)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, state, unused = ctx.saved_tensors
        with _strictly_deterministic():
            gradients = torch.ops.aten._flash_attention_backward(
                gradient.contiguous(), *tensors, *ctx.lengths, state, unused, scale=ctx.scaling
            )
        return *gradients, None, None, None


@contextmanager
def _strictly_deterministic() -> Iterator[None]:
    """Have torch's warning that something is not deterministic be none, where it was asked for."""
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(
            torch.are_deterministic_algorithms_enabled(), warn_only=only_warns
        )


AttentionInterface.register(ATTENTION, _attend)
torch.backends.cuda.enable_cudnn_sdp(False)  # it plans again for every shape, and few recur


def _by_group(states: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, ...]:
    """Return (1, H, T, d) as one (N, H, d) for each group."""
    rows = states[0].transpose(0, 1)
    return _Gather.apply(rows, groups.order, groups.inverse).split(groups.sizes)


def _pad(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """Return (N, H, d) as (count, H, width, d).

    What stands in the place of padding lies behind all real tokens, so that no query that counts
    sees it, and it has no gradient.
    """
    padded = _Gather.apply(rows, group.sources, group.slots)
    return padded.unflatten(0, (group.count, group.width)).transpose(1, 2)


class _Gather(torch.autograd.Function):
    """Rows from other places, and their gradients straight back from where each row went.

    Autograd's own gradient would be a sum over places, where nothing coincides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        there: torch.Tensor,
        back: torch.Tensor,
        is_used: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the rows at ``there``; the gradient of row i is that of ``back[i]``, or 0."""
        ctx.back, ctx.is_used = back, is_used
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient = gradient.index_select(0, ctx.back)
        if ctx.is_used is not None:
            gradient = gradient.masked_fill_(~ctx.is_used[:, None, None], 0)
        return gradient, None, None, None


def _window_mask(width: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return what a sliding window hides beside the future (width, width), None if nothing."""
    if window is None or width <= window:
        return None
    ages = torch.arange(width, device=device)
    ages = ages[:, None] - ages[None, :]
    return ((ages >= 0) & (ages < window))[None, None]


def _lay_out(lengths: Sequence[int], device: torch.device) -> tuple[list[Group], torch.Tensor]:
    """Return examples by width, and the order (T,) of their tokens then, in host memory."""
    starts = [0, *accumulate(lengths)]
    groups, order = [], []
    for members in group_by_width(lengths):
        width = max(lengths[place] for place in members)  # no wider than needed
        sources, slots, count = [], [], 0
        for row, place in enumerate(members):
            start, length = starts[place], lengths[place]
            sources += [*range(count, count + length), *[0] * (width - length)]
            slots += range(row * width, row * width + length)
            order += range(start, start + length)
            count += length
        is_real = torch.zeros(len(members) * width, dtype=torch.bool)
        is_real[slots] = True
        places = (torch.tensor(sources), is_real, torch.tensor(slots))
        groups.append(Group(len(members), width, *(_send(p, device) for p in places)))
    return groups, torch.tensor(order)


def _require_separation(base: PreTrainedModel) -> None:
    """Compare what a model makes of an example behind another one, and alone and unpacked.

    In evaluation mode and without a draw from the random numbers, so that nothing depends on
    whether this process has checked before.
    """
    example, packed = Example([0, 1, 2], 1), base.config._attn_implementation
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            batch = pack([Example([1, 2, 0, 2], 1), example], base.device)
            together = compute_hidden_states(base, batch)[4:].float()
            base.set_attn_implementation("sdpa")
            ids = torch.tensor([example.input_ids], device=base.device)
            alone = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    finally:
        base.set_attn_implementation(packed)
        base.train(was_training)
    if not (together - alone).norm() <= TOLERANCE * alone.norm():
        raise PackingError(
            "The base model computes something else for examples that are packed together than "
            "for each alone, so it would be trained on the wrong context. Set training.packing to "
            "false; if it is, the model's attention is of a kind that is not supported."
        )
