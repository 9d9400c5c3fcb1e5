"""Who takes part in a round, and who trains the global adapter in it."""

from __future__ import annotations

import random
from collections.abc import Collection
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from fedlora_app.config.schema import Config
from fedlora_app.foundation.seeds import derive_seed

LARGEST_WEIGHT = 10**6
"""Of an update, where weights are given."""


def members(config: Config, server_round: int) -> list[str]:
    """Return the clients that take part in a round, in the order in which they are served.

    All of them are asked in round 0, which trains nothing.
    """
    return [
        client.id
        for client in sorted(config.federated.clients, key=lambda client: client.id)
        if server_round == 0
        or client.first_round <= server_round <= (client.last_round or server_round)
    ]


def find_span(config: Config, client_id: str) -> tuple[int, int]:
    """Return the first and the last round of a client."""
    client = config.entry(client_id)
    return client.first_round, client.last_round or config.federated.num_rounds


def list_members(config: Config, first_round: int) -> set[str]:
    """Return the clients that take part in some round from this one on."""
    rounds = range(first_round, config.federated.num_rounds + 1)
    return {client for server_round in rounds for client in members(config, server_round)}


def training_clients(config: Config, server_round: int) -> list[str]:
    """Return who trains before the average in a round: the first client alone where data is pooled.

    With ``federated.fraction`` below 1 a sample of the round's members, without replacement, from
    (seed, round) alone.
    """
    if config.federated.mode == "centralized":
        return config.client_ids[:1]
    present = members(config, server_round)
    if config.federated.fraction == 1 or not present:
        return present
    size = max(1, round(config.federated.fraction * len(present)))
    seed = derive_seed(config.experiment.seed, "clients", server_round)
    return sorted(random.Random(seed).sample(present, size))


def leave_out(raw: dict[str, Any], clients: Collection[str]) -> None:
    """Take clients out of a configuration as plain data.

    Their answers to conflict questions stay among the wrong ones, so that the questions are the
    same.
    """
    federated = raw["federated"]
    others = [entry for entry in federated["clients"] if entry["id"] not in clients]
    required = federated["min_clients"]
    federated |= {"clients": others, "min_clients": required and min(required, len(others))}
    raw["data"]["conflict_clients"] = [*raw["data"]["conflict_clients"], *clients]


def weigh(config: Config, client_id: str, num_examples: int) -> int:
    """Return how much a client's update counts, a whole number.

    Args:
        num_examples: that it has trained the global adapter on.
    """
    weighting = config.federated.weighting
    if weighting == "examples":
        return num_examples
    if weighting == "equal":
        return 1
    # As they are written: 0.3 is three tenths.
    weights = {client.id: Fraction(repr(client.weight)) for client in config.federated.clients}
    unit = Fraction(
        gcd(*(weight.numerator for weight in weights.values())),
        lcm(*(weight.denominator for weight in weights.values())),
    )
    # Of very many digits as many as the sum of the updates has room for.
    unit = max(unit, max(weights.values()) / LARGEST_WEIGHT)
    return max(1, round(weights[client_id] / unit))
