"""A Flower grid that serves a bounded number of clients at a time and waits for each.

Flower's own ``send_and_receive`` sends every message at once and drops whoever has not
answered when a fixed timeout ends. With one GPU the clients wait for each other, so that a
long round would silently lose some of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora_app.foundation.progress import format_duration

FIRST_POLL_SECONDS = 0.02
LONGEST_POLL_SECONDS = 0.5
WAITING_REPORT_SECONDS = 600.0
PULLED_AT_ONCE = 4  # replies, each of which may bring an update of hundreds of megabytes
TIME_TO_LIVE_SECONDS = 10 * 365 * 24 * 3600.0
REGISTRATION_SECONDS = 600.0  # at least: Ray starts and libraries are imported meanwhile
REFUSED = (
    "Flower did not accept the message for it. Its SuperNode is gone, or the message is too "
    "large; the log has more"
)


class Workers(Protocol):
    """The processes of a simulation, which take one message after another."""

    def started_at(self, message_id: str) -> float | None:
        """Return when a worker got the message, by the monotonic clock; None if none has it."""

    def stop(self, message_id: str) -> bool:
        """Kill the worker that deals with the message; return whether there was one."""


class PacedGrid(Grid):
    """A grid that yields replies as they arrive and only then sends further messages.

    Args:
        client_timeout_seconds: after which a client has failed; None waits forever. In a
            simulation it counts from where a worker takes the client's message.
        find_workers: returns a simulation's workers once there are any, else None.
    """

    def __init__(
        self,
        grid: Grid,
        clients_at_once: int,
        client_timeout_seconds: float | None = None,
        find_workers: Callable[[], Workers | None] = lambda: None,
    ) -> None:
        self.unwrapped = grid
        self._clients_at_once = clients_at_once
        self._client_timeout_seconds = client_timeout_seconds or math.inf
        self._find_workers = find_workers
        self.names: dict[int, str] = {}
        self.watch: Callable[[Message, Message | None], None] = lambda request, reply: None
        """Is told of every message that was sent, and again with its reply or what came of it."""
        self.has_running_clients = False  # that were given up and could not be stopped
        self._reported = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the replies one by one, an error in place of one that does not arrive.

        ``timeout``, Flower's one for all clients together, is ignored.
        """
        waiting_messages = iter(messages)
        pending: dict[str, Message] = {}
        asked_at: dict[str, float] = {}
        started_at: dict[str, float] = {}
        pause = FIRST_POLL_SECONDS
        while True:
            while len(pending) < self._clients_at_once:
                message = next(waiting_messages, None)
                if message is None:
                    break
                message_id = self._push(message)
                if message_id:
                    self.watch(message, None)
                    pending[message_id], asked_at[message_id] = message, time.monotonic()
                else:
                    yield self._watched(message, _fail(message, REFUSED))
            if not pending:
                return
            asked, has_come = list(pending), False
            for start in range(0, len(asked), PULLED_AT_ONCE):
                pulled = asked[start : start + PULLED_AT_ONCE]
                replies = list(self.unwrapped.pull_messages(pulled))
                has_come |= bool(replies)
                while replies:  # no name is left for a reply, so that its update can be freed
                    request = pending.pop(replies[0].metadata.reply_to_message_id, None)
                    if request is None:
                        replies.pop(0)
                    else:
                        yield self._watched(request, _as_from_its_client(replies.pop(0), request))
            if has_come:  # others may have come while these were dealt with
                pause = FIRST_POLL_SECONDS
                continue
            self._note_starts(pending, asked_at, started_at)
            for message_id in [i for i in pending if self._is_late(pending[i], started_at.get(i))]:
                request = pending.pop(message_id)
                yield self._watched(request, self._give_up(message_id, request))
            busy = {i: started_at[i] for i in pending if i in started_at}
            self._report_waiting(pending, busy or asked_at)
            pause = min(1.2 * pause, LONGEST_POLL_SECONDS)
            time.sleep(pause)

    def _note_starts(
        self, pending: dict[str, Message], asked_at: dict[str, float], started_at: dict[str, float]
    ) -> None:
        """Record when each client can have started; in a simulation it may wait for a worker."""
        workers = self._find_workers()
        for message_id in pending:
            if message_id not in started_at:
                start = workers.started_at(message_id) if workers else asked_at[message_id]
                if start is not None:
                    started_at[message_id] = start

    def _report_waiting(self, pending: dict[str, Message], since: dict[str, float]) -> None:
        """Report from time to time which clients have not replied for long."""
        now = time.monotonic()
        if not pending or now - self._reported < WAITING_REPORT_SECONDS:
            return
        start, message = min((since[i], i) for i in pending if i in since)
        if now - start >= WAITING_REPORT_SECONDS:
            node = pending[message].metadata.dst_node_id
            name = self.names.get(node, f"node {node}")
            print(f"Still waiting for {name}, {format_duration(now - start)}.", flush=True)
            self._reported = now

    def _limit(self, request: Message) -> float:
        """Return how many seconds the client has to reply."""
        if request.metadata.message_type == MessageType.QUERY:
            return max(self._client_timeout_seconds, REGISTRATION_SECONDS)
        return self._client_timeout_seconds

    def _is_late(self, request: Message, started_at: float | None) -> bool:
        if started_at is None:
            return False
        return time.monotonic() - started_at > self._limit(request)

    def _give_up(self, message_id: str, request: Message) -> Message:
        """Return an error in place of the reply, and stop the client's work where possible."""
        workers = self._find_workers()
        if workers is None or not workers.stop(message_id):
            self.has_running_clients = True
        limit = self._limit(request)
        is_set = limit == self._client_timeout_seconds
        what = "federated.client_timeout_seconds" if is_set else "the least for a registration"
        return _fail(request, f"no answer within {limit:g} seconds ({what})")

    def _watched(self, request: Message, reply: Message) -> Message:
        self.watch(request, reply)
        return reply

    def _push(self, message: Message) -> str | None:
        """Return the message's id; Flower has none, or an empty one, for what it refuses."""
        return next(iter(self.unwrapped.push_messages([message])), None)

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


def _fail(request: Message, why: str) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, why), reply_to=request)


def build_message(content: RecordDict, message_type: str, node_id: int) -> Message:
    """Return a message that does not expire while its client waits for its turn."""
    return Message(
        content, dst_node_id=node_id, message_type=message_type, ttl=TIME_TO_LIVE_SECONDS
    )
