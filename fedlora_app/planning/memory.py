"""How much memory a training step takes, predicted from shapes alone.

A step runs the examples of a micro-batch as one row of ``num_tokens`` tokens. What autograd
keeps per token and layer is counted tensor by tensor, for decoders of the Llama and Qwen kind:
two RMS norms that compute in fp32, rotary attention by SDPA, a gated feed-forward block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_app.config import GLOBAL, AdapterConfig, AdaptersConfig, TrainingConfig
from fedlora_app.errors import MendableError
from fedlora_app.rounds import Phase

FP32_BYTES = 4
ADAM_BYTES = {"adamw": 8, "paged_adamw_8bit": 2}
"""Of the optimizer's two moments, per parameter that learns."""
STEP_BYTES = {"adamw": 4, "paged_adamw_8bit": 0}
"""What the optimizer's step adds for its duration, per parameter that learns."""
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, a quantised scale per 64 weights, an fp32 one per 256 of those."""
DEQUANTISED_COPIES = 2
"""Of the largest linear weight, in the dtype of the computation, while it is multiplied."""
CHUNK_ROWS = 256
"""Answer positions whose logits are held at a time."""
LOGIT_COPIES = 3
"""Logits, their fp32 logarithms and their gradient."""
CONTEXT_BYTES = 500_000_000
"""What CUDA takes for itself; outside of what torch counts."""
RESERVE = 0.05
"""Share of torch's peak that its allocator holds in pieces too small to use."""


class PlanError(MendableError):
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
        """Tell whether the head's weights are the embedding's."""
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

    Without the head, whose logits do not depend on the layers, and without the base's weights.

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
    kept = _kept_bytes(shape, in_use, num_tokens, dtype_bytes, checkpointing)
    return kept + _layer_bytes(shape, in_use, num_tokens, dtype_bytes, checkpointing)


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

    Three moments of a step compete for the peak, and what the largest one adds is an item: the
    backward pass of a layer, the loss, and the optimizer's step.
    """
    in_use = [_adapter(adapters, name) for name in phase.active]
    num_parameters = adapter_sizes(sizes, adapters)
    learning = sum(num_parameters[name] for name in phase.trainable)
    tokens, width = batch.num_tokens, numerics.dtype_bytes
    kept = _kept_bytes(shape, in_use, tokens, width, checkpointing)
    layer = _layer_bytes(shape, in_use, tokens, width, checkpointing)
    if numerics.is_4bit:
        layer += DEQUANTISED_COPIES * sizes.largest_linear * width
    divergence = 2 if training.local_kl_weight > 0 and len(phase.active) > 1 else 1
    moments = {
        "backward pass of a layer": kept + layer,
        "loss": kept + divergence * _loss_bytes(shape, batch, width),
        "optimizer step": STEP_BYTES[training.optimizer] * learning,
    }
    moment = max(moments, key=moments.__getitem__)
    held = kept if moment != "optimizer step" else 0
    embedding = Item("input embedding", sizes.embedding * width)
    body = Item("base, linear layers", sizes.linear * width)
    if numerics.is_4bit:
        body = Item("base, linear layers", round(sizes.linear * NF4_BYTES), "NF4")
    both = Item("adapters", FP32_BYTES * sum(num_parameters.values()), "both, fp32")
    items = [
        body,
        *([] if numerics.embedding_on_cpu else [embedding]),
        *([] if sizes.is_tied else [Item("output head", sizes.head * width)]),
        Item("norms and biases", sizes.other * width),
        both,
        Item("gradients", FP32_BYTES * learning, "+".join(phase.trainable)),
        Item("optimizer state", ADAM_BYTES[training.optimizer] * learning, training.optimizer),
        Item("activations kept", held, "layers' inputs" if checkpointing else "all layers"),
        Item("largest moment", moments[moment] - held, moment),
    ]
    peak = sum(item.num_bytes for item in items)
    host = [Item("copy of the adapters", both.num_bytes)]
    return PhaseMemory(
        phase=phase.name,
        micro_batch_tokens=tokens,
        checkpointing=checkpointing,
        items=tuple(items),
        outside=(
            Item("CUDA context", CONTEXT_BYTES, "assumed"),
            Item("allocator's reserve", round(RESERVE * peak), f"assumed, {RESERVE:.0%}"),
        ),
        host=(*host, *([embedding] if numerics.embedding_on_cpu else [])),
    )


def adapter_sizes(sizes: BaseSizes, adapters: AdaptersConfig) -> dict[str, int]:
    """Return each adapter's number of parameters."""
    return {name: _adapter(adapters, name).rank * n for name, n in sizes.adapter_units.items()}


