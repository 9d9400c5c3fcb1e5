"""How much memory a training step takes, predicted from shapes alone.

A step runs the examples of a micro-batch as one row of ``num_tokens`` tokens. What autograd
keeps per token and layer is counted tensor by tensor, for decoders of the Llama and Qwen kind:
two RMS norms that compute in fp32, rotary attention by SDPA, a gated feed-forward block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_app.config import GLOBAL, AdapterConfig, AdaptersConfig
from fedlora_app.errors import MendableError

FP32_BYTES = 4
CHUNK_ROWS = 256
"""Answer positions whose logits are held at a time."""
LOGIT_COPIES = 3
"""Logits, their fp32 logarithms and their gradient."""


class PlanError(MendableError):
    """What was asked cannot be planned; the message says why."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its memory depends on."""

    hidden: int
    intermediate: int
    num_layers: int
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together, and of all value heads."""
    num_heads: int
    vocabulary: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


def read_shape(model_config: Any) -> Shape:
    """Return the sizes that a transformers configuration names.

    Raises:
        PlanError: it is no decoder's, or misses a size.
    """
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    text = text or model_config
    if getattr(text, "is_encoder_decoder", False):
        raise PlanError(f"A model of type {kind} is no decoder alone, so it cannot be planned.")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not isinstance(getattr(text, name, None), int)]
    if missing:
        raise PlanError(
            f"The configuration of the model (type {kind}) does not say {', '.join(missing)}. "
            "Expected a decoder of the Llama or Qwen kind."
        )
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_layers=text.num_hidden_layers,
        query=heads * head_size,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        num_heads=heads,
        vocabulary=text.vocab_size,
    )


def predict_activation_bytes(
    model_config: Any,
    adapters: AdaptersConfig,
    active: Sequence[str],
    num_tokens: int,
    dtype_bytes: int,
    checkpointing: bool,
) -> int:
    """Return what the decoder's layers hold at the peak of a forward and backward pass.

    Without the head, whose logits do not depend on the layers, and without weights of the base.

    Args:
        model_config: the transformers configuration of the base model.
        num_tokens: of the micro-batch, all its examples together.
        dtype_bytes: of the dtype that the layers compute in.
        checkpointing: only each layer's input is kept, and one layer at a time is recomputed.

    Raises:
        PlanError: the configuration is no decoder's.
    """
    shape = read_shape(model_config)
    in_use = [_adapter(adapters, name) for name in active]
    saved = _saved_token_bytes(shape, in_use, dtype_bytes) * num_tokens
    saved += _adapter_copies(shape, in_use, dtype_bytes)
    ends = (FP32_BYTES + 2 * dtype_bytes) * shape.hidden * num_tokens
    gradients = (2 * shape.intermediate + 2 * shape.hidden) * dtype_bytes * num_tokens
    if checkpointing:
        inputs = shape.num_layers * shape.hidden * dtype_bytes * num_tokens
        return inputs + saved + gradients + ends
    return shape.num_layers * saved + gradients + ends


def predict_loss_bytes(model_config: Any) -> int:
    """Return what the logits of one chunk of answer positions need at the peak."""
    return LOGIT_COPIES * CHUNK_ROWS * read_shape(model_config).vocabulary * FP32_BYTES


def _adapter(adapters: AdaptersConfig, name: str) -> AdapterConfig:
    return adapters.global_ if name == GLOBAL else adapters.local


def _is_adapted(adapter: AdapterConfig, module: str, modules: Sequence[str]) -> bool:
    """Tell whether a module has this adapter; names of another architecture count as all."""
    targets = adapter.target_modules
    if targets == "all-linear" or not set(targets) & set(modules):
        return True
    return module in targets


def _saved_token_bytes(shape: Shape, in_use: Sequence[AdapterConfig], dtype_bytes: int) -> int:
    """Return what autograd keeps of one token in one layer."""
    modules = shape.modules
    ranks = {
        module: [a for a in in_use if _is_adapted(a, module, list(modules))] for module in modules
    }
    attention = 2 * shape.query + 2 * shape.key  # queries, keys, values and what comes out
    feed_forward = 3 * shape.intermediate  # gate, its activation, up
    # An adapter's A needs its input, which is the same for modules side by side.
    inputs = {
        shape.hidden: ("q_proj", "k_proj", "v_proj"),
        shape.intermediate: ("down_proj",),
    }
    kept = attention + feed_forward
    kept += sum(width for width, names in inputs.items() if any(ranks[name] for name in names))
    kept += shape.hidden if ranks["gate_proj"] or ranks["up_proj"] else 0
    kept += sum(adapter.rank for adapted in ranks.values() for adapter in adapted)
    dropped = sum(
        modules[module][0] * (dtype_bytes + 1)  # the input after dropout, and its mask
        for module, adapted in ranks.items()
        for adapter in adapted
        if adapter.dropout > 0
    )
    norms = 2 * shape.hidden * FP32_BYTES
    return kept * dtype_bytes + dropped + norms + shape.num_heads * FP32_BYTES


def _adapter_copies(shape: Shape, in_use: Sequence[AdapterConfig], dtype_bytes: int) -> int:
    """Return the copies of one layer's adapters in the dtype of the computation."""
    modules = shape.modules
    return dtype_bytes * sum(
        adapter.rank * (inputs + outputs)
        for adapter in in_use
        for module, (inputs, outputs) in modules.items()
        if _is_adapted(adapter, module, list(modules))
    )
