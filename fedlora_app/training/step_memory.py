"""How much memory a training step takes, predicted from shapes alone.

A step runs the examples of a micro-batch as one row of ``num_tokens`` tokens. What autograd
keeps per token and layer is counted tensor by tensor, for decoders of the Llama and Qwen kind:
two RMS norms that compute in fp32, rotary attention by SDPA, a gated feed-forward block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_app.config.rounds import BOTH, Phase
from fedlora_app.config.schema import GLOBAL, LOCAL, AdapterConfig, AdaptersConfig, TrainingConfig
from fedlora_app.foundation.errors import UserError

FP32_BYTES = 4
ADAM_BYTES = {"adamw": 8, "paged_adamw_8bit": 2}
"""Of the optimizer's two moments, per parameter that learns."""
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, a quantised scale per 64 weights, an fp32 one per 256 of those."""
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
USUAL_PADDING = 1.25
"""Attention's padded tokens for each real one, between 1 and 2 and mostly near 1."""
ADAPTERS = "adapters"
CUBLAS_BYTES = 2 * 8 * 4096 * 1024
"""What CUBLAS_WORKSPACE_CONFIG asks for, for the forward pass and for autograd's thread."""
CONTEXT_BYTES = 500_000_000
"""What CUDA takes for itself; outside of what torch counts."""
RESERVE = 0.05
"""Share of torch's peak that its allocator holds in pieces too small to use."""


class PlanError(UserError):
    """What was asked cannot be planned; the message says why."""


@dataclass(frozen=True)
class Item:
    """One part of the memory that a phase takes."""

    name: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True)
