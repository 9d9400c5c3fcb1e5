"""A random Qwen2 in NF4, made on the device as ``fedlora plan --measure --random`` does.

Then it is saved and read again, which shows what loading takes.
"""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from fedlora_app.planning.random_base import build_random_base, quantisation_settings

DTYPE = torch.bfloat16


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
    model = build_random_base(config, device, DTYPE, is_4bit=True)
    settings = quantisation_settings(DTYPE)
    # What from_pretrained would have left, for save_pretrained.
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    return model


def _seconds_since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - started, 2)
