"""How long a card takes for a number of tokens: a roofline and an assumed share of it.

    seconds = FLOP / (peak * EFFICIENCY) + bytes of weights read / bandwidth

FLOP per token, with N weights in the linear layers and P in the active adapters: 2 (N + P) for the
forward pass, 2 (N + P) for the backward pass to the activations, 2 for each adapter weight that
learns, 2 (N + P) more where activations are computed again. Attention adds 2 * width * length per
layer and forward pass (causal, half of all pairs) and twice that backward. Layers below the first
one that learns have a forward pass only, and none where their states are kept from an earlier one.
The head takes 4 V D, at answer positions only. Weights are read once per micro-batch and pass; with
4 bits they are also written and read again in the dtype of the computation. Not counted: loading,
the optimizer, tokenising, messages, and evaluation, which generates text one token at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedlora_app.training.activations import Numerics, PlanError, Shape
from fedlora_app.training.phase_memory import NF4_BYTES, BaseSizes

EFFICIENCY = 0.35
"""Assumed, not measured: the share of a card's peak that training reaches."""

UNITS = {
    **{"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
    **{"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40},
}


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's figures: bf16 without sparsity, with fp32 accumulation."""

    name: str
    memory_bytes: int
    """As the driver reports it."""
    peak_tflops: float
    bandwidth_gb_per_second: float
    efficiency: float = EFFICIENCY


SAME_CARD = r"NVIDIA|GeForce|SXM\d?|\d+GB|HBM\w*"
"""Words of a driver's name for a card that do not tell it from others."""
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
    Card("H100 PCIe", 81559 * _MIB, 756.0, 2039),
    Card("H200", 143771 * _MIB, 989.0, 4800),
)


def parse_memory(text: str) -> int:
    """Return the bytes of "24GB", "24 GB", "7.0GiB" or "8g"; GB is 1e9 and GiB 2**30.

    Raises:
        PlanError: it is not a size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)b?\s*", text, re.IGNORECASE)
    size = round(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    if size <= 0:
        raise PlanError(
            f'--gpu-memory "{text[:40]}" is not a size. Expected a number above 0 and its unit, '
            "such as 24GB (24e9 bytes) or 7.5GiB (7.5 * 2**30)."
        )
    return size


def find_card(name: str) -> Card | None:
    """Return the card that a driver calls by this name, None if it is not known.

    "NVIDIA A100-SXM4-80GB" is an A100; an "RTX 3070 Ti" or "H100 NVL" is another card.
    """
    words = re.split("[ -]", name)
    known = " ".join(word for word in words if not re.fullmatch(SAME_CARD, word))
    named = {re.sub(r" \d+ GB$", "", card.name): card for card in CARDS}
    return named.get(known)


@dataclass(frozen=True)
class Work:
    """What goes through the model."""

    tokens: int
    answer_tokens: int
    attention_pairs: int
    """Squares of the examples' lengths, added up."""
    micro_batches: int


@dataclass(frozen=True)
class Passes:
    """How often the decoder layers are run for a micro-batch, forwards and backwards."""

    checkpointing: bool
    frozen: float = 0.0
    """Share of the layers that lie below the first one that learns."""
    frozen_forward: float = 1.0
    """Of these, the share of micro-batches that run them at all."""
    backwards: int = 1
    """Backward passes for one forward pass; each recomputes what checkpointing left out."""

    @property
    def of_weights(self) -> float:
        """Passes over all weights, on average over the layers."""
        return self._average(1 + self.backwards * (1 + self.checkpointing))

    @property
    def of_attention(self) -> float:
        """Forward passes that attention takes as long as; its backward pass counts twice."""
        return self._average(1 + self.backwards * (2 + self.checkpointing))

    def _average(self, learning: int) -> float:
        return (1 - self.frozen) * learning + self.frozen * self.frozen_forward


def compute_flops(
    shape: Shape,
    sizes: BaseSizes,
    work: Work,
    active_parameters: int,
    learning_parameters: int,
    passes: Passes,
) -> float:
    """Return the floating-point operations of training on ``work``."""
    learnt = 2 * passes.backwards * learning_parameters
    weights = 2 * passes.of_weights * (sizes.linear + active_parameters) + learnt
    attention = 2 * shape.num_layers * shape.query * passes.of_attention
    head = 2 * (1 + passes.backwards) * shape.vocabulary * shape.hidden
    return weights * work.tokens + attention * work.attention_pairs + head * work.answer_tokens


def compute_seconds(
    card: Card,
    flops: float,
    sizes: BaseSizes,
    numerics: Numerics,
    micro_batches: int,
    passes: Passes,
) -> float:
    """Return the time that a card needs, at the assumed efficiency."""
    width = numerics.dtype_bytes
    per_weight = NF4_BYTES + 2 * width if numerics.is_4bit else width
    read = micro_batches * passes.of_weights * sizes.linear * per_weight
    compute = flops / (card.peak_tflops * 1e12 * card.efficiency)
    return compute + read / (card.bandwidth_gb_per_second * 1e9)
