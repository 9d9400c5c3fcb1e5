"""A Flower grid that serves a bounded number of clients at a time and waits for each.

Flower's own ``send_and_receive`` sends every message at once and drops whoever has not
answered when a fixed timeout ends. With one GPU the clients wait for each other, so that a
long round would silently lose some of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import Error, Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora_app.federation.messages import build_message
from fedlora_app.federation.presence import Presence
from fedlora_app.federation.probes import Probes
from fedlora_app.foundation.progress import format_duration

FIRST_POLL_SECONDS = 0.02
LONGEST_POLL_SECONDS = 0.5
WAITING_REPORT_SECONDS = 600.0
MOST_ATTEMPTS = 3  # with a message whose process is lost with it
PULLED_AT_ONCE = 4  # replies, each of which may bring an update of hundreds of megabytes
REGISTRATION_SECONDS = 600.0  # at least: Ray starts and libraries are imported meanwhile
REFUSED = (
    "Flower did not accept the message for it. Its SuperNode is gone, or the message is too "
    "large; the log has more"
)
LOST = f"its SuperNode has lost the message {MOST_ATTEMPTS} times; its log may say why"


@dataclass
class _Asked:
    """A message that waits for its reply; times are of the monotonic clock."""

    message: Message
    at: float
    started_at: float | None = None
    attempts: int = 1

    @property
    def node(self) -> int:
        """Whom it is for."""
        return self.message.metadata.dst_node_id


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
        reconnect_seconds: a node that is gone is waited for so long. Simulated nodes never are.
        find_owners: returns which client each node is by its key, of those that take part; None
            where nodes are not known by keys.
    """

    def __init__(
        self,
        grid: Grid,
        clients_at_once: int,
        client_timeout_seconds: float | None = None,
        find_workers: Callable[[], Workers | None] = lambda: None,
        reconnect_seconds: float = 0.0,
        find_owners: Callable[[], Mapping[int, str] | None] = lambda: None,
    ) -> None:
        self.unwrapped = grid
        self._probes = None if self.is_simulation else Probes(grid)
        self._reconnect_seconds = 0.0 if self.is_simulation else reconnect_seconds
        self._presence = Presence(grid, self._reconnect_seconds, self._tell_gone)
        self._clients_at_once = clients_at_once
        self._client_timeout_seconds = client_timeout_seconds or math.inf
        self._find_workers = find_workers
        self._find_owners = find_owners
        self.owners: Mapping[int, str] | None = None
        """Which client each node is by its key; None where no keys are known."""
        self.names: dict[int, str] = {}
        self.watch: Callable[[Message, Message | None], None] = lambda request, reply: None
        """Is told of every message that was sent, and again with its reply or what came of it."""
        self.has_running_clients = False  # that were given up and could not be stopped
        self._reported = 0.0

    @property
    def is_simulation(self) -> bool:
        """Whether Flower simulates the nodes in this process."""
        return type(self.unwrapped).__name__ == "InMemoryGrid"

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the replies one by one, an error in place of one that does not arrive.

        ``timeout``, Flower's one for all clients together, is ignored.
        """
        waiting_messages = iter(messages)
        pending: dict[str, _Asked] = {}
        awaited: set[int] = set()
        suspected: list[str] = []
        pause = FIRST_POLL_SECONDS
        while True:
            while sum(a.node not in awaited for a in pending.values()) < self._clients_at_once:
                message = next(waiting_messages, None)
                if message is None:
                    break
                message_id = self._push(message)
                if message_id:
                    self.watch(message, None)
                    pending[message_id] = _Asked(message, time.monotonic())
                else:
                    yield self._watched(message, _fail(message, REFUSED))
            if not pending:
                return
            awaited = self._presence.find_awaited({asked.node for asked in pending.values()})
            asked_for = [i for i, asked in pending.items() if asked.node not in awaited]
            num_pending = len(pending)
            yield from self._collect(pending, asked_for)
            has_come = len(pending) < num_pending
            if has_come:  # others may have come while these were dealt with
                pause = FIRST_POLL_SECONDS
                continue
            # Of those that were asked for once more since, and no reply had come after all:
            for message_id in sorted(pending.keys() & suspected & set(asked_for)):
                asked = pending.pop(message_id)
                if again := self._ask_again(asked):
                    pending.update(again)
                else:
                    yield self._watched(asked.message, _fail(asked.message, LOST))
            suspected = self._find_suspects({i: pending[i] for i in asked_for if i in pending})
            self._note_starts(pending)
            for message_id in [i for i, asked in pending.items() if self._is_late(asked)]:
                request = pending.pop(message_id).message
                yield self._watched(request, self._give_up(message_id, request))
            self._report_waiting(pending)
            pause = min(1.2 * pause, LONGEST_POLL_SECONDS)
            time.sleep(pause)

    def _collect(self, pending: dict[str, _Asked], asked_for: list[str]) -> Iterator[Message]:
        """Yield the replies that have come, and take what they answer out of ``pending``."""
        for start in range(0, len(asked_for), PULLED_AT_ONCE):
            replies = list(self.unwrapped.pull_messages(asked_for[start : start + PULLED_AT_ONCE]))
            while replies:  # no name is left for a reply, so that its update can be freed
                asked = pending.pop(replies[0].metadata.reply_to_message_id, None)
                if asked is None:
                    replies.pop(0)
                elif again := self._send_dropped(asked, replies[0]):
                    pending.update(again)
                    replies.pop(0)
                else:
                    yield self._watched(
                        asked.message, _as_from_its_client(replies.pop(0), asked.message)
                    )

    def _send_dropped(self, asked: _Asked, reply: Message) -> dict[str, _Asked]:
        """Send a message once more that Flower dropped because its node went just before."""
        is_dropped = reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
        if is_dropped and self._presence.find_awaited({asked.node}):
            return self._send_again(asked)
        return {}

    def _find_suspects(self, pending: dict[str, _Asked]) -> list[str]:
        """Return which messages a node seems to have lost with its process."""
        if self._probes is None:
            return []
        return self._probes.find_lost({i: asked.message for i, asked in pending.items()})

    def _ask_again(self, asked: _Asked) -> dict[str, _Asked]:
        """Send a message that was lost once more; return it by its new id, nothing to give up."""
        if asked.attempts == MOST_ATTEMPTS:
            return {}
        why = "it has restarted, or the line was cut"
        name = self._name(asked.node)
        print(f"{name}: its SuperNode has lost the message ({why}). Sent again.", flush=True)
        return self._send_again(replace(asked, attempts=asked.attempts + 1))

    def _send_again(self, asked: _Asked) -> dict[str, _Asked]:
        about = asked.message.metadata
        again = build_message(asked.message.content, about.message_type, about.dst_node_id)
        if not (message_id := self._push(again)):
            return {}
        self.watch(again, None)
        return {message_id: replace(asked, message=again)}

    def _note_starts(self, pending: dict[str, _Asked]) -> None:
        """Record when each client can have started; in a simulation it may wait for a worker."""
        workers = self._find_workers()
        for message_id, asked in pending.items():
            if asked.started_at is None:
                asked.started_at = workers.started_at(message_id) if workers else asked.at

    def _report_waiting(self, pending: dict[str, _Asked]) -> None:
        """Report from time to time which clients have not replied for long."""
        now = time.monotonic()
        if not pending or now - self._reported < WAITING_REPORT_SECONDS:
            return
        busy = [asked for asked in pending.values() if asked.started_at is not None]
        longest = min(busy or pending.values(), key=lambda asked: asked.started_at or asked.at)
        waited = now - (longest.started_at or longest.at)
        if waited >= WAITING_REPORT_SECONDS:
            name = self._name(longest.node)
            print(f"Still waiting for {name}, {format_duration(waited)}.", flush=True)
            self._reported = now

    def _tell_gone(self, node: int) -> None:
        limit = f"{self._reconnect_seconds:g} seconds (federated.reconnect_seconds)"
        print(f"{self._name(node)}: its SuperNode is gone; waiting {limit}.", flush=True)

    def _name(self, node: int) -> str:
        return self.names.get(node, f"node {node}")

    def _limit(self, request: Message) -> float:
        """Return how many seconds the client has to reply."""
        if request.metadata.message_type == MessageType.QUERY:
            return max(self._client_timeout_seconds, REGISTRATION_SECONDS)
        return self._client_timeout_seconds

    def _is_late(self, asked: _Asked) -> bool:
        if asked.started_at is None:
            return False
        return time.monotonic() - asked.started_at > self._limit(asked.message)

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

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there and take part; all, where they are not known by keys."""
        self.owners = self._find_owners()
        nodes = self.unwrapped.get_node_ids()
        return nodes if self.owners is None else [node for node in nodes if node in self.owners]

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
