"""What several adapters add, computed as one adapter of their joint rank.

s_G B_G A_G x + s_L B_L A_L x = [s_G B_G, s_L B_L] [A_G; A_L] x: two matrix products in the input's
dtype in the place of PEFT's four in the adapters' own, with casts and sums between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType

import torch
from torch.nn import functional

from fedlora_app.model.adapters import (
    AdaptedLayer,
    AdaptedModel,
    AdapterError,
    lora_layers,
    with_frozen,
)

Forward = Callable[[AdaptedLayer, torch.Tensor], torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]
"""The joint A (r, in) and B (out, r)."""


def can_fuse_adapters(model: AdaptedModel, active: Iterable[str]) -> bool:
    """Return whether ``fused_adapters`` computes the same in training: without dropout it does."""
    layers = lora_layers(model)
    dropouts = [layer.lora_dropout[n] for layer in layers for n in active if n in layer.lora_A]
    return all(isinstance(dropout, torch.nn.Identity) for dropout in dropouts)


@contextmanager
def fused_adapters(model: AdaptedModel, active: Sequence[str]) -> Iterator[None]:
    """Train with these adapters fused in the block. Their own parameters are what learns.

    Raises:
        AdapterError: an adapter has dropout, which would be one for both.
    """
    if not can_fuse_adapters(model, active):
        raise AdapterError(
            "Adapters with dropout cannot be fused. Set their dropout to 0, or "
            "training.fused_adapters to false."
        )
    names = with_frozen(model, active)
    with _replaced_forwards(model, lambda layer: _training_forward(_names(layer, names))):
        yield


@contextmanager
def fused_answering(model: AdaptedModel) -> Iterator[None]:
    """Answer with the active adapters fused in the block, in which their weights stay as they are.

    Their scalings may change there, and the adapters may be switched off and on.
    """
    active = model.active_adapters
    with _replaced_forwards(model, lambda layer: _answering_forward(_names(layer, active))):
        yield


@contextmanager
def _replaced_forwards(
    model: AdaptedModel, choose: Callable[[AdaptedLayer], Forward]
) -> Iterator[None]:
    layers = lora_layers(model)
    for layer in layers:
        layer.forward = MethodType(choose(layer), layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _names(layer: AdaptedLayer, active: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in active if name in layer.lora_A)


@cache  # torch.compile recompiles for every new function object
def _training_forward(names: tuple[str, ...]) -> Forward:
    def forward(layer: AdaptedLayer, inputs: torch.Tensor) -> torch.Tensor:
        outputs = layer.base_layer(inputs)
        if not names:
            return outputs
        return _add(layer, names, inputs, outputs, _join(layer, names, inputs.dtype))

    return forward


def _answering_forward(names: tuple[str, ...]) -> Forward:
    kept: dict[torch.dtype, Factors] = {}

    def forward(layer: AdaptedLayer, inputs: torch.Tensor) -> torch.Tensor:
        outputs = layer.base_layer(inputs)
        if not names or layer.disable_adapters:
            return outputs
        if inputs.dtype not in kept:
            kept[inputs.dtype] = _join(layer, names, inputs.dtype)
        return _add(layer, names, inputs, outputs, kept[inputs.dtype])

    return forward


def _join(layer: AdaptedLayer, names: Sequence[str], dtype: torch.dtype) -> Factors:
    parts_a = [layer.lora_A[name].weight for name in names]
    parts_b = [layer.lora_B[name].weight for name in names]
    joint_a, joint_b = parts_a[0], parts_b[0]
    if len(names) > 1:
        joint_a, joint_b = torch.cat(parts_a), torch.cat(parts_b, dim=1)
    return joint_a.to(dtype), joint_b.to(dtype)


def _add(
    layer: AdaptedLayer,
    names: Sequence[str],
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    factors: Factors,
) -> torch.Tensor:
    """Return what the base gave plus B A x, each adapter's share times its scaling."""
    joint_a, joint_b = factors
    inner = functional.linear(inputs, joint_a)  # (..., r)
    scalings = [layer.scaling[name] for name in names]
    if len(set(scalings)) == 1:
        scale = scalings[0]
    else:
        shares = inner.split([layer.lora_A[name].out_features for name in names], dim=-1)
        scaled = [share * scaling for share, scaling in zip(shares, scalings, strict=True)]
        inner, scale = torch.cat(scaled, dim=-1), 1.0
    added = torch.addmm(outputs.flatten(0, -2), inner.flatten(0, -2), joint_b.T, alpha=scale)
    return added.view(outputs.shape)
