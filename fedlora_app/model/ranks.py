"""Adapters of several ranks: cutting, padding and joining them along the rank.

An adapter's A is (rank, in) and its B (out, rank), so that a part of the rank is rows of A and the
same columns of B, and joined adapters add up what each of them adds.
"""

from __future__ import annotations

import torch

from fedlora_app.config.schema import Config

Tensors = dict[str, torch.Tensor]


def rank_axis(key: str) -> int:
    """Return along which axis of a tensor its adapter's rank lies."""
    return 0 if ".lora_A." in key else 1


def take_ranks(state: Tensors, start: int, stop: int) -> Tensors:
    """Return the part of an adapter from one rank up to another, as views."""
    return {key: t.narrow(rank_axis(key), start, stop - start) for key, t in state.items()}


def join_ranks(*states: Tensors) -> Tensors:
    """Return the adapter that adds what these add together, one rank after the other."""
    return {key: torch.cat([s[key] for s in states], dim=rank_axis(key)) for key in states[0]}


def pad_ranks(state: Tensors, rank: int) -> Tensors:
    """Return the adapter with zeros up to a rank, which adds the same."""
    padded = {}
    for key, tensor in state.items():
        axis = rank_axis(key)
        shape = list(tensor.shape)
        shape[axis] = rank - shape[axis]
        padded[key] = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
    return padded


def resize_ranks(shapes: dict[str, torch.Size], rank: int) -> dict[str, torch.Size]:
    """Return the shapes that an adapter would have with another rank."""
    return {
        key: torch.Size([rank, shape[1]] if rank_axis(key) == 0 else [shape[0], rank])
        for key, shape in shapes.items()
    }


def fit_client(config: Config, client_id: str, state: Tensors) -> Tensors:
    """Return what a client of a lower rank gets of the global adapter: its first ranks."""
    ours, own = config.adapters.global_, config.adapters_of(client_id).global_
    if own.rank == ours.rank:
        return state
    parts = [take_ranks(state, 0, own.rank)]
    if ours.frozen_rank:
        parts.append(take_ranks(state, ours.rank, ours.joint.rank))
    return join_ranks(*parts)


def widen_from_client(config: Config, client_id: str, state: Tensors) -> Tensors:
    """Return a client's global adapter with the ranks of all, which add nothing beyond its own."""
    ours, own = config.adapters.global_, config.adapters_of(client_id).global_
    if own.rank == ours.rank:
        return state
    parts = [pad_ranks(take_ranks(state, 0, own.rank), ours.rank)]
    if ours.frozen_rank:
        parts.append(take_ranks(state, own.rank, own.joint.rank))
    return join_ranks(*parts)
