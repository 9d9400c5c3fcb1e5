"""A random Qwen2 in NF4, made on the device one matrix at a time, saved and read again.

Never is more than one matrix in bf16 there beside what is finished, so that it is made within the
memory that it needs in the end.
"""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

DTYPE = torch.bfloat16
SPREAD = 0.02  # of the weights, as Qwen2 is initialised


@dataclass(frozen=True)
class Made:
    """A model that was made, saved and read again, and what that took."""

    model: Qwen2ForCausalLM
    build_seconds: float
    load_seconds: float
    file_bytes: int


def make_random_nf4(config: Qwen2Config, device: torch.device) -> Made:
    """Return the model as it was read from its files, frozen; the linear layers are in NF4.

    The files were just written, so they come from the system's cache and not from the disk.
    """
    started = time.perf_counter()
    model = _build(config, device)
    build_seconds = _seconds_since(started, device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPE, device_map={"": device}, local_files_only=True
        )
        load_seconds = _seconds_since(started, device)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if type(model.model.layers[0].mlp.up_proj) is not Linear4bit:
        raise RuntimeError("What was read again is not quantised.")
    for module in model.modules():
        if isinstance(module, Linear4bit):  # as in fedlora_app.model.base, where the reason stands
            module.support_avx512bf16_for_cpu = False
    return Made(model.requires_grad_(False).eval(), build_seconds, load_seconds, size)


def _build(config: Qwen2Config, device: torch.device) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(DTYPE)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            model.set_submodule(name, _random_linear(module, device))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=DTYPE, device=device)
            values.normal_(0, SPREAD) if values.dim() > 1 else values.fill_(1.0)
            owner, _, last = name.rpartition(".")
            made = torch.nn.Parameter(values, requires_grad=False)
            setattr(model.get_submodule(owner), last, made)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    # What from_pretrained would have left, for save_pretrained.
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def _seconds_since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - started, 2)


def _random_linear(module: torch.nn.Linear, device: torch.device) -> Linear4bit:
    has_bias = module.bias is not None
    made = Linear4bit(
        module.in_features,
        module.out_features,
        bias=has_bias,
        compute_dtype=DTYPE,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = torch.empty(module.out_features, module.in_features, dtype=DTYPE, device=device)
    made.weight = Params4bit(
        weight.normal_(0, SPREAD),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    ).to(device)  # which quantises
    if has_bias:
        bias = torch.zeros(module.out_features, dtype=DTYPE, device=device)
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made
