"""Which modules of a base model have adapters: linear layers that add nothing of their own.

The experts of a mixture are three-dimensional parameters, and routers hand on more than one tensor;
neither has an adapter.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora_app.config.schema import GLOBAL, LOCAL, AdapterConfig, AdaptersConfig
from fedlora_app.model.base import decoder_layers, find_decoder

ALL = "all-linear"


def find_linear(base: PreTrainedModel) -> list[str]:
    """Return the full names of the modules that can have an adapter, in the model's order."""
    seen = {*find_decoder(base).modules(), base.get_output_embeddings()}  # and not a vision tower
    modules = {name: module for name, module in base.named_modules() if module in seen}
    mixers = [name for name, module in modules.items() if hasattr(module, "ssm_state_size")]
    # Mamba's kernels take the weights of this layer, and would pass its adapters by.
    passed_by = {f"{name}.out_proj" for name in mixers}
    return [n for n, module in modules.items() if n not in passed_by and _is_plain(module)]


def choose_modules(
    base: PreTrainedModel, config: AdapterConfig, taken: Collection[str]
) -> list[str]:
    """Return the full names of the modules that get an adapter.

    Args:
        taken: full names of modules that cannot have one.
    """
    names = [name for name in find_linear(base) if name not in taken]
    if config.target_modules == ALL:
        head = base.get_output_embeddings()
        names = [name for name in names if base.get_submodule(name) is not head]
    else:
        names = [name for name in names if _last(name) in config.target_modules]
    if config.first_layer > 0:
        layers = decoder_layers(base)[config.first_layer :]
        above = {module for layer in layers for module in layer.modules()}
        names = [name for name in names if base.get_submodule(name) in above]
    return names


def find_target_faults(
    base: PreTrainedModel, config: AdaptersConfig, taken: Collection[str]
) -> list[str]:
    """Return what is wrong with the adapters' modules and layers, a sentence each."""
    can = {_last(name) for name in find_linear(base) if name not in taken}
    num_layers = len(decoder_layers(base))
    faults = []
    for section, adapter in ((GLOBAL, config.global_), (LOCAL, config.local)):
        targets = adapter.target_modules
        unknown = [] if targets == ALL else sorted(set(targets) - can)
        if unknown or not targets:
            faults.append(
                f"adapters.{section}.target_modules: {unknown or 'an empty list'} names no linear "
                "module of the base model that can have an adapter. It has: "
                f"{', '.join(sorted(can))}."
            )
        if 0 < adapter.first_layer >= num_layers:
            faults.append(
                f"adapters.{section}.first_layer: {adapter.first_layer} leaves no layer for the "
                f"adapter. The base model has {num_layers} decoder layers, counted from 0, so that "
                f"{max(0, num_layers - 1)} is the most."
            )
    return faults


def describe_experts(base: PreTrainedModel, adapted: Collection[str]) -> str | None:
    """Return which parts have adapters in a base model that has experts, None if it has none.

    Args:
        adapted: full names of the modules that have one.
    """
    experts = {
        name
        for layer in decoder_layers(base)
        for name, part in layer.named_modules()
        for parameter in part.parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape[1:]) > 1  # a convolution is no expert
    }
    if not experts:
        return None
    bare = {
        _last(name)
        for name in find_linear(base)
        if base.get_submodule(name) is not base.get_output_embeddings()
        and not any(name == other or name.startswith(f"{other}.") for other in adapted)
    }
    has = ", ".join(sorted(set(map(_last, adapted))))
    others = f", nor have {', '.join(sorted(bare))} outside of them" if bare else ""
    return (
        f"The base model has experts ({', '.join(sorted(experts))}). Adapters are on {has}; the "
        f"experts and what chooses among them have none{others}."
    )


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer and nothing else, quantised or not."""
    kind = type(module)
    if kind in (torch.nn.Linear, Conv1D) or kind.__module__.startswith("bitsandbytes."):
        return isinstance(module, (torch.nn.Linear, Conv1D))
    if not isinstance(module, torch.nn.Linear):
        return False
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            output = module(row)
    except Exception:  # whatever a router makes of one row
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
