"""What several adapters add, computed as one adapter of their joint rank.

s_G B_G A_G x + s_L B_L A_L x = [s_G B_G, s_L B_L] [A_G; A_L] x: two matrix products in the input's
dtype in the place of PEFT's four in the adapters' own, with casts and sums between them. A mixer
weighs the rows of [A_G; A_L] x by the token, between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType

import torch
from torch.nn import functional

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import FROZEN, AdaptedLayer, AdaptedModel, lora_layers, with_frozen

Forward = Callable[[AdaptedLayer, torch.Tensor], torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]
"""The joint A (r, in) and B (out, r)."""
Mixer = Mapping[AdaptedLayer, torch.Tensor]
"""For layers that hold both adapters, M (2, in): softmax(M x) are the shares of ``MIXED``."""
MIXED = (GLOBAL, LOCAL)


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


def find_mixed_layers(model: AdaptedModel) -> dict[str, AdaptedLayer]:
    """Return the layers that hold both adapters, by their names."""
    both = set(lora_layers(model, *MIXED))
    return {name: module for name, module in model.named_modules() if module in both}


@contextmanager
def fused_answering(model: AdaptedModel, mixer: Mixer | None = None) -> Iterator[None]:
    """Answer with the active adapters fused in the block, in which their weights stay as they are.

    Their scalings may change there, and the adapters may be switched off and on. Gradients reach
    the mixer, and no dropout the adapters.

    Args:
        mixer: shares what both adapters add by the token where both are active.
    """
    active = model.active_adapters
    if mixer is None or {*active} - {FROZEN} != {*MIXED}:
        mixer = {}

    def choose(layer: AdaptedLayer) -> Forward:
        return _answering_forward(_names(layer, active), mixer.get(layer))

    with _replaced_forwards(model, choose):
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


def _answering_forward(names: tuple[str, ...], mixing: torch.Tensor | None) -> Forward:
    kept: dict[torch.dtype, Factors] = {}

    def forward(layer: AdaptedLayer, inputs: torch.Tensor) -> torch.Tensor:
        outputs = layer.base_layer(inputs)
        if not names or layer.disable_adapters:
            return outputs
        if inputs.dtype not in kept:
            kept[inputs.dtype] = _join(layer, names, inputs.dtype)
        return _add(layer, names, inputs, outputs, kept[inputs.dtype], mixing)

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
    mixing: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what the base gave plus B A x, each adapter's share times its scaling."""
    joint_a, joint_b = factors
    inner = functional.linear(inputs, joint_a)  # (..., r)
    scalings = [layer.scaling[name] for name in names]
    if mixing is not None:
        by_token = mix(inputs, mixing)  # (..., 2)
        columns = [MIXED.index(GLOBAL if name == FROZEN else name) for name in names]
        shares = [by_token[..., [column]] for column in columns]
        scalings = [scaling * share for scaling, share in zip(scalings, shares, strict=True)]
    if mixing is None and len(set(scalings)) == 1:
        scale = scalings[0]
    else:
        shares = inner.split([layer.lora_A[name].out_features for name in names], dim=-1)
        scaled = [share * scaling for share, scaling in zip(shares, scalings, strict=True)]
        inner, scale = torch.cat(scaled, dim=-1), 1.0
    added = torch.addmm(outputs.flatten(0, -2), inner.flatten(0, -2), joint_b.T, alpha=scale)
    return added.view(outputs.shape)


def mix(inputs: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """Return the shares of both adapters in what is added to each token, (..., 2), in its dtype.

    Args:
        inputs: (..., in), mixing: (2, in).
    """
    logits = functional.linear(inputs, mixing.to(inputs.dtype))
    return logits.float().softmax(-1).to(inputs.dtype)
