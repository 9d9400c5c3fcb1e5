"""How many parameters a base model and its adapters have, read off an empty model."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import PreTrainedModel

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig
from fedlora_app.config.sharing import FACTORS, of_factors
from fedlora_app.model.adapters import attach_adapters, state_shapes
from fedlora_app.training.phase_memory import BaseSizes


def measure_sizes(empty: PreTrainedModel, adapters: AdaptersConfig) -> BaseSizes:
    """Count a model on the meta device; its adapters are attached to it.

    Raises:
        AdapterError: a target module is not there.
    """
    embedding, head = empty.get_input_embeddings(), empty.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    linear = [
        module.weight.numel()
        for module in empty.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    sizes = {
        "linear": sum(linear),
        "embedding": embedding.weight.numel(),
        "head": 0 if is_tied else head.weight.numel(),
    }
    total = sum(parameter.numel() for parameter in empty.parameters())
    model = attach_adapters(empty, adapters)
    ranks = {GLOBAL: adapters.global_.joint.rank, LOCAL: adapters.local.rank}
    units = {
        name: {key: s.numel() // rank for key, s in state_shapes(model, name).items()}
        for name, rank in ranks.items()
    }
    by_factor = {factor: of_factors(units[GLOBAL], [factor]).values() for factor in FACTORS}
    return BaseSizes(
        **sizes,
        other=total - sum(sizes.values()),
        largest_linear=max(linear),
        adapter_units={name: sum(found.values()) for name, found in units.items()},
        global_tensors={f: dict(sorted(Counter(found).items())) for f, found in by_factor.items()},
    )
