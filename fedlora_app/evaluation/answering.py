"""Who answers a question: a choice of adapters, and which choices a saved round offers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora_app.config.combination import GATE, SCALE, SHARING, Combination, as_configured
from fedlora_app.config.rounds import BOTH
from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig, ConfigError
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.runs.reading import SavedRun

OPEN_ABOVE = 0.5
"""The local adapter answers where a gate opens further than this."""
NUM_FOREIGN = 3  # other clients' local adapters tried per client, of however many there are


@dataclass(frozen=True)
class Answering:
    """Which adapters answer: the global one or not, and whose local one, at which scale."""

    with_global: bool = False
    local: str | None = None
    scale: float = 1.0
    combine: Combination | None = None
    """How both adapters answer together; None: as the run's configuration says."""
    global_of: str | None = None
    """Whose global adapter, where clients differ in it; None: the server's."""

    @classmethod
    def own(
        cls,
        active: Sequence[str],
        client: str,
        scale: float = 1.0,
        combine: Combination | None = None,
    ) -> Answering:
        """Return what a client answers with where its adapters ``active`` do."""
        return cls(GLOBAL in active, client if LOCAL in active else None, scale, combine)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters on the model; none for the base model alone."""
        return (GLOBAL,) * self.with_global + (LOCAL,) * (self.local is not None)

    @property
    def label(self) -> str:
        """``base``, ``global``, ``local:<id>`` or ``global+local:<id>``."""
        parts = [GLOBAL] if self.with_global else []
        parts += [f"{LOCAL}:{self.local}"] if self.local else []
        return "+".join(parts) or "base"

    def combination(self, config: AdaptersConfig) -> Combination:
        """Return how its adapters answer together; what is no pair has only its scale."""
        if not (self.with_global and self.local is not None):
            return SCALE
        return self.combine or as_configured(config)

    def has_gate(self, config: AdaptersConfig) -> bool:
        """Return whether a gate weighs the local adapter: only beside the global one."""
        return self.combination(config) == GATE

    def behind_gate(self, config: AdaptersConfig) -> dict[bool, Answering]:
        """Return who answers where the gate opens (True) and where it does not (False)."""
        if not self.has_gate(config):
            return dict.fromkeys((True, False), self)
        return {
            True: replace(self, combine=SCALE),
            False: Answering(with_global=True, global_of=self.global_of),
        }


@dataclass(frozen=True)
class SavedAdapters:
    """The adapters of a complete round, as choices of who answers; nothing is read yet.

    Raises:
        ConfigError: a combination is asked for, and clients do not answer with two adapters.
    """

    run: SavedRun
    server_round: int
    root: Path
    combine: Combination | None = field(default=None, kw_only=True)
    """How both adapters answer together; None: as the run's configuration says."""

    def __post_init__(self) -> None:
        """Refuse what has no effect, before anything is loaded."""
        if self.combine is None or set(self.active) == {GLOBAL, LOCAL}:
            return
        answering = " + ".join(self.active) or "the base model alone"
        raise ConfigError(
            f"The combination {self.combine} has no effect: it takes a global and a local adapter, "
            f"and in mode {self.run.config.federated.mode} clients answer with {answering} after "
            f"round {self.server_round}. Leave it out."
        )

    @property
    def combination(self) -> Combination:
        """How a client's adapters answer together."""
        first = Answering.own(self.active, self.clients[0], combine=self.combine)
        return first.combination(self.run.config.adapters)

    @property
    def evaluation_path(self) -> Path:
        """Where what is found out about these adapters is kept."""
        return self.run.evaluation_path(self.server_round, self.combine)

    @property
    def active(self) -> tuple[str, ...]:
        """What a client answers with after this round."""
        plan = self.run.plan(self.server_round)
        return BOTH if plan.has_copy and self.combine in SHARING else plan.evaluated

    @property
    def trained(self) -> tuple[str, ...]:
        """The adapters that have learnt something by the end of this round."""
        return self.run.plan(self.server_round).trained

    @property
    def clients(self) -> list[str]:
        """The clients, in order."""
        return self.run.config.client_ids

    def own(self, client: str, scale: float = 1.0) -> Answering:
        """Return what that client answers with.

        Raises:
            ConfigError: there is no such client, or the scale is impossible or has no effect.
        """
        self.run.config.client(client)
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"The scale (lambda) is {scale}; expected a number from 0 up.")
        if LOCAL not in self.active and scale != 1.0:
            mode = self.run.config.federated.mode
            raise ConfigError(
                f"The scale (lambda) {scale:g} has no effect: in mode {mode} there is no local "
                f"adapter after round {self.server_round}. Leave it out."
            )
        own = Answering.own(self.active, client, scale, self.combine)
        return replace(own, global_of=self._owner_of_global(client)) if own.with_global else own

    def alone(self, client: str) -> Answering:
        """Return the global adapter alone, as that client has it."""
        return Answering(with_global=True, global_of=self._owner_of_global(client))

    @property
    def has_own_globals(self) -> bool:
        """Whether clients have different global adapters."""
        config = self.run.config
        of_rule = config.federated.rule in PERSONAL
        return of_rule or any(config.adapters_of(c) is not config.adapters for c in self.clients)

    def _owner_of_global(self, client: str) -> str | None:
        return client if self.has_own_globals else None

    def foreign(self, client: str, scale: float = 1.0) -> list[Answering]:
        """Return the client's adapters with other clients' local ones in the place of its own."""
        if LOCAL not in self.active:
            return []
        position = self.clients.index(client)
        ring = (self.clients[position + 1 :] + self.clients[:position])[:NUM_FOREIGN]
        own = self.own(client, scale)
        return [replace(own, local=other) for other in ring]

    def swaps(self, client: str) -> list[Answering]:
        """Return every choice of adapters that the swap table tries on a client's questions."""
        alone = [Answering()]
        for name in self.trained:
            alone.append(self.alone(client) if name == GLOBAL else Answering.own([name], client))
        return list(dict.fromkeys([*alone, self.own(client), *self.foreign(client)]))
