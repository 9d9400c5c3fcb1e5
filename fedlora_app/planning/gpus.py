"""How long a card takes for a number of tokens: a roofline and an assumed share of it.

    seconds = FLOP / (peak * EFFICIENCY) + bytes of weights read / bandwidth

FLOP per token, with N weights in the linear layers and P in the active adapters: 2 (N + P) for the
forward pass, 2 (N + P) for the backward pass to the activations, 2 for each adapter weight that
learns, 2 (N + P) more where activations are computed again. Attention adds 2 * width * length per
layer and forward pass (causal, half of all pairs) and twice that backward. The head takes 4 V D,
at answer positions only. Weights are read once per micro-batch and pass; with 4 bits they are
also written and read again in the dtype of the computation. Not counted: loading, the optimizer,
tokenising, messages, and evaluation, which generates text one token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_app.training.step_memory import NF4_BYTES, BaseSizes, Numerics, Shape

EFFICIENCY = 0.35
"""Assumed, not measured: the share of a card's peak that training reaches."""


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's figures: bf16 without sparsity, with fp32 accumulation."""

    name: str
    memory_bytes: int
    """As the driver reports it."""
    peak_tflops: float
    bandwidth_gb_per_second: float


_MIB = 2**20
CARDS = (
    Card("RTX 3070", 8192 * _MIB, 40.6, 448),
    Card("RTX 3090", 24576 * _MIB, 71.0, 936),
    Card("RTX 4070 Ti Super", 16376 * _MIB, 88.2, 672),
    Card("RTX 4090", 24564 * _MIB, 165.2, 1008),
    Card("RTX 5090", 32607 * _MIB, 209.5, 1792),
    Card("L4", 23034 * _MIB, 121.0, 300),
    Card("A10", 23028 * _MIB, 125.0, 600),
    Card("L40S", 46068 * _MIB, 362.0, 864),
    Card("A100 40 GB", 40960 * _MIB, 312.0, 1555),
    Card("A100 80 GB", 81920 * _MIB, 312.0, 2039),
    Card("H100", 81559 * _MIB, 989.0, 3350),
    Card("H200", 143771 * _MIB, 989.0, 4800),
)


@dataclass(frozen=True)
class Work:
    """What goes through the model."""

    tokens: int
    answer_tokens: int
    attention_pairs: int
    """Squares of the examples' lengths, added up."""
    micro_batches: int


def compute_flops(
    shape: Shape,
    sizes: BaseSizes,
    work: Work,
    active_parameters: int,
    learning_parameters: int,
    checkpointing: bool,
) -> float:
    """Return the floating-point operations of training on ``work``."""
    passes = 3 if checkpointing else 2
    weights = 2 * passes * (sizes.linear + active_parameters) + 2 * learning_parameters
    attention = 2 * shape.num_layers * shape.query * (passes + 1)
    head = 4 * shape.vocabulary * shape.hidden
    return weights * work.tokens + attention * work.attention_pairs + head * work.answer_tokens


def compute_seconds(
    card: Card,
    flops: float,
    sizes: BaseSizes,
    numerics: Numerics,
    micro_batches: int,
    checkpointing: bool,
) -> float:
    """Return the time that a card needs, at the assumed efficiency."""
    width = numerics.dtype_bytes
    per_weight = NF4_BYTES + 2 * width if numerics.is_4bit else width
    read = micro_batches * (3 if checkpointing else 2) * sizes.linear * per_weight
    compute = flops / (card.peak_tflops * 1e12 * EFFICIENCY)
    return compute + read / (card.bandwidth_gb_per_second * 1e9)
