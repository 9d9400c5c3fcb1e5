"""A federation in one process: the real apps, strategy and messages without Ray.

``LoopbackGrid`` hands each message to the ClientApp and keeps a copy of what passed, which
is what the tests on "what leaves a client" search. Tests marked as such run Flower's own
simulation instead.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlora_app import client_app, server_app
from fedlora_app.config.schema import Config
from fedlora_app.federation.messages import ABOUT_RECORD, NEEDS, OWN_SETTINGS


class LoopbackGrid(Grid):
    """Delivers a message when it is pushed and returns the reply when it is pulled.

    Its class is not Flower's InMemoryGrid, so the server takes it for a deployment.
    """

    def __init__(self, contexts: dict[int, Context]) -> None:
        self.contexts = contexts
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self.tamper = lambda message, reply: reply
        self.refused: set[int] = set()  # nodes that are gone
        self._replies: dict[str, Message] = {}

    def get_node_ids(self):
        return [node for node in self.contexts if node not in self.refused]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.refused:
                ids.append("")
                continue
            number = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            self.sent.append(message)
            context = self.contexts[message.metadata.dst_node_id]
            reply = client_app.app(message, context)
            if not asks_for_settings(reply):  # which is before all that a run does
                reply = self.tamper(message, reply)
            if reply is not None:
                self.received.append(reply)
                self._replies[number] = reply
            ids.append(number)
        return ids

    def pull_messages(self, message_ids):
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def bytes_sent(self) -> bytes:
        """Everything that the server sent, serialised as it would be for the wire."""
        return b"".join(map(_serialise, self.sent))

    def bytes_sent_to(self, node: int) -> bytes:
        """Everything that one node got, likewise."""
        messages = (m for m in self.sent if m.metadata.dst_node_id == node)
        return b"".join(map(_serialise, messages))

    def bytes_received(self) -> bytes:
        """Everything that clients sent, likewise."""
        return b"".join(map(_serialise, self.received))


def asks_for_settings(reply: Message) -> bool:
    """Whether a client without a file of its own asks for its own settings."""
    about = reply.content.config_records.get(ABOUT_RECORD, {}) if reply.has_content() else {}
    return json.loads(about.get("facts", "{}")).get(NEEDS) == OWN_SETTINGS


def _serialise(message: Message) -> bytes:
    return recorddict_to_proto(message.content).SerializeToString()


@dataclass
class Federation:
    """A project folder, where runs go, and the experiment."""

    project: Path
    output_dir: Path
    config: Config
    grids: list[LoopbackGrid] = field(default_factory=list)
    own_files: dict[str, Path] = field(default_factory=dict)
    """Of clients that have a file of their own."""
    grid_class: type[LoopbackGrid] = LoopbackGrid

    @property
    def path(self) -> Path:
        """The run directory, by its usual name."""
        return self.output_dir / "run"

    def run(
        self,
        name: str = "run",
        config: Config | None = None,
        tamper=None,
        gone: frozenset[int] = frozenset(),
        report: bool = False,
        **run_config,
    ) -> Path:
        """Run the experiment through both apps and return the run directory.

        The report at its end takes longer than a tiny run, so it is only written on demand.

        Args:
            gone: nodes that are not there when it begins.
        """
        config = config or self.config
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        config_path = self.project / f"{name}.yaml"
        config_path.write_text(json.dumps(config.dump()))
        node_ids = range(11, 11 + len(config.federated.clients))
        grid = self.grid_class(
            {
                node: Context(
                    run_id=1,
                    node_id=node,
                    node_config=self.node_config(client.id),
                    state=RecordDict(),
                    run_config={},
                )
                for node, client in zip(node_ids, config.federated.clients, strict=True)
            }
        )
        grid.refused |= gone
        if tamper is not None:
            grid.tamper = tamper
        self.grids.append(grid)
        with nullcontext() if report else mock.patch.object(server_app, "report_run"):
            server_app.main(grid, self.server_context(config_path, name, **run_config))
        return self.output_dir / name

    def node_config(self, client: str) -> dict[str, str]:
        """Return what a client's SuperNode is started with."""
        if client in self.own_files:
            return {"client-file": str(self.own_files[client])}
        return {
            "client-id": client,
            "project-dir": str(self.project),
            "output-dir": str(self.output_dir),
        }

    def server_context(self, config_path: Path, name: str, **changes) -> Context:
        """Return the ServerApp's context with its run configuration."""
        run_config = {
            "config": str(config_path),
            "num-rounds": 0,
            "mode": "",
            "output-dir": str(self.output_dir),
            "run-name": "" if "resume" in changes else name,
            "resume": "",
            "overrides": "",
        }
        return Context(1, 1, {}, RecordDict(), run_config | changes)


def wait_until(condition, seconds: float = 30.0) -> None:
    """Poll a condition; fail when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("The condition did not come true in time.")
        time.sleep(0.05)
