"""How much memory a phase takes, item by item, predicted from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import GLOBAL, AdaptersConfig, TrainingConfig
from fedlora_app.training.activations import (
    FP32_BYTES,
    MicroBatch,
    Numerics,
    Shape,
    adapter_config,
    count_step_bytes,
    keeps_states,
    read_shape,
)

ADAM_BYTES = {"adamw": 8, "paged_adamw_8bit": 2}
"""Of the optimizer's two moments, per parameter that learns."""
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, a quantised scale per 64 weights, an fp32 one per 256 of those."""
ADAPTERS = "adapters"
CUBLAS_BYTES = 2 * 8 * 4096 * 1024
"""What CUBLAS_WORKSPACE_CONFIG asks for, for the forward pass and for autograd's thread."""
CONTEXT_BYTES = 500_000_000
"""What CUDA takes for itself; outside of what torch counts."""
RESERVE = 0.05
"""Share of torch's peak that its allocator holds in pieces too small to use."""


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
    global_tensors: dict[str, dict[int, int]] = field(default_factory=dict)
    """By factor, how many of the global adapter's tensors have so many parameters per unit of
    rank."""

    @property
    def is_tied(self) -> bool:
        """Return whether the head's weights are the embedding's."""
        return self.head == 0

    @property
    def total(self) -> int:
        """Return the base model's parameters."""
        return self.linear + self.embedding + self.head + self.other


def predict_phase(
    shape: Shape,
    sizes: BaseSizes,
    adapters: AdaptersConfig,
    training: TrainingConfig,
    numerics: Numerics,
    phase: Phase,
    batch: MicroBatch,
    checkpointing: bool,
    hides_records: bool = False,
) -> PhaseMemory:
    """Return a phase's peak by item.

    Two moments of a step compete for the peak, and what the larger one adds is an item: the
    backward pass of a layer, and the loss.

    Args:
        hides_records: whether each example's gradient is bounded, as ``clipping`` does it.
    """
    num_parameters = adapter_sizes(sizes, adapters)
    num_learning = {name: num_parameters[name] for name in phase.trainable}
    learning, received = sum(num_learning.values()), _received_bytes(training, num_learning)
    width = numerics.dtype_bytes
    kept, layer, loss = count_step_bytes(
        shape, adapters, training, numerics, phase, batch, checkpointing, sizes.largest_linear
    )
    copied = _copied_bytes(shape, numerics, batch) if hides_records else 0
    moment = "backward pass of a layer" if layer >= loss else "loss"
    embedding = Item("input embedding", sizes.embedding * width)
    body = Item("base, linear layers", sizes.linear * width)
    if numerics.is_4bit:
        body = Item("base, linear layers", round(sizes.linear * NF4_BYTES), "NF4")
    frozen = adapters.global_.frozen_rank * sizes.adapter_units.get(GLOBAL, 0)
    both = Item(ADAPTERS, FP32_BYTES * (sum(num_parameters.values()) + frozen), "both, fp32")
    items = [
        body,
        *([] if numerics.embedding_on_cpu else [embedding]),
        *([] if sizes.is_tied else [Item("output head", sizes.head * width)]),
        Item("norms and biases", sizes.other * width),
        both,
        Item("gradients", FP32_BYTES * learning, "+".join(phase.trainable)),
        Item("optimizer state", ADAM_BYTES[training.optimizer] * learning, training.optimizer),
        *([Item("received adapter", received, "training.proximal_mu")] if received else []),
        Item("activations", kept, "layers' inputs" if checkpointing else "all layers"),
        Item("largest moment", max(layer, loss), moment),
        *([Item("a layer's inputs", copied, "fp32, for privacy.unit: record")] if copied else []),
    ]
    peak = sum(item.num_bytes for item in items)
    host = [Item("copy of the adapters", both.num_bytes)]
    if keeps_states(adapters, phase) and batch.phase_tokens:
        states = batch.phase_tokens * shape.hidden * width
        host.append(Item("states of the lower layers", states, "of all examples"))
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
    """Return each adapter's number of parameters that can learn."""
    return {
        name: adapter_config(adapters, name).rank * n for name, n in sizes.adapter_units.items()
    }


def predict_step_bytes(
    model_config: Any,
    adapters: AdaptersConfig,
    training: TrainingConfig,
    numerics: Numerics,
    phase: Phase,
    batch: MicroBatch,
    num_learning: dict[str, int],
    hides_records: bool = False,
) -> int:
    """Return what a step without checkpointing needs beside the base and its adapters.

    Args:
        num_learning: parameters of each adapter that learns in the phase.
        hides_records: as for ``predict_phase``.

    Raises:
        PlanError: the configuration is not a decoder's.
    """
    shape = read_shape(model_config)
    largest = max(inputs * outputs for inputs, outputs in shape.modules.values())
    kept, layer, loss = count_step_bytes(
        shape, adapters, training, numerics, phase, batch, False, largest
    )
    learnt = (FP32_BYTES + ADAM_BYTES[training.optimizer]) * sum(num_learning.values())
    learnt += _received_bytes(training, num_learning)
    copied = _copied_bytes(shape, numerics, batch) if hides_records else 0
    return learnt + kept + max(layer, loss) + copied


def _copied_bytes(shape: Shape, numerics: Numerics, batch: MicroBatch) -> int:
    """Return what an example's gradient is made of in one layer, where the model is not fp32."""
    widest = max(size for sizes in shape.modules.values() for size in sizes)
    return batch.num_tokens * widest * FP32_BYTES if numerics.dtype_bytes < FP32_BYTES else 0


def _received_bytes(training: TrainingConfig, num_learning: dict[str, int]) -> int:
    """Return what the copy of the received adapter takes that ``proximal_mu`` measures from."""
    return FP32_BYTES * num_learning.get(GLOBAL, 0) if training.proximal_mu > 0 else 0
