"""A grid whose clients live in another process: messages pass through a pipe, serialised.

Arrays follow their message one by one, much as Flower's SuperLink passes them on in pieces, so
that no process holds a message in several forms at a time.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE_ID = 11


class PipeGrid(Grid):
    """Passes serialised messages to the clients' process, and keeps none of them.

    Args:
        on_message: called with each message before it is sent.
    """

    def __init__(
        self,
        clients: Connection,
        num_nodes: int,
        on_message: Callable[[Message], None] = lambda message: None,
    ) -> None:
        self._clients = clients
        self._num_nodes = num_nodes
        self._on_message = on_message
        self._replies: dict[str, Message] = {}
        self._number = 0

    def get_node_ids(self):  # noqa: D102
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_nodes)

    def push_messages(self, messages):  # noqa: D102
        ids = []
        for message in messages:
            self._on_message(message)
            self._number += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._number}"
            _send(self._clients, message)
            self._replies[message.metadata.message_id] = _receive(self._clients)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids):  # noqa: D102
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def set_run(self, run):  # noqa: D102
        raise NotImplementedError

    @property
    def run(self):  # noqa: D102
        raise NotImplementedError

    def create_message(self, *args, **kwargs):  # noqa: D102
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):  # noqa: D102
        raise NotImplementedError


@contextmanager
def start_clients(
    serve: Callable[..., None], *arguments: object
) -> Iterator[tuple[Connection, int]]:
    """Run ``serve(connection, *arguments)`` in a process; yield the other end and its pid."""
    identify_process()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    clients = spawn.Process(target=serve, args=(there, *arguments), daemon=True)
    clients.start()
    there.close()
    try:
        yield here, clients.pid
    finally:
        here.close()
        clients.join(timeout=30)


def answer_messages(server: Connection, answer: Callable[[Message], Message]) -> None:
    """Answer messages until the server hangs up. Runs in the clients' process."""
    identify_process()
    while True:
        try:
            message = _receive(server)
        except EOFError:
            return
        _send(server, answer(message))


def _send(peer: Connection, message: Message) -> None:
    """Send a message without its arrays, and then each of those."""
    content = message.content
    bare = RecordDict({**content.metric_records, **content.config_records})
    arrays = [
        (name, key, array)
        for name, record in content.array_records.items()
        for key, array in record.items()
    ]
    message.content = bare
    try:
        peer.send_bytes(message_to_proto(message).SerializeToString())
    finally:
        message.content = content
    peer.send_bytes(json.dumps([name for name in content.array_records]).encode())
    peer.send_bytes(str(len(arrays)).encode())
    for name, key, array in arrays:
        peer.send_bytes(json.dumps([name, key, array.dtype, array.shape, array.stype]).encode())
        peer.send_bytes(array.data)


def _receive(peer: Connection) -> Message:
    message = message_from_proto(ProtoMessage.FromString(peer.recv_bytes()))
    for name in json.loads(peer.recv_bytes()):
        message.content[name] = ArrayRecord()
    for _ in range(int(peer.recv_bytes())):
        name, key, dtype, shape, stype = json.loads(peer.recv_bytes())
        message.content[name][key] = Array(dtype, tuple(shape), stype, peer.recv_bytes())
    return message


def identify_process() -> None:
    """Have Flower's messages be made outside of a Flower run."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
