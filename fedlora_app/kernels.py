"""Faster kernels that a user may switch on: Liger, FlashAttention, torch.compile.

None of them is needed. Where one is missing, that is said before anything is trained.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from fedlora_app.config import TrainingConfig

COMPILERS = ("c++", "g++", "clang++")

_compiled: weakref.WeakKeyDictionary[torch.nn.Module, Callable] = weakref.WeakKeyDictionary()
_patched: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def find_missing_kernels(training: TrainingConfig) -> list[str]:
    """Return what the settings ask for and this machine lacks, a sentence each."""
    has_gpu, faults = torch.cuda.is_available(), []
    for setting, is_wanted, package, module in (
        ("attention: flash_attention_2", training.attention != "sdpa", "flash-attn", "flash_attn"),
        ("liger_kernels: true", training.liger_kernels, "liger-kernel", "liger_kernel"),
    ):
        if is_wanted and not has_gpu:
            faults.append(f"training.{setting} needs a GPU and this client has none.")
        elif is_wanted and find_spec(module) is None:
            faults.append(f"training.{setting} needs a package. Run: pip install {package}")
    if training.compile and not has_gpu and not any(map(shutil.which, COMPILERS)):
        faults.append(
            "training.compile: true needs a C++ compiler on a CPU, and none of "
            f"{', '.join(COMPILERS)} was found."
        )
    return faults


def apply_liger_kernels(base: PreTrainedModel) -> None:
    """Replace norms, rotary embedding and feed-forward activations of a model by Liger's, once.

    Hsu et al. 2024, https://arxiv.org/abs/2410.10989. The loss stays the project's own.
    """
    if base in _patched:
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(base, cross_entropy=False, fused_linear_cross_entropy=False)
    _patched.add(base)


@contextmanager
def compiled_layers(base: PreTrainedModel) -> Iterator[None]:
    """Run each decoder layer through torch.compile while the block runs.

    What has been compiled is kept as long as the model, for the phases that follow.
    """
    layers = list(base.base_model.layers)
    for layer in layers:
        if layer not in _compiled:
            _compiled[layer] = torch.compile(layer._call_impl, dynamic=True)
        layer._compiled_call_impl = _compiled[layer]
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
