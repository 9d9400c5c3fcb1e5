"""Which global adapter a client gets, and what it has kept of the ones before.

A message names the adapter that its client needs by the hash. The adapter itself goes along only
where the client does not hold it: whole, or, to who holds the one before, what the round has
changed. Under some rules, and with a lower rank, a client gets another one than the server's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, Message, MessageType

from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import FEEDBACK, LOCAL, OWN_GLOBAL, Config
from fedlora_app.config.sharing import (
    FACTORS,
    PERSONAL,
    STAY,
    keeps_feedback,
    of_factors,
    travelling_factors,
)
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.messages import KEPT, REGISTRATION_ROUND, Task
from fedlora_app.federation.packed_state import pack_state, unpack_state
from fedlora_app.federation.replies import Reply
from fedlora_app.federation.roster import Patch, Roster
from fedlora_app.model.adapter_state import AdapterState

NAMED_GLOBAL = "global_adapter"
"""The fact by which a client names the global adapter that it holds for the next message."""


class Broadcast:
    """The global adapter as it is sent, and the messages that bring it.

    Args:
        roster: is told what clients say that they have kept.
        task: what every message carries; client and rounds are filled in.
        shapes: of the global adapter's tensors.
        aggregation: knows what a client gets in the place of the server's adapter.
    """

    def __init__(
        self,
        config: Config,
        roster: Roster,
        task: Task,
        shapes: dict[str, torch.Size],
        aggregation: Aggregation,
    ) -> None:
        self.state: AdapterState = {}
        """The server's global adapter, fp32; only to be read."""
        self.sha256 = ""
        """Of its file."""
        self._sha256_before = ""
        self._config = config
        self._roster = roster
        self._task = task
        self._shapes = shapes
        self._aggregation = aggregation
        roster.gets_own_state = aggregation.has_own_state

    def renew(self, state: AdapterState, sha256: str) -> ArrayRecord:
        """Send this global adapter from here on, which may be the same as before.

        Args:
            sha256: of its file.

        Returns:
            The adapter as arrays.
        """
        self._sha256_before, self.sha256 = self.sha256, sha256
        if state is not self.state:
            self._packed = pack_state(state)
            self.state = unpack_state(self._packed, self._shapes, "The server")  # in one memory
            # What a client had in its place has a successor too.
            for client in filter(self._roster.gets_own_state, list(self._roster.held)):
                del self._roster.held[client]
        return self._packed

    def task_of(self, server_round: int) -> Task:
        """Return a round's task, of no client yet."""
        return replace(self._task, server_round=server_round, global_sha256=self.sha256)

    def messages(
        self, message_type: str, server_round: int, clients: Iterable[str], *, whole: bool = False
    ) -> Iterator[Message]:
        """Yield one message per client, made when its turn comes.

        Args:
            clients: in order.
            whole: the adapter goes to them in full, whatever they said that they hold of it.
        """
        patch = None if whole else self._build_patch(message_type, server_round)
        task = self.task_of(server_round)
        return self._roster.messages(task, message_type, clients, self._arrays_for, patch)

    def checking_messages(self, clients: Iterable[str], holders: set[str]) -> Iterator[Message]:
        """Yield messages by which clients check what they have kept of a run that resumes.

        Args:
            holders: who had kept the global adapter, and gets it again.
        """

        def arrays_for(client: str) -> ArrayRecord | None:
            return self._arrays_for(client) if client in holders else None

        task = self.task_of(REGISTRATION_ROUND)
        return self._roster.messages(task, MessageType.QUERY, clients, arrays_for)

    def facts_after_training(self, server_round: int) -> list[str]:
        """Return which files a client names that has trained before the average."""
        phase = plan_round(self._config, server_round).train
        assert phase is not None
        facts = [KEPT[LOCAL]] if LOCAL in phase.trainable else []
        facts += [KEPT[OWN_GLOBAL]] if self._config.federated.rule in STAY else []
        return facts + ([KEPT[FEEDBACK]] if keeps_feedback(self._config) else [])

    def facts_after_round(self, server_round: int) -> list[str]:
        """Return which files a client names when a round ends."""
        is_last = server_round == self._config.federated.num_rounds
        evaluated = plan_round(self._config, server_round).evaluated
        facts = [KEPT[LOCAL]] if LOCAL in evaluated else []
        facts += [] if is_last else [NAMED_GLOBAL]
        return facts + ([KEPT[OWN_GLOBAL]] if self._config.federated.rule in PERSONAL else [])

    def note_kept(self, reply: Reply, server_round: int, *, has_ended: bool) -> dict[str, str]:
        """Remember the files that a client says it has written.

        Args:
            has_ended: the reply is that of the round's end, not of the training before the average.

        Returns:
            What of them the round enters in the manifest: "role:client", and the sha256.
        """
        client, entries = reply.client_id, {}
        # A round that goes on may write an adapter again, and the reply with its hash be lost.
        stays = has_ended or plan_round(self._config, server_round).personalise is None
        for role, fact in KEPT.items():
            sha256 = reply.facts.get(fact)
            if sha256 is None:
                continue
            if role == OWN_GLOBAL and not has_ended:
                sha256 = ""
            self._roster.kept[role][client] = (server_round, sha256)
            if stays or role in (FEEDBACK, OWN_GLOBAL):
                entries[f"{role}:{client}"] = sha256
        if has_ended:
            self._roster.note_global(client, reply.facts.get(NAMED_GLOBAL, ""))
        return entries

    def _build_patch(self, message_type: str, server_round: int) -> Patch | None:
        """Return what a round has changed of the global adapter, None where that is all of it."""
        changed = travelling_factors(self._config, server_round)
        has_trained = plan_round(self._config, server_round).train is not None
        if message_type != MessageType.EVALUATE or not has_trained or changed == FACTORS:
            return None
        return Patch(self._sha256_before, pack_state(of_factors(self.state, changed)))

    def _arrays_for(self, client: str) -> ArrayRecord:
        """Return the global adapter that a client gets, as arrays."""
        state = self._aggregation.state_for(client, self.state)
        return self._packed if state is self.state else pack_state(state)
