"""AdamW over adapters: torch's fused one, or bitsandbytes' paged one with 8 bits a state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedlora_app.config.schema import TrainingConfig
from fedlora_app.model.adapters import AdaptedModel, adapter_parameters

# The optimizer starts afresh in every phase, because the server has moved what it tracks;
# the usual 0.999 would still be warming up when a short phase ends.
ADAM_BETAS = (0.9, 0.99)

_unused_pages: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
"""Managed memory by shape and dtype, which bitsandbytes takes from CUDA and never gives back."""


@contextmanager
def fresh_optimizer(
    model: AdaptedModel, training: TrainingConfig, weight_decays: dict[str, float]
) -> Iterator[torch.optim.Optimizer]:
    """Yield AdamW over these adapters, one parameter group each, for one phase.

    AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; with 8 bits a state,
    quantised block by block: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
    """
    groups = [
        {
            "params": [p for p in adapter_parameters(model, name) if p.requires_grad],
            "weight_decay": weight_decay,
        }
        for name, weight_decay in weight_decays.items()
    ]
    settings = {"lr": training.learning_rate, "betas": ADAM_BETAS}
    if training.optimizer == "adamw":
        yield torch.optim.AdamW(groups, fused=True, **settings)
        return
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer = PagedAdamW8bit(groups, **settings)
    optimizer.get_state_buffer = _reusing_pages(optimizer)
    try:
        yield optimizer
    finally:
        del optimizer.get_state_buffer  # which holds the optimizer
        for state in optimizer.state.values():
            for page in state.values():
                if getattr(page, "is_paged", False):
                    _unused_pages[page.shape, page.dtype].append(page)


def _reusing_pages(optimizer: Any) -> Any:
    """Return what makes the optimizer's state, of pages that earlier phases left if there are."""
    from bitsandbytes.functional import fill

    make_buffer = optimizer.get_state_buffer

    def get_state_buffer(p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        unused = _unused_pages[p.shape, dtype]
        if not unused:
            return make_buffer(p, dtype=dtype)
        page = unused.pop()
        fill(page, 0)
        return page

    return get_state_buffer