def predict_loss_bytes(model_config: Any) -> int:
    """Return what the logits of one chunk of answer positions need at the peak."""
    return LOGIT_COPIES * CHUNK_ROWS * read_shape(model_config).vocabulary * FP32_BYTES


def _adapter(adapters: AdaptersConfig, name: str) -> AdapterConfig:
    return adapters.global_ if name == GLOBAL else adapters.local


def _kept_bytes(
    shape: Shape,
    in_use: Sequence[AdapterConfig],
    num_tokens: int,
    dtype_bytes: int,
    checkpointing: bool,
) -> int:
    """Return what the layers keep for the backward pass."""
    if checkpointing:
        return shape.num_layers * shape.hidden * dtype_bytes * num_tokens
    first_norm = FP32_BYTES * shape.hidden * num_tokens  # nothing below it learns
    return shape.num_layers * _saved_bytes(shape, in_use, num_tokens, dtype_bytes) - first_norm


def _layer_bytes(
    shape: Shape,
    in_use: Sequence[AdapterConfig],
    num_tokens: int,
    dtype_bytes: int,
    checkpointing: bool,
) -> int:
    """Return what the backward pass of one layer adds, at the end of its feed-forward block."""
    gradients = (2 * shape.intermediate + shape.hidden) * dtype_bytes * num_tokens
    if not checkpointing:
        return gradients
    saved = _saved_bytes(shape, in_use, num_tokens, dtype_bytes)
    if dtype_bytes == FP32_BYTES:  # the first norm's input is the layer's, which is kept anyway
        saved -= FP32_BYTES * shape.hidden * num_tokens
    return saved + gradients


def _loss_bytes(shape: Shape, batch: MicroBatch, dtype_bytes: int) -> int:
    """Return what the loss adds: the last norm, answers' hidden states, a chunk of logits."""
    norm = (FP32_BYTES + dtype_bytes) * shape.hidden * batch.num_tokens
    answers = dtype_bytes * shape.hidden * batch.num_answer_tokens
    rows = min(CHUNK_ROWS, batch.num_answer_tokens)
    return norm + answers + LOGIT_COPIES * FP32_BYTES * rows * shape.vocabulary


def _saved_bytes(
    shape: Shape, in_use: Sequence[AdapterConfig], num_tokens: int, dtype_bytes: int
) -> int:
    """Return what autograd keeps of one layer."""
    modules = shape.modules
    adapted = {module: [a for a in in_use if _is_adapted(a, module, modules)] for module in modules}
    attention = 2 * shape.query + 2 * shape.key  # queries, keys, values, and what comes out
    feed_forward = 3 * shape.intermediate  # gate, its activation, up
    kept = attention + feed_forward
    # An adapter's A needs its input, which modules side by side have in common.
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj")):
        kept += modules[names[0]][0] * any(adapted[name] for name in names)
    kept += shape.intermediate * bool(adapted["down_proj"])
    kept += sum(adapter.rank for those in adapted.values() for adapter in those)
    dropped = sum(
        modules[module][0] * (dtype_bytes + 1)  # the input after dropout, and its mask
        for module, those in adapted.items()
        for adapter in those
        if adapter.dropout > 0
    )
    norms = 2 * shape.hidden * FP32_BYTES
    per_token = kept * dtype_bytes + dropped + norms + shape.num_heads * FP32_BYTES
    copies = sum(  # of the adapters, in the dtype of the computation
        adapter.rank * sum(modules[module])
        for module, those in adapted.items()
        for adapter in those
    )
    return per_token * num_tokens + copies * dtype_bytes


def _is_adapted(adapter: AdapterConfig, module: str, modules: Iterable[str]) -> bool:
    """Tell whether a module has this adapter; names of another architecture count as all."""
    targets = adapter.target_modules
    if targets == "all-linear" or not set(targets) & set(modules):
        return True
    return module in targets
