"""The clients as the server knows them: which node each is, and what it keeps between rounds.

A message brings the global adapter only to a client that does not hold it already; the others
get its hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from flwr.app import ArrayRecord, Message, RecordDict

from fedlora_app.federation.grid import build_message
from fedlora_app.federation.messages import KEPT, Task, build_task_content

UNKNOWN = "an unknown node"


@dataclass(frozen=True)
class Patch:
    """The tensors that have changed since a global adapter."""

    base_sha256: str
    arrays: ArrayRecord


class Roster:
    """Addresses messages to clients, and counts what travels.

    Args:
        nodes: node id of every client.
    """

    def __init__(self, nodes: dict[str, int]) -> None:
        self.nodes = nodes
        self.held: dict[str, str] = {}
        """sha256 of the global adapter that a client has kept, until it is relied on once."""
        self.on_disk: dict[str, str] = {}
        """The same for as long as nothing else has taken its place there."""
        self.kept: dict[str, dict[str, tuple[int, str]]] = {role: {} for role in KEPT}
        """By role and client the last round whose file counts, and its sha256."""
        self.traffic = Traffic()
        self.oldest_kept_round: Callable[[str, str], int] = lambda role, client: 0
        """Returns the oldest round of which a client is to keep what has this role."""
        self.gets_own_state: Callable[[str], bool] = lambda client: False
        """Returns whether a client gets another global adapter than the server's, whose hash the
        client alone knows."""
        self._clients = {node: client for client, node in nodes.items()}

    def sender(self, message: Message) -> str:
        """Return which client a message is from, or ``UNKNOWN``."""
        return self._clients.get(message.metadata.src_node_id, UNKNOWN)

    def note_global(self, client: str, sha256: str) -> None:
        """Remember which global adapter a client says it has kept, "" for none."""
        self.held[client] = self.on_disk[client] = sha256

    def move(self, client: str, node: int) -> None:
        """Have a client be another node from here on, or one where it was none yet."""
        self._clients.pop(self.nodes.get(client), None)
        self.nodes[client] = node
        self._clients[node] = client

    def messages(
        self,
        task: Task,
        message_type: str,
        clients: Iterable[str],
        arrays_for: Callable[[str], ArrayRecord | None],
        patch: Patch | None = None,
    ) -> Iterator[Message]:
        """Yield one message per client, made when its turn comes.

        Args:
            task: its client, and what concerns what the client has kept, are filled in.
            clients: in order.
            arrays_for: returns the global adapter that a client is sent unless it holds it already.
            patch: is sent instead to who holds what it is laid over.
        """
        for client in clients:
            held, expected = self.held.pop(client, ""), task.global_sha256
            if self.gets_own_state(client):
                expected = held
            kept = {
                role: [*found[client], self.oldest_kept_round(role, client)]
                for role, found in self.kept.items()
                if client in found
            }
            own = replace(task, client_id=client, global_sha256=expected, kept=json.dumps(kept))
            if expected and held == expected:
                content = build_task_content(own)
            elif patch is not None and self.on_disk.get(client) == patch.base_sha256:
                patched = replace(own, base_sha256=patch.base_sha256)
                content = build_task_content(patched, patch.arrays)
            else:
                content = build_task_content(own, arrays_for(client))
            message = build_message(content, message_type, self.nodes[client])
            self.traffic.add(client, "down", message)
            yield message


class Traffic:
    """Counts the bytes of a round's messages to and from each client."""

    def __init__(self) -> None:
        self.by_client: dict[str, dict[str, int]] = {}

    def add(self, client_id: str, direction: Literal["down", "up"], message: Message) -> None:
        """Count one message; an error that Flower reports in a client's place has no content."""
        counts = self.by_client.setdefault(
            client_id,
            dict.fromkeys(("bytes_down", "bytes_up", "adapter_bytes_down", "adapter_bytes_up"), 0),
        )
        if message.has_content():
            total, arrays = count_bytes(message.content)
            counts[f"bytes_{direction}"] += total
            counts[f"adapter_bytes_{direction}"] += arrays


def count_bytes(content: RecordDict) -> tuple[int, int]:
    """Return the bytes of a message's content, and those of its arrays alone.

    By Flower's own count, without the names of the records and what the transport adds.
    """
    arrays = sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )
    total = sum(record.count_bytes() for record in content.array_records.values())
    total += sum(record.count_bytes() for record in content.metric_records.values())
    # ConfigRecord.count_bytes of flwr 1.41 raises for an empty text or list.
    total += sum(len(record.deflate()) for record in content.config_records.values())
    return total, arrays
