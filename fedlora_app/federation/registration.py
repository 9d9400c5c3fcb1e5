"""Which node is which client, and what it has, asked before anything is trained.

Every node registers when a run starts; those that resume a run also check what they have kept;
and a node that restarts in the middle of a run is a new one to Flower, and registers again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora_app.config.run_config import format_run_config
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.federation.grid import PacedGrid, build_message
from fedlora_app.federation.messages import (
    REGISTRATION_ROUND,
    MessageError,
    Task,
    build_task_content,
    read_reason,
)
from fedlora_app.federation.replies import (
    Reply,
    RoundError,
    read_reply,
    require_counts,
    require_facts,
    require_same_base,
)
from fedlora_app.federation.roster import Roster
from fedlora_app.foundation.terminal import shell

CONNECT_REPORT_SECONDS = 30.0


def register_clients(
    grid: PacedGrid,
    config: Config,
    task: Task,
    run_config: dict[str, Any],
    known_faults: Sequence[str] = (),
    to_come: Collection[str] = (),
    taken_part: Collection[str] = (),
) -> dict[str, tuple[int, Reply]]:
    """Have every node register; return each client's node and report.

    Args:
        known_faults: why the run cannot start whatever the clients say. Those who are there are
            asked all the same, so that everything is known at once; nobody is waited for.
        to_come: clients that take part in some of the rounds to come, who are waited for; empty:
            all.
        taken_part: those of them without which a run cannot resume.

    Raises:
        ConfigError: too many or too few nodes, or two nodes that are one client.
        MessageError: with what the server and every client found wrong, together.
    """
    to_come = set(to_come or config.client_ids)
    is_complete = grid.is_simulation or len(set(grid.get_node_ids())) >= len(to_come)
    if known_faults and not is_complete:
        raise _refuse(known_faults)
    try:
        node_ids = wait_for_nodes(grid, config, run_config, to_come)
    except ConfigError as error:
        raise ConfigError("\n".join([*known_faults, str(error)])) from None
    registered: dict[str, tuple[int, Reply]] = {}

    def accept(reply: Reply, node: int) -> None:
        require_counts(reply)
        if reply.client_id in registered:
            raise MessageError(
                f'Two nodes are the client "{reply.client_id}". Give each SuperNode its own '
                "client-id."
            )
        registered[reply.client_id] = (node, reply)

    # Simulated nodes share the server's disk, where all settings lie.
    of = config.client_ids if grid.is_simulation else []
    found, lost = _ask_who(grid, node_ids, task, config, accept, of)
    if len(registered) < min(config.federated.required_clients, len(to_come)):
        found += lost
    else:
        for sentence in lost:  # a node that went is a client that is not there
            print(sentence, flush=True)
    faults = [_leave_out(known_faults, fault) for fault in found]
    if faults or known_faults:
        raise _refuse([*known_faults, *sorted(set(filter(None, faults)))])
    if gone := sorted(set(taken_part) - set(registered)):
        raise _refuse(
            [f"{client}: it has taken part, and its SuperNode is not there." for client in gone]
        )
    for client in sorted(to_come - set(registered)):
        print(f"{client} is not there, and is taken in as soon as it is.", flush=True)
    return registered


def _ask_who(
    grid: Grid,
    nodes: Iterable[int],
    task: Task,
    config: Config,
    accept: Callable[[Reply, int], None],
    of: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Have nodes register, whoever they are.

    Nobody's own settings travel before it is known who a node is. One without a file of its own
    then asks for them, and gets the same message with its own and nobody else's.

    Args:
        accept: is given a client's registration and its node; raises ``ValueError`` where it
            cannot be.
        of: the clients whose settings every node gets at once.

    Returns:
        What is wrong with replies, and which nodes did not reply.
    """
    needing: dict[int, str] = {}
    lost: list[str] = []

    def read(message: Message) -> None:
        node = message.metadata.src_node_id
        if message.has_error():
            name = (getattr(grid, "owners", None) or {}).get(node, f"node {node}")
            lost.append(f"{name}: {read_reason(message.error.reason)}")
            return
        reply = read_reply(message, None, REGISTRATION_ROUND)
        entry = config.entry(reply.client_id)  # raises where the experiment has none of that id
        owners = getattr(grid, "owners", None)
        if owners is not None and owners.get(node) != reply.client_id:
            raise MessageError(
                f"Node {node} says that it is {reply.client_id}, and its key is "
                f"{owners.get(node)}'s. The client.yaml of a site names the site's own id."
            )
        if not reply.needs_settings:
            accept(reply, node)
        elif entry.is_bare or node in needing:
            raise MessageError(
                f"{reply.client_id}: its node has no file of its own, and the experiment names no "
                "system_prompt and no local_train for it. Start its SuperNode with --node-config "
                "'client-file=\"/path/to/client.yaml\"', or name both."
            )
        else:
            needing[node] = reply.client_id

    content = build_task_content(task, of=of)
    faults = collect_faults(
        grid, (build_message(content, MessageType.QUERY, node) for node in nodes), read
    )
    again = [
        build_message(build_task_content(task, of=[client]), MessageType.QUERY, node)
        for node, client in needing.items()
    ]
    return faults + collect_faults(grid, again, read), lost


