"""The clients as the server knows them: which node each is, and what it keeps between rounds.

A message brings the global adapter only to a client that does not hold it already; the others
get its hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from flwr.app import ArrayRecord, Message, RecordDict

from fedlora_app.config.schema import FEEDBACK, LOCAL
from fedlora_app.federation.grid import build_message
from fedlora_app.federation.messages import Task, build_task_content

NOTHING_KEPT = (-1, "")  # the round of what a client has kept, and its sha256
UNKNOWN = "an unknown node"


class Roster:
    """Addresses messages to clients, and counts what travels.

    Args:
        nodes: node id of every client.
    """

    def __init__(self, nodes: dict[str, int]) -> None:
        self.nodes = nodes
        self.held: dict[str, str] = {}  # sha256 of the global adapter that a client has kept
        self.locals: dict[str, tuple[int, str]] = dict.fromkeys(nodes, NOTHING_KEPT)
        self.feedback: dict[str, tuple[int, str]] = dict.fromkeys(nodes, NOTHING_KEPT)
        """The round of a client's local adapter, and of what the rounding of its updates has left,
        each with its sha256."""
        self.traffic = Traffic()
        self.oldest_kept_round: Callable[[str, str], int] = lambda role, client: 0
        """Returns the oldest round of which a client is to keep what has this role."""
        self._clients = {node: client for client, node in nodes.items()}

    def sender(self, message: Message) -> str:
        """Return which client a message is from, or ``UNKNOWN``."""
        return self._clients.get(message.metadata.src_node_id, UNKNOWN)

    def move(self, client: str, node: int) -> None:
        """Have a client be another node from here on."""
        del self._clients[self.nodes[client]]
        self.nodes[client] = node
        self._clients[node] = client

    def messages(
        self, task: Task, message_type: str, arrays: Mapping[str, ArrayRecord | None]
    ) -> Iterator[Message]:
        """Yield one message per client, made when its turn comes.

        Args:
            task: its client, and what concerns what the client has kept, are filled in.
            arrays: the clients in order, and the global adapter that each is sent unless it
                holds it already.
        """
        for client, record in arrays.items():
            local_round, local_sha256 = self.locals[client]
            feedback_round, feedback_sha256 = self.feedback[client]
            own = replace(
                task,
                client_id=client,
                local_round=local_round,
                local_sha256=local_sha256,
                oldest_local_round=self.oldest_kept_round(LOCAL, client),
                feedback_round=feedback_round,
                feedback_sha256=feedback_sha256,
                oldest_feedback_round=self.oldest_kept_round(FEEDBACK, client),
            )
            is_held = task.global_sha256 and self.held.pop(client, "") == task.global_sha256
            content = build_task_content(own, None if is_held else record)
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
