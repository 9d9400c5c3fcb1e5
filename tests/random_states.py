"""Adapters of random numbers, for tests of what is sent and of what is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def draw_state(
    seed: int, shapes: Mapping[str, torch.Size], scale: float = 1e-2
) -> dict[str, torch.Tensor]:
    """Return normally distributed fp32 tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


SHAPES = {"x.lora_A.weight": torch.Size([2, 3]), "x.lora_B.weight": torch.Size([3, 2])}
STATE = draw_state(0, SHAPES, scale=1.0)
