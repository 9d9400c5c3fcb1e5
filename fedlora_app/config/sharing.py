"""What of the global adapter learns, what travels and what stays, by aggregation rule and round.

A LoRA adapter's update of a layer is B A; rules differ in which of the two factors they touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from fedlora_app.config.schema import Aggregation, Config

FACTORS = ("A", "B")
EXACT_IN_B, EXACT_IN_A = ("B",), ("A",)
PLAIN_MEANS: tuple[Aggregation, ...] = ("fedavg", "freeze-a", "alternate", "share-a", "share-b")
"""Rules that take the mean of the updates as they come, and nothing else."""
STAY: dict[Aggregation, tuple[str, ...]] = {"share-a": ("B",), "share-b": ("A",)}
"""Factors that each client trains and keeps for itself."""
WITH_FROZEN_PART: tuple[Aggregation, ...] = ("residual", "stack")
"""Rules whose global adapter has a part that no client trains."""
PERSONAL: tuple[Aggregation, ...] = ("share-a", "share-b", "rest-of-world")
"""Rules that leave each client with a global adapter of its own."""
WITH_MIXED_RANKS: tuple[Aggregation, ...] = ("svd", "stack", "rank-partitioned")
"""Rules for clients whose global adapters differ in rank."""
NEW_DIRECTIONS: tuple[Aggregation, ...] = ("svd", "stack", "rank-partitioned")
"""Rules after which a rank is another direction than before, so that what is left of an update's
rounding, which is of the old ones, means nothing in the next update."""

Value = TypeVar("Value")


def learning_factors(config: Config, server_round: int) -> tuple[str, ...]:
    """Return which factors of the global adapter clients train in a round."""
    if config.federated.rule == "freeze-a":
        return EXACT_IN_B
    if config.federated.rule == "alternate":
        return EXACT_IN_B if server_round % 2 else EXACT_IN_A
    return FACTORS


def travelling_factors(config: Config, server_round: int) -> tuple[str, ...]:
    """Return of which factors clients send their updates; the server's others stay as they are."""
    kept = STAY.get(config.federated.rule, ())
    return tuple(f for f in learning_factors(config, server_round) if f not in kept)


def keeps_feedback(config: Config) -> bool:
    """Return whether clients keep what the rounding of their updates has left to send."""
    is_rounded = config.federated.upload_dtype in ("int8", "nf4")
    return is_rounded and config.federated.rule not in NEW_DIRECTIONS


def of_factors(values: Mapping[str, Value], factors: Iterable[str]) -> dict[str, Value]:
    """Return what belongs to these factors of an adapter's tensors, or of their shapes."""
    marks = [f".lora_{factor}." for factor in factors]
    return {key: value for key, value in values.items() if any(mark in key for mark in marks)}
