"""Which node is which client: waiting for nodes, and asking them before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.federation.grid import PacedGrid, build_message
from fedlora_app.federation.messages import (
    REGISTRATION_ROUND,
    MessageError,
    Reply,
    Task,
    build_task_content,
    read_reply,
    require_counts,
)

DECLARED_DEFAULTS = {("config", "conf/demo.yaml"), ("output-dir", "results")}  # pyproject.toml
CONNECT_REPORT_SECONDS = 30.0


def register_clients(
    grid: PacedGrid, config: Config, task: Task, run_config: dict[str, Any]
) -> dict[str, tuple[int, Reply]]:
    """Have every node register; return each client's node and report.

    Raises:
        ConfigError: too many or too few nodes, or two nodes that are one client.
        MessageError: with what every client found wrong, together.
    """
    node_ids = wait_for_nodes(grid, len(config.federated.clients), run_config)
    content = build_task_content(task)
    messages = (build_message(content, MessageType.QUERY, node) for node in node_ids)
    registered: dict[str, tuple[int, Reply]] = {}

    def read(message: Message) -> None:
        reply = read_reply(message, None, REGISTRATION_ROUND)
        config.client(reply.client_id)  # raises where the experiment has none of that id
        require_counts(reply)
        if reply.client_id in registered:
            raise MessageError(
                f'Two nodes are the client "{reply.client_id}". Give each SuperNode its own '
                "client-id."
            )
        registered[reply.client_id] = (message.metadata.src_node_id, reply)

    if faults := collect_faults(grid, messages, read):
        listing = "\n".join(sorted(set(faults)))
        raise MessageError(f"The run cannot start:\n{listing}")
    return registered


def collect_faults(
    grid: Grid, messages: Iterable[Message], read: Callable[[Message], None]
) -> list[str]:
    """Send messages, give every reply to ``read``, and return what it raised as ``ValueError``.

    So all that is wrong is known at once, and not only the first of it.
    """
    faults = []
    for message in grid.send_and_receive(messages):
        try:
            read(message)
        except ValueError as error:
            faults.append(str(error))
    return faults


def wait_for_nodes(grid: PacedGrid, num_clients: int, run_config: dict[str, Any]) -> list[int]:
    """Return the nodes, waiting for SuperNodes to connect; a simulation has all it gets."""
    simulated = is_simulation(grid)
    reported = 0.0
    while True:
        node_ids = sorted(grid.get_node_ids())
        if len(node_ids) > num_clients or (simulated and len(node_ids) != num_clients):
            text = f"The federation has {len(node_ids)} nodes and federated.clients names "
            text += f"{num_clients}. "
            if not simulated:
                raise ConfigError(f"{text}Stop the SuperNodes that do not take part.")
            raise ConfigError(f"{text}Run:\n  {command_for(num_clients, run_config)}")
        if len(node_ids) == num_clients:
            return node_ids
        if time.monotonic() - reported > CONNECT_REPORT_SECONDS:
            reported = time.monotonic()
            print(f"Waiting for {num_clients - len(node_ids)} more SuperNodes.", flush=True)
        time.sleep(1)


def is_simulation(grid: PacedGrid) -> bool:
    """Return whether Flower simulates the nodes in this process."""
    return type(grid.unwrapped).__name__ == "InMemoryGrid"


def command_for(num_nodes: int, run_config: dict[str, Any]) -> str:
    """Return the same run's command line with the right number of nodes."""
    given = " ".join(
        f"{key}={value}" if isinstance(value, int) else f"{key}='{value}'"
        for key, value in run_config.items()
        if value not in ("", 0) and (key, value) not in DECLARED_DEFAULTS
    )
    settings = f' --run-config "{given}"' if given else ""
    return f'flwr run . --stream --federation-config "num-supernodes={num_nodes}"{settings}'
