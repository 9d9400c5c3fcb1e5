"""What one training step keeps and computes, in bytes, counted from shapes alone.

A step runs the examples of a micro-batch as one row of ``num_tokens`` tokens. What autograd
keeps per token and layer is counted tensor by tensor, for decoders of the Llama and Qwen kind:
two RMS norms that compute in fp32, rotary attention by SDPA, a gated feed-forward block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import GLOBAL, AdapterConfig, AdaptersConfig, TrainingConfig
from fedlora_app.foundation.errors import UserError

FP32_BYTES = 4
CHUNK_ROWS = 256
"""Answer positions whose logits are held at a time."""
LOGIT_BYTES = 6
"""Of each: fp32, and bf16 on the way from and to the head."""
DIVERGENCE_BYTES = 20
"""Of each where the adapters' answers are held together: two fp32 distributions and gradients."""
INPUT_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Modules with one input, of which an adapter's A keeps one copy for all."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What transformers' mixtures of experts call the number of experts of a layer."""
USUAL_PADDING = 1.25
"""Attention's padded tokens for each real one, between 1 and 2 and mostly near 1."""


class PlanError(UserError):
    """What was asked cannot be planned; the message says why."""


@dataclass(frozen=True)
class Numerics:
    """How the base model lies in memory."""

    is_4bit: bool
    dtype_bytes: int
    embedding_on_cpu: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """The largest packed micro-batch: its tokens, and those that the loss is taken on."""

    num_tokens: int
    num_answer_tokens: int
    padding: float = 1.0
    """Tokens in attention, which pads, for each real one."""
    phase_tokens: int = 0
    """Of all examples that the phase meets more than once."""


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
        PlanError: it is not a decoder's, or misses a size.
    """
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    text = text or model_config
    if getattr(text, "is_encoder_decoder", False):
        raise PlanError(
            f"A model of type {kind} is not a decoder-only model, so it cannot be planned."
        )
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(getattr(text, name, None) for name in EXPERT_COUNTS):
        raise PlanError(f"A model of type {kind} is a mixture of experts, which is not planned.")
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


def count_step_bytes(
    shape: Shape,
    adapters: AdaptersConfig,
    training: TrainingConfig,
    numerics: Numerics,
    phase: Phase,
    batch: MicroBatch,
    checkpointing: bool,
    largest_linear: int,
) -> tuple[int, int, int]:
    """Return what the layers keep, and what the backward pass of one and the loss add."""
    width = numerics.dtype_bytes
    step = _Step(
        shape,
        [adapter_config(adapters, name) for name in phase.active],
        batch.num_tokens,
        width,
        checkpointing,
        first_trained_layer(adapters, phase),
        padding=batch.padding,
        fuses=training.fused_adapters is not False,
    )
    layer = step.layer_bytes
    if numerics.is_4bit:
        layer += largest_linear * width  # as it is while it is multiplied
    holds_together = training.local_kl_weight > 0 and phase.data == "local"
    loss = _loss_bytes(shape, batch, width, DIVERGENCE_BYTES if holds_together else LOGIT_BYTES)
    return step.kept_bytes, layer, loss


def adapter_config(adapters: AdaptersConfig, name: str) -> AdapterConfig:
    """Return the settings of the global or the local adapter."""
    return adapters.global_ if name == GLOBAL else adapters.local


def first_trained_layer(adapters: AdaptersConfig, phase: Phase) -> int:
    """Return the lowest decoder layer that has an adapter which learns in the phase."""
    return min(adapter_config(adapters, name).first_layer for name in phase.trainable)


def keeps_states(adapters: AdaptersConfig, phase: Phase) -> bool:
    """Return whether a phase that passes over its examples more than once keeps their states.

    These are what enters the first layer that learns; dropout below would draw them anew each time.
    """
    first = first_trained_layer(adapters, phase)
    below = [a for n in phase.active if (a := adapter_config(adapters, n)).first_layer < first]
    return first > 0 and not any(adapter.dropout for adapter in below)


@dataclass(frozen=True)
class _Step:
    """One forward and backward pass of a micro-batch through the layers."""

    shape: Shape
    in_use: Sequence[AdapterConfig]
    num_tokens: int
    dtype_bytes: int
    checkpointing: bool
    first_layer: int = 0
    """Autograd does not reach below it."""
    padding: float = USUAL_PADDING
    fuses: bool = True

    @property
    def kept_bytes(self) -> int:
        """What the layers keep for the backward pass."""
        shape = self.shape
        layers = range(self.first_layer, shape.num_layers)
        if self.checkpointing:
            return len(layers) * shape.hidden * self.dtype_bytes * self.num_tokens
        first_norm = FP32_BYTES * shape.hidden * self.num_tokens  # nothing below it learns
        return sum(self._saved_bytes(self._adapters_of(layer)) for layer in layers) - first_norm

    @property
    def layer_bytes(self) -> int:
        """What the backward pass of one layer adds, at the end of its feed-forward block."""
        shape = self.shape
        width = 2 * shape.intermediate + shape.hidden
        gradients = width * self.dtype_bytes * self.num_tokens
        if not self.checkpointing:
            return gradients
        saved = self._saved_bytes(self.in_use)
        if self.dtype_bytes == FP32_BYTES:  # the first norm's input is the layer's, kept anyway
            saved -= FP32_BYTES * shape.hidden * self.num_tokens
        return saved + gradients

    def _adapters_of(self, layer: int) -> list[AdapterConfig]:
        return [adapter for adapter in self.in_use if adapter.first_layer <= layer]

    def _saved_bytes(self, adapters: Sequence[AdapterConfig]) -> int:
        """What autograd keeps of one layer that has these adapters."""
        shape, modules = self.shape, self.shape.modules
        attention = 2 * shape.query + 2 * shape.key  # queries, keys, values, and what comes out
        feed_forward = 3 * shape.intermediate  # gate, its activation, up
        kept = (round(self.padding * attention) + feed_forward) * self.dtype_bytes
        kept += 2 * shape.hidden * FP32_BYTES  # the norms' inputs
        kept += shape.num_heads * FP32_BYTES  # attention's logarithms of sums
        has_dropout = any(adapter.dropout > 0 for adapter in self.in_use)
        if self.fuses and not has_dropout:
            kept += self._fused_bytes(adapters)
            return kept * self.num_tokens + self._copied_bytes(adapters)
        # PEFT's own adapters: each takes its input in fp32, and keeps what dropout leaves of it.
        for adapter in adapters:
            for module, (inputs, _) in modules.items():
                if _is_adapted(adapter, module, modules):
                    kept += FP32_BYTES * (inputs + adapter.rank) + inputs * (adapter.dropout > 0)
        return kept * self.num_tokens

    def _fused_bytes(self, adapters: Sequence[AdapterConfig]) -> int:
        """What the adapters keep of one token: their inputs, and what is between A and B."""
        modules, adapted = self.shape.modules, self._adapted(adapters)
        kept = 0
        for names in INPUT_GROUPS:
            kept += modules[names[0]][0] * any(adapted[name] for name in names)
        ranks = sum(adapter.rank for those in adapted.values() for adapter in those)
        return (kept + ranks) * self.dtype_bytes

    def _copied_bytes(self, adapters: Sequence[AdapterConfig]) -> int:
        """The adapters themselves, in the dtype of the computation."""
        modules = self.shape.modules
        return self.dtype_bytes * sum(
            adapter.rank * sum(modules[module])
            for module, those in self._adapted(adapters).items()
            for adapter in those
        )

    def _adapted(self, adapters: Sequence[AdapterConfig]) -> dict[str, list[AdapterConfig]]:
        """The adapters of each module."""
        modules = self.shape.modules
        return {
            module: [a for a in adapters if _is_adapted(a, module, modules)] for module in modules
        }


def _loss_bytes(shape: Shape, batch: MicroBatch, dtype_bytes: int, logit_bytes: int) -> int:
    """Return what the loss adds: the last norm, answers' states and gradients, their logits."""
    norm = (FP32_BYTES + dtype_bytes) * shape.hidden * batch.num_tokens
    answers = 2 * dtype_bytes * shape.hidden * batch.num_answer_tokens
    rows = min(CHUNK_ROWS, batch.num_answer_tokens)
    return norm + answers + logit_bytes * rows * shape.vocabulary


def _is_adapted(adapter: AdapterConfig, module: str, modules: Iterable[str]) -> bool:
    """Return whether a module has this adapter; names of another architecture count as all."""
    targets = adapter.target_modules
    if targets == "all-linear" or not set(targets) & set(modules):
        return True
    return module in targets
