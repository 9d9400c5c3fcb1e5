"""What a round consists of in each mode: which adapters learn from which data, and when.

A round is: *train* at every client, average at the server, then *personalise* at every
client against the new global adapter, and evaluate. Personalising after the average is
what keeps a local adapter from being fitted to a global one that no longer exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora_app.config.schema import GLOBAL, LOCAL, Config

BASE = "base"
BOTH = (GLOBAL, LOCAL)


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    ``data``: universal (the client's share), local (its local records with replayed
    universal ones), mixed (all of both) or pooled (every client's, centralized only).
    """

    active: tuple[str, ...]
    trainable: tuple[str, ...]
    data: Literal["universal", "local", "mixed", "pooled"]

    @property
    def name(self) -> str:
        """What the phase is called in metrics: the adapters that learn."""
        return "+".join(self.trainable)


@dataclass(frozen=True)
class RoundPlan:
    """A round of one mode. ``evaluated`` are the adapters a client answers with."""

    train: Phase | None
    personalise: Phase | None
    evaluated: tuple[str, ...]


def plan_round(config: Config, server_round: int) -> RoundPlan:
    """Return what round ``server_round`` (from 1) does."""
    mode, schedule = config.federated.mode, config.training.schedule
    personalise = Phase(BOTH, (LOCAL,), "local")
    if mode == "dual" and schedule == "phased":
        return RoundPlan(Phase((GLOBAL,), (GLOBAL,), "universal"), personalise, BOTH)
    if mode == "dual":
        is_last = server_round == config.federated.num_rounds
        return RoundPlan(Phase(BOTH, BOTH, "mixed"), personalise if is_last else None, BOTH)
    if mode == "local-only":
        return RoundPlan(None, Phase((LOCAL,), (LOCAL,), "mixed"), (LOCAL,))
    data = "pooled" if mode == "centralized" else "mixed"
    return RoundPlan(Phase((GLOBAL,), (GLOBAL,), data), None, (GLOBAL,))


def training_clients(config: Config) -> list[str]:
    """Return who trains before the average: the first client alone where data is pooled."""
    return config.client_ids[:1] if config.federated.mode == "centralized" else config.client_ids


def adapters_label(active: Sequence[str]) -> str:
    """Return "base", "global", "local" or "global+local"."""
    return "+".join(active) or BASE
