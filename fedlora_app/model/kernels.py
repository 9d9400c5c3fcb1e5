"""Faster kernels that a user may switch on: Liger, FlashAttention, torch.compile.

None of them is needed. Where one is missing, that is said before anything is trained.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import MethodType

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fedlora_app.config.schema import TrainingConfig
from fedlora_app.model.base import ModelError, decoder_layers

COMPILERS = ("c++", "g++", "clang++")
COMPILED = "_fedlora_compiled"
"""Where a layer keeps its compiled forward."""

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
    if training.compile and not any(map(shutil.which, COMPILERS)):
        faults.append(
            f"training.compile: true needs a C++ compiler, and none of {', '.join(COMPILERS)} was "
            "found."
        )
    return faults


def apply_liger_kernels(base: PreTrainedModel) -> None:
    """Replace norms, rotary embedding and feed-forward activations of a model by Liger's, once.

    Hsu et al. 2024, https://arxiv.org/abs/2410.10989. The loss stays the project's own. They stay
    for as long as the process, evaluation included.

    Raises:
        ModelError: Liger has none for this kind of model.
    """
    if base in _patched:
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            f"liger-kernel has nothing for models of type {base.config.model_type}. Set "
            "training.liger_kernels to false."
        )
    _apply_liger_kernel_to_instance(base, cross_entropy=False, fused_linear_cross_entropy=False)
    _patched.add(base)


@contextmanager
def compiled_layers(base: PreTrainedModel) -> Iterator[None]:
    """Run each decoder layer through torch.compile while the block runs.

    What has been compiled is kept as long as the model, for the phases that follow.
    """
    layers = decoder_layers(base)
    for layer in layers:
        if COMPILED not in layer.__dict__:
            layer.__dict__[COMPILED] = _compile_forward(layer)
        layer.__dict__["forward"] = layer.__dict__[COMPILED]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _compile_forward(layer: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """Return a layer's forward, compiled inside of its checkpoint where it has one."""
    plain = type(layer).forward
    if plain.__code__.co_name == "forward_with_checkpointing":  # of transformers
        plain = plain.__wrapped__
    compiled = torch.compile(MethodType(plain, layer), dynamic=True)

    def forward(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            return checkpoint(partial(compiled, **kwargs), *args, use_reentrant=False)
        return compiled(*args, **kwargs)

    return forward
