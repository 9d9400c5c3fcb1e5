"""A Flower grid that serves a bounded number of clients at a time and waits for each.

Flower's own ``send_and_receive`` sends every message at once and drops whoever has not
answered when a fixed timeout ends. With one GPU the clients wait for each other, so that a
long round would lose some of them without a word.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora_app.progress import format_duration

FIRST_POLL_SECONDS = 0.02
LONGEST_POLL_SECONDS = 0.5
WAITING_REPORT_SECONDS = 600.0
TIME_TO_LIVE_SECONDS = 10 * 365 * 24 * 3600.0


class PacedGrid(Grid):
    """Wraps a grid; replies are yielded as they come, and only then are others asked.

    Args:
        client_timeout_seconds: after which a client has failed; None waits for ever.
    """

    def __init__(
        self, grid: Grid, clients_at_once: int, client_timeout_seconds: float | None = None
    ) -> None:
        self.unwrapped = grid
        self._clients_at_once = clients_at_once
        self._client_timeout_seconds = client_timeout_seconds or math.inf
        self.names: dict[int, str] = {}
        self._reported = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the replies one by one, an error in the place of one that does not come.

        ``timeout``, Flower's one for all clients together, is ignored.
        """
        waiting_messages = iter(messages)
        pending: dict[str, Message] = {}
        asked_at: dict[str, float] = {}
        pause = FIRST_POLL_SECONDS
        while True:
            while len(pending) < self._clients_at_once:
                message = next(waiting_messages, None)
                if message is None:
                    break
                message_id = self._push(message)
                pending[message_id], asked_at[message_id] = message, time.monotonic()
            if not pending:
                return
            replies = list(self.unwrapped.pull_messages(list(pending)))
            has_come = bool(replies)
            while replies:  # no name is left for a reply, so that its update can be freed
                request = pending.pop(replies[0].metadata.reply_to_message_id, None)
                if request is None:
                    replies.pop(0)
                else:
                    yield _as_from_its_client(replies.pop(0), request)
            if has_come:  # others may have come while these were dealt with
                pause = FIRST_POLL_SECONDS
                continue
            for message_id in [i for i in pending if self._is_late(asked_at[i])]:
                yield self._give_up(pending.pop(message_id))
            self._report_waiting(pending, asked_at)
            pause = min(1.2 * pause, LONGEST_POLL_SECONDS)
            time.sleep(pause)

    def _report_waiting(self, pending: dict[str, Message], asked_at: dict[str, float]) -> None:
        """Say now and then who has been asked for long, so that a silent client is seen."""
        now = time.monotonic()
        if not pending or now - self._reported < WAITING_REPORT_SECONDS:
            return
        since, message = min((asked_at[i], i) for i in pending)
        if now - since >= WAITING_REPORT_SECONDS:
            node = pending[message].metadata.dst_node_id
            name = self.names.get(node, f"node {node}")
            print(f"Still waiting for {name}, {format_duration(now - since)}.", flush=True)
            self._reported = now

    def _is_late(self, asked_at: float) -> bool:
        return time.monotonic() - asked_at > self._client_timeout_seconds

    def _give_up(self, request: Message) -> Message:
        why = (
            f"no answer within {self._client_timeout_seconds:g} seconds "
            "(federated.client_timeout_seconds)"
        )
        return Message(Error(ErrorCode.NODE_UNAVAILABLE, why), reply_to=request)

    def _push(self, message: Message) -> str:
        ids = list(self.unwrapped.push_messages([message]))
        if not ids:
            raise ConnectionError(
                f"Flower did not accept a message for node {message.metadata.dst_node_id}."
            )
        return ids[0]

    def set_run(self, run):  # noqa: D102
        self.unwrapped.set_run(run)

    @property
    def run(self):  # noqa: D102
        return self.unwrapped.run

    def create_message(self, *args, **kwargs):  # noqa: D102
        return self.unwrapped.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:  # noqa: D102
        return self.unwrapped.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: D102
        return self.unwrapped.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: D102
        return self.unwrapped.pull_messages(message_ids)


def _as_from_its_client(reply: Message, request: Message) -> Message:
    """Return the reply; Flower's own error replies come from the SuperLink and not the node."""
    if not reply.has_error():
        return reply
    return Message(reply.error, reply_to=request)


def build_message(content: RecordDict, message_type: str, node_id: int) -> Message:
    """Return a message that does not expire while its client waits for its turn."""
    return Message(
        content, dst_node_id=node_id, message_type=message_type, ttl=TIME_TO_LIVE_SECONDS
    )