def read_report(metrics: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, Any]:
    """Return what a client said of itself, with its list of findings about the data."""
    return {**metrics, **facts, "findings": json.loads(facts.get("findings", "[]"))}


def _refuse(faults: Iterable[str]) -> MessageError:
    return MessageError("\n".join(["The run cannot start:", *faults]))


def _leave_out(known_faults: Iterable[str], fault: str) -> str:
    """Return what a client found wrong without what the server found wrong itself."""
    for known in known_faults:
        fault = fault.replace(known, "").strip()
    return "" if fault.endswith(":") else fault  # nothing but whose it was


def verify_clients(
    grid: Grid, messages: Iterable[Message], roster: Roster, base_model: dict[str, Any]
) -> list[str]:
    """Have clients check what they have kept of a run that resumes; return what is wrong.

    Args:
        base_model: what the run has recorded of it, into which a fingerprint is entered.
    """

    def read(message: Message) -> None:
        client = roster.sender(message)
        reply = read_reply(message, client, REGISTRATION_ROUND)
        require_facts(["base_model"], reply)
        require_same_base(base_model, {client: reply.facts["base_model"]})
        roster.note_global(client, reply.facts.get("global_adapter", ""))

    return collect_faults(grid, messages, read)


def settle_clients(
    grid: Grid, roster: Roster, task: Task, clients: list[str]
) -> tuple[set[str], list[str]]:
    """Have clients keep the adapters that the roster names as those to use.

    Returns:
        Who has done so, and what is wrong with the others.
    """
    final = replace(task, is_final=True)
    messages = roster.messages(final, MessageType.QUERY, clients, lambda client: None)
    settled = set()

    def read(message: Message) -> None:
        client = roster.sender(message)
        read_reply(message, client, REGISTRATION_ROUND)
        settled.add(client)

    return settled, collect_faults(grid, messages, read)


def find_returned(
    grid: Grid,
    roster: Roster,
    task: Task,
    config: Config,
    absent: set[str],
    accept: Callable[[Reply, int], None],
) -> list[str]:
    """Have new nodes register, as whichever absent client they are; return what is wrong.

    A SuperNode without a registered key that restarts is another node to Flower; and one may come
    that was not there when the run began.

    Args:
        absent: the clients that returned no valid results in the last round.
        accept: is given a client that is back, and its node; raises ``ValueError`` where the
            client is not what it was.
    """
    new = sorted(set(grid.get_node_ids()) - set(roster.nodes.values()))

    def take_back(reply: Reply, node: int) -> None:
        if reply.client_id not in absent:
            raise MessageError(f"Node {node} is {reply.client_id}, which is not missing.")
        accept(reply, node)
        roster.move(reply.client_id, node)
        if isinstance(grid, PacedGrid):
            grid.names[node] = reply.client_id

    faults, lost = _ask_who(grid, new, replace(task, resumes=True), config, take_back)
    return faults + lost


def collect_faults(
    grid: Grid, messages: Iterable[Message], read: Callable[[Message], None]
) -> list[str]:
    """Send messages, give every reply to ``read``, and return the texts of what it raised.

    So all that is wrong is known at once, and not only the first of it.
    """
    faults = []
    for message in grid.send_and_receive(messages):
        try:
            read(message)
        except (ValueError, RoundError) as error:
            faults.append(str(error))
    return faults


def wait_for_nodes(
    grid: PacedGrid, config: Config, run_config: dict[str, Any], to_come: Collection[str]
) -> list[int]:
    """Return the nodes, waiting for SuperNodes to connect; a simulation has all it gets.

    With ``federated.min_clients`` and ``client_timeout_seconds`` the others are waited for until
    that time has passed.
    """
    simulated = grid.is_simulation
    num_clients = len(config.federated.clients)
    required = min(config.federated.required_clients, len(to_come))
    patience = config.federated.client_timeout_seconds or math.inf
    started, reported = time.monotonic(), 0.0
    while True:
        node_ids = sorted(grid.get_node_ids())
        if len(node_ids) > num_clients or (simulated and len(node_ids) != num_clients):
            text = f"The federation has {len(node_ids)} nodes and federated.clients names "
            text += f"{num_clients}. "
            if not simulated:
                raise ConfigError(f"{text}Stop the SuperNodes that do not take part.")
            raise ConfigError(f"{text}Run:\n  {command_for(num_clients, run_config)}")
        is_late = time.monotonic() - started > patience
        if len(node_ids) >= len(to_come) or (len(node_ids) >= required and is_late):
            return node_ids
        if time.monotonic() - reported > CONNECT_REPORT_SECONDS:
            reported = time.monotonic()
            here = {grid.owners[node] for node in node_ids} if grid.owners is not None else set()
            names = f" of {', '.join(sorted(set(to_come) - here))}" if here else ""
            number = len(to_come) - len(node_ids)
            print(f"Waiting for {number} more SuperNodes{names}.", flush=True)
        time.sleep(1)


def command_for(num_nodes: int, run_config: dict[str, Any]) -> str:
    """Return the same run's command line with the right number of nodes."""
    given = format_run_config(run_config)
    settings = f" --run-config {shell(given)}" if given else ""
    return f'flwr run . --stream --federation-config "num-supernodes={num_nodes}"{settings}'
