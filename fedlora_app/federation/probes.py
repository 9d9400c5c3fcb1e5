"""Which messages were lost with the process that had them.

A SuperNode keeps the message that it deals with in memory. One that is killed and started again is
the same node to Flower where its key is registered, so nobody says that the message is gone, and
its reply would be waited for without end; as it would where a pull was cut off after the SuperLink
had noted it as delivered. A node deals with one message after the other, in the order in which they
were sent. So a small message is sent after one that waits for long, and where it is answered and
the first one is not, the first one is lost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora_app.federation.messages import build_probe

FIRST_PROBE_SECONDS = 60.0
LONGEST_PROBE_SECONDS = 600.0


@dataclass
class _Probe:
    message_id: str = ""  # of the one under way, if there is one
    wait: float = FIRST_PROBE_SECONDS
    due: float = 0.0


class Probes:
    """Small messages behind those that wait for long; at most one for each is under way."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._probes: dict[str, _Probe] = {}

    def find_lost(self, pending: dict[str, Message]) -> list[str]:
        """Send what is due, and return which messages wait though a later one was answered.

        A reply can have come since the caller last asked for it, so it has to ask once more.

        Args:
            pending: the messages that wait for a reply, by their ids.
        """
        now = time.monotonic()
        for message_id in set(self._probes) - set(pending):
            del self._probes[message_id]
        for message_id, message in pending.items():
            probe = self._probes.setdefault(message_id, _Probe(due=now + FIRST_PROBE_SECONDS))
            if not probe.message_id and now >= probe.due:
                probe.message_id = self._send(message.metadata.dst_node_id)
        under_way = {p.message_id: i for i, p in self._probes.items() if p.message_id}
        answered = self._grid.pull_messages(list(under_way)) if under_way else []
        lost = []
        for reply in answered:
            message_id = under_way[reply.metadata.reply_to_message_id]
            if reply.has_error():  # the node is gone, which Flower says of the message itself too
                probe = self._probes[message_id]
                probe.message_id = ""
                probe.wait = min(2 * probe.wait, LONGEST_PROBE_SECONDS)
                probe.due = now + probe.wait
            else:
                del self._probes[message_id]
                lost.append(message_id)
        return lost

    def _send(self, node_id: int) -> str:
        return next(iter(self._grid.push_messages([build_probe(node_id)])), None) or ""
