"""What a round consists of in each mode: which adapters learn from which data, and when.

A round is: *train* at every client, average at the server, then *personalise* at every
client against the new global adapter, and evaluate. Personalising after the average is
what keeps a local adapter from being fitted to a global one that no longer exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.config.sharing import FACTORS, learning_factors

BASE = "base"
BOTH = (GLOBAL, LOCAL)


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    ``data``: universal (the client's share), local (its local records with replayed
    universal ones) or mixed (all of both).
    """

    active: tuple[str, ...]
    trainable: tuple[str, ...]
    data: Literal["universal", "local", "mixed"]
    steps_of: tuple[str, ...] = ()
    """Whose steps it takes, of the two phases of mode dual; empty: of the adapters that learn."""
    num_rounds: int = 1
    """How many rounds' steps it takes at once: this one's and those of the rounds before it."""
    starts_from_global: bool = False
    """The local adapter is first made a copy of the global one."""
    factors: tuple[str, ...] = FACTORS
    """Of the global adapter, where it is one of those that learn."""
    weights: tuple[float, float] = (1.0, 1.0)
    """By which what the global and what the local adapter adds is multiplied."""

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
    is_global_given: bool = False
    """The global adapter is that of another run, and the same in every round."""

    @property
    def trained(self) -> tuple[str, ...]:
        """The adapters that have learnt something by the end of the round."""
        shared = (GLOBAL,) if self.train is not None or self.is_global_given else ()
        return shared + tuple(name for name in self.evaluated if name == LOCAL)

    @property
    def has_copy(self) -> bool:
        """Whether the local adapter began as a copy of the global one, and answers in its place."""
        return self.personalise is not None and self.personalise.starts_from_global


def plan_round(config: Config, server_round: int) -> RoundPlan:
    """Return what round ``server_round`` (from 1) does.

    Every mode takes the same number of steps over a run, those of dual's phased schedule. The
    baseline *finetuned* splits them as dual does: its rounds of FedAvg, over all of a client's
    data, take the steps of the global phases, and after the last average each client fine-tunes
    a copy on all of its data, with the steps of all local phases at once. A copy made in an earlier
    round would be thrown away with the next average, so this spends no step in vain; both parts
    have a whole learning-rate schedule of their own.

    In *adapted* every round is the local phase of dual, beside a global adapter that stands still.
    """
    mode, schedule = config.federated.mode, config.training.schedule
    is_last = server_round == config.federated.num_rounds
    factors = learning_factors(config, server_round)
    personalise = Phase(BOTH, (LOCAL,), "local")
    if schedule != "joint":
        weight = config.training.local_mixing_weight
        personalise = replace(
            personalise,
            data="mixed" if schedule == "mixed" else "local",
            weights=(1.0, 1.0) if weight is None else (1 - weight, weight),
        )
    if mode == "dual" and schedule != "joint":
        data = "mixed" if schedule == "mixed" else "universal"
        return RoundPlan(Phase((GLOBAL,), (GLOBAL,), data, factors=factors), personalise, BOTH)
    if mode == "adapted":
        return RoundPlan(None, personalise, BOTH, is_global_given=True)
    if mode == "dual":
        shared = Phase(BOTH, BOTH, "mixed", factors=factors)
        return RoundPlan(shared, personalise if is_last else None, BOTH)
    if mode == "local-only":
        return RoundPlan(None, Phase((LOCAL,), (LOCAL,), "mixed", BOTH), (LOCAL,))
    if mode == "finetuned":
        average = Phase((GLOBAL,), (GLOBAL,), "mixed", (GLOBAL,), factors=factors)
        if not is_last:
            return RoundPlan(average, None, (GLOBAL,))
        copy = Phase((LOCAL,), (LOCAL,), "mixed", (LOCAL,), server_round, starts_from_global=True)
        return RoundPlan(average, copy, (LOCAL,))
    return RoundPlan(Phase((GLOBAL,), (GLOBAL,), "mixed", BOTH, factors=factors), None, (GLOBAL,))


def adapters_label(active: Sequence[str]) -> str:
    """Return "base", "global", "local" or "global+local"."""
    return "+".join(active) or BASE