class PhaseMemory:
    """A phase's peak by item."""

    phase: str
    micro_batch_tokens: int
    checkpointing: bool
    items: tuple[Item, ...]
    """What torch counts."""
    outside: tuple[Item, ...]
    """What comes on top on a GPU."""
    host: tuple[Item, ...]
    """What lies in the machine's memory instead."""

    @property
    def resident_bytes(self) -> int:
        """What is there before a phase begins: the base model and the adapters."""
        last = [item.name for item in self.items].index(ADAPTERS)
        return sum(item.num_bytes for item in self.items[: last + 1])

    @property
    def torch_bytes(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` will say."""
        return sum(item.num_bytes for item in self.items)

    @property
    def total_bytes(self) -> int:
        """What the card must have free."""
        return self.torch_bytes + sum(item.num_bytes for item in self.outside)


@dataclass(frozen=True)
class BaseSizes:
    """Numbers of parameters of the base model and, per unit of rank, of its adapters."""

    linear: int
    """Of the linear layers without the head: what 4-bit quantisation covers."""
    embedding: int
    head: int
    """0 where the head's weights are the embedding's."""
    other: int
    """Norms and biases."""
    largest_linear: int
    adapter_units: dict[str, int] = field(default_factory=dict)

    @property
    def is_tied(self) -> bool:
        """Return whether the head's weights are the embedding's."""
        return self.head == 0

    @property
    def total(self) -> int:
        """Return the base model's parameters."""
        return self.linear + self.embedding + self.head + self.other


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
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
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


def predict_phase(
    shape: Shape,
    sizes: BaseSizes,
    adapters: AdaptersConfig,
    training: TrainingConfig,
    numerics: Numerics,
    phase: Phase,
    batch: MicroBatch,
    checkpointing: bool,
) -> PhaseMemory:
    """Return a phase's peak by item.

    Two moments of a step compete for the peak, and what the larger one adds is an item: the
    backward pass of a layer, and the loss.
    """
    num_parameters = adapter_sizes(sizes, adapters)
    learning = sum(num_parameters[name] for name in phase.trainable)
    width = numerics.dtype_bytes
    kept, layer, loss = _step_bytes(
        shape, adapters, training, numerics, phase, batch, checkpointing, sizes.largest_linear
    )
    moment = "backward pass of a layer" if layer >= loss else "loss"
    embedding = Item("input embedding", sizes.embedding * width)
    body = Item("base, linear layers", sizes.linear * width)
    if numerics.is_4bit:
        body = Item("base, linear layers", round(sizes.linear * NF4_BYTES), "NF4")
    both = Item(ADAPTERS, FP32_BYTES * sum(num_parameters.values()), "both, fp32")
    items = [
        body,
        *([] if numerics.embedding_on_cpu else [embedding]),
        *([] if sizes.is_tied else [Item("output head", sizes.head * width)]),
        Item("norms and biases", sizes.other * width),
        both,
        Item("gradients", FP32_BYTES * learning, "+".join(phase.trainable)),
        Item("optimizer state", ADAM_BYTES[training.optimizer] * learning, training.optimizer),
        Item("activations", kept, "layers' inputs" if checkpointing else "all layers"),
        Item("largest moment", max(layer, loss), moment),
    ]
    peak = sum(item.num_bytes for item in items)
    host = [Item("copy of the adapters", both.num_bytes)]
    return PhaseMemory(
        phase=phase.name,
        micro_batch_tokens=batch.num_tokens,
        checkpointing=checkpointing,
        items=tuple(items),
        outside=(
            Item("CUDA context", CONTEXT_BYTES, "assumed"),
            Item("cuBLAS workspaces", CUBLAS_BYTES, "assumed"),
            Item("allocator's reserve", round(RESERVE * peak), f"assumed, {RESERVE:.0%}"),
        ),
        host=(*host, *([embedding] if numerics.embedding_on_cpu else [])),
    )


def adapter_sizes(sizes: BaseSizes, adapters: AdaptersConfig) -> dict[str, int]:
    """Return each adapter's number of parameters."""
    return {name: _adapter(adapters, name).rank * n for name, n in sizes.adapter_units.items()}


def predict_step_bytes(
    model_config: Any,
    adapters: AdaptersConfig,
    training: TrainingConfig,
    numerics: Numerics,
    phase: Phase,
    batch: MicroBatch,
    num_learning: int,
) -> int:
    """Return what a step without checkpointing needs beside the base and its adapters.

    Args:
        num_learning: parameters that learn in the phase.

    Raises:
        PlanError: the configuration is not a decoder's.
    """
    shape = read_shape(model_config)
    largest = max(inputs * outputs for inputs, outputs in shape.modules.values())
    kept, layer, loss = _step_bytes(
        shape, adapters, training, numerics, phase, batch, False, largest
    )
    learnt = (FP32_BYTES + ADAM_BYTES[training.optimizer]) * num_learning
    return learnt + kept + max(layer, loss)


def _step_bytes(
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
        [_adapter(adapters, name) for name in phase.active],
        batch.num_tokens,
        width,
        checkpointing,
        padding=batch.padding,
        fuses=training.fused_adapters is not False,
    )
    layer = step.layer_bytes
    if numerics.is_4bit:
        layer += largest_linear * width  # as it is while it is multiplied
    holds_together = training.local_kl_weight > 0 and phase == Phase(BOTH, (LOCAL,), "local")
    loss = _loss_bytes(shape, batch, width, DIVERGENCE_BYTES if holds_together else LOGIT_BYTES)
    return step.kept_bytes, layer, loss


def _adapter(adapters: AdaptersConfig, name: str) -> AdapterConfig:
    return adapters.global_ if name == GLOBAL else adapters.local


@dataclass(frozen=True)
class _Step:
    """One forward and backward pass of a micro-batch through the layers."""

    shape: Shape
    in_use: Sequence[AdapterConfig]
    num_tokens: int
    dtype_bytes: int
    checkpointing: bool
    padding: float = USUAL_PADDING
    fuses: bool = True

    @property
    def kept_bytes(self) -> int:
        """What the layers keep for the backward pass."""
        shape = self.shape
        if self.checkpointing:
            return shape.num_layers * shape.hidden * self.dtype_bytes * self.num_tokens
        first_norm = FP32_BYTES * shape.hidden * self.num_tokens  # nothing below it learns
        return shape.num_layers * self._saved_bytes - first_norm

    @property
    def layer_bytes(self) -> int:
        """What the backward pass of one layer adds, at the end of its feed-forward block."""
        shape = self.shape
        width = 2 * shape.intermediate + shape.hidden
        gradients = width * self.dtype_bytes * self.num_tokens
        if not self.checkpointing:
            return gradients
        saved = self._saved_bytes
        if self.dtype_bytes == FP32_BYTES:  # the first norm's input is the layer's, kept anyway
            saved -= FP32_BYTES * shape.hidden * self.num_tokens
        return saved + gradients

    @property
    def _saved_bytes(self) -> int:
        """What autograd keeps of one layer."""
        shape, modules = self.shape, self.shape.modules
        attention = 2 * shape.query + 2 * shape.key  # queries, keys, values, and what comes out
        feed_forward = 3 * shape.intermediate  # gate, its activation, up
        kept = (round(self.padding * attention) + feed_forward) * self.dtype_bytes
        kept += 2 * shape.hidden * FP32_BYTES  # the norms' inputs
        kept += shape.num_heads * FP32_BYTES  # attention's logarithms of sums
        has_dropout = any(adapter.dropout > 0 for adapter in self.in_use)
        if self.fuses and not has_dropout:
            return (kept + self._fused_bytes) * self.num_tokens + self._copied_bytes
        # PEFT's own adapters: each takes its input in fp32, and keeps what dropout leaves of it.
        for adapter in self.in_use:
            for module, (inputs, _) in modules.items():
                if _is_adapted(adapter, module, modules):
                    kept += FP32_BYTES * (inputs + adapter.rank) + inputs * (adapter.dropout > 0)
        return kept * self.num_tokens

    @property
    def _fused_bytes(self) -> int:
        """What the adapters keep of one token: their inputs, and what is between A and B."""
        modules, adapted = self.shape.modules, self._adapted
        kept = 0
        for names in INPUT_GROUPS:
            kept += modules[names[0]][0] * any(adapted[name] for name in names)
        ranks = sum(adapter.rank for those in adapted.values() for adapter in those)
        return (kept + ranks) * self.dtype_bytes

    @property
    def _copied_bytes(self) -> int:
        """The adapters themselves, in the dtype of the computation."""
        modules = self.shape.modules
        return self.dtype_bytes * sum(
            adapter.rank * sum(modules[module])
            for module, those in self._adapted.items()
            for adapter in those
        )

    @property
    def _adapted(self) -> dict[str, list[AdapterConfig]]:
        """The adapters of each module."""
        modules = self.shape.modules
        return {
            module: [a for a in self.in_use if _is_adapted(a, module, modules)]
            for module in modules
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
