"""Attention that keeps examples apart which lie end to end in one row of tokens.

On a GPU, FlashAttention's kernels, which torch brings, take such a row and where each example
begins. Elsewhere attention needs the examples side by side: it pads them for itself, examples of
similar length together, so that plain causal attention does without a mask. Where a model's layers
see less than all that came before, a sliding window or a chunk, they see here what they do there.
FlashAttention: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedlora_app.foundation.errors import UserError

ATTENTION = "fedlora_packed"
"""Our attention's name among transformers' implementations."""
SHORTEST_WIDTH = 16  # of the groups that attention pads to, each twice as wide as the one before

UNSUPPORTED = {"softcap": "a bound on its scores", "s_aux": "sinks", "position_bias": "a bias"}
"""What some models' attention has beside queries, keys, values and a mask."""
WAY_OUT = "Set training.packing: false."

_calls = [0]


class PackingError(UserError):
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


@dataclass(frozen=True)
class Visible:
    """What tokens of one kind of layer see, where that may be less than all before them.

    ``rule`` (batch, head, query's place, key's place) is transformers' own, by places in the row;
    up to ``reach`` tokens it hides nothing but the future.
    """

    rule: Callable[..., torch.Tensor]
    reach: int


@dataclass
class Groups:
    """All examples of a row of T tokens, laid out when attention first asks for it.

    ``order`` (T,) puts the tokens by group, ``inverse`` back.
    """

    lengths: list[int]
    device: torch.device
    _masks: dict[int, tuple[Visible, torch.Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths)

    def find_mask(self, visible: Visible | None) -> torch.Tensor | None:
        """Return what the longest example's tokens see (L, L), None if all before them.

        A shorter example's is its upper left corner, because the rule counts from its beginning.
        """
        if visible is None or self.longest <= visible.reach:
            return None
        if id(visible) not in self._masks:
            start = sum(self.lengths[: self.lengths.index(self.longest)])
            places = torch.arange(start, start + self.longest, device=self.device)
            mask = visible.rule(0, 0, places[:, None], places[None, :])
            self._masks[id(visible)] = visible, mask
        return self._masks[id(visible)][1]

    @property
    def groups(self) -> list[Group]:
        """The examples by width."""
        return self._layout[0]

    @cached_property
    def order(self) -> torch.Tensor:
        """The token that stands at each place once they lie by group."""
        return send(self._layout[1], self.device)

    @cached_property
    def inverse(self) -> torch.Tensor:
        """Where each token went."""
        return send(self._layout[1].argsort(), self.device)

    @cached_property
    def _layout(self) -> tuple[list[Group], torch.Tensor]:
        return _lay_out(self.lengths, self.device)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [len(group.slots) for group in self.groups]


def group_by_width(lengths: Sequence[int]) -> list[list[int]]:
    """Return the places of the examples that attention treats side by side, group by group."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        groups[max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())].append(place)
    return list(groups.values())


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yield how often our attention has been asked since the block began."""
    _calls[0] = 0
    yield _calls


@torch.compiler.disable  # the groups are never twice the same
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Visible | torch.Tensor | None,
    packed_groups: Groups | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed example; heads as (1, H, T, d), out as (1, T, H, d)."""
    _calls[0] += 1
    if packed_groups is None:
        raise PackingError(
            "The base model does not tell its attention where packed examples begin. " + WAY_OUT
        )
    asked = [what for name, what in UNSUPPORTED.items() if settings.get(name) is not None]
    if isinstance(attention_mask, torch.Tensor):
        asked.append("a mask of its own")
    elif sliding_window is not None and attention_mask is None:
        asked.append("a sliding window by other means than a mask")
    if asked:
        raise PackingError(
            f"The base model's attention asks for {', '.join(asked)}, which packed examples "
            f"cannot be given. {WAY_OUT}"
        )
    mask = packed_groups.find_mask(attention_mask)
    if _has_flash(query) and not dropout and mask is None:
        rows = (heads[0].transpose(0, 1) for heads in (query, key, value))
        starts, longest = settings["cu_seq_lens_q"], packed_groups.longest
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
            attention_mask=None if mask is None else mask[None, None, : group.width, : group.width],
            dropout=dropout,
            scaling=scaling,
            is_causal=mask is None,
        )  # (count, width, H, d)
        rows = padded.flatten(0, 1).to(query.dtype)
        attended.append(_Gather.apply(rows, group.slots, group.sources, group.is_real))
    rows = _Gather.apply(torch.cat(attended), packed_groups.inverse, packed_groups.order)
    return rows[None], None


def _describe_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Visible | None:
    """Return what transformers would make a mask of, for ``_attend``."""
    if use_vmap:  # of a function that a model brings itself
        raise PackingError(
            "The base model's attention asks for a mask of its own, which packed examples cannot "
            f"be given. {WAY_OUT}"
        )
    return None if local_size is None else Visible(mask_function, local_size)


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
AttentionMaskInterface.register(ATTENTION, _describe_mask)
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


def send(places: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device that need not have finished what it was told before."""
    return (
        places.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else places.to(device)
    )


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
        groups.append(Group(len(members), width, *(send(p, device) for p in places)))
    return groups, torch.tensor(order)
