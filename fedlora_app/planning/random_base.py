"""A base model with random weights, from its configuration alone, one matrix after the other.

Never is more than one matrix in the computation's dtype there beside what is finished, so that a
model in 4 bits is made within the memory that it needs in the end.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

SPREAD = 0.02  # of the weights, as most decoders are initialised


def build_random_base(
    model_config: PretrainedConfig, device: torch.device, dtype: torch.dtype, is_4bit: bool
) -> PreTrainedModel:
    """Return a model on ``device``, the same one every time; its linear layers in NF4 or not."""
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if is_4bit and isinstance(module, torch.nn.Linear) and module is not head:
            model.set_submodule(name, _random_nf4(module, device, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, last = name.rpartition(".")
            values = _draw(parameter.shape, device, dtype, last)
            made = torch.nn.Parameter(values, requires_grad=False)
            setattr(model.get_submodule(owner), last, made)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    if is_4bit:
        model.is_loaded_in_4bit = model.is_quantized = True  # which PEFT looks at
    return model.eval()


def quantisation_settings(dtype: torch.dtype) -> Any:
    """Return how the linear layers are quantised."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _draw(shape: torch.Size, device: torch.device, dtype: torch.dtype, name: str) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype, device=device)
    if len(shape) > 1:
        return values.normal_(0, SPREAD)
    return values.fill_(0.0 if name == "bias" else 1.0)  # a norm's weights are 1


def _random_nf4(
    module: torch.nn.Linear, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    has_bias = module.bias is not None
    made = Linear4bit(
        module.in_features,
        module.out_features,
        bias=has_bias,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = _draw(torch.Size((module.out_features, module.in_features)), device, dtype, "weight")
    made.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    ).to(device)  # which quantises
    if has_bias:
        bias = torch.zeros(module.out_features, dtype=dtype, device=device)
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made
