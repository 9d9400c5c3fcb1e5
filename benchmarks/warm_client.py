"""What a message costs at a site beside the client's own work: a process for each, or one for all.

The benchmark is the SuperNode: Flower's own Runtime API, into whose state it puts messages and out
of which it takes replies. So Flower's pauses (3 s between two looks at the SuperLink, half a second
between two looks for a reply) are in neither figure. In turn, one message goes to
``flower-superexec``, which starts ``flwr-clientapp`` for it, and one to the executor.

An *empty* message asks for nothing; its seconds are all added. A message *with the base* is that of
round 0 without an evaluation: the base, both adapters set, and two of them written to the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import get_fab_metadata
from flwr.common.config import get_fused_config_from_fab
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from benchmarks.pipe import identify_process
from benchmarks.process import MIB, resident_bytes
from benchmarks.toy_models import ROOT, use_tests
from benchmarks.turns import compute_ratio, describe_ratio, take_turns
from benchmarks.two_processes import build_project
from fedlora_app.config.loading import change_config
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.federation.grid import build_message
from fedlora_app.federation.messages import Task, build_task_content
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.foundation.project import hash_package
from fedlora_app.model.adapters import build_initial_state
from fedlora_app.server_app import build_shapes

CLIENT, NODE_ID, RUN_ID = "ann", 11, 1
ANEW, WARM = "a process each", "executor"
EMPTY, WITH_BASE = "empty", "with the base"
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
LAYER_BYTES = 4 * 1024 * (2 * 1024 + 2 * 256 + 3 * 4096)  # in fp32
POLL_SECONDS = 0.01
LONGEST_SECONDS = 300.0


def measure(base: str = "", gigabytes: float = 1.0, num_turns: int = 5) -> dict[str, Any]:
    """Send messages of both kinds to both, in turn.

    Args:
        base: a folder with a base model; empty: one with random weights is made.
        gigabytes: of that one's weights in fp32.
    """
    identify_process()
    num_layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        sizes = {} if base else LARGE | {"num_hidden_layers": num_layers}
        config = build_project(
            folder, model=sizes, federated={"num_rounds": 2}, evaluation={"interval": 0}
        )
        if base:
            config = change_config(config, model__name=str(Path(base).resolve()))
        messages = build_messages(folder, config)
        nodes = {way: stack.enter_context(run_node(folder)) for way in (ANEW, WARM)}
        with_api = ("--runtime-api-address", nodes[ANEW].address)
        superexec = str(Path(sys.executable).with_name("flower-superexec"))
        stack.enter_context(run_process(folder, superexec, "--insecure", *with_api))
        module = (sys.executable, "-m", "fedlora_app.deployment.executor")
        with_api = ("--runtime-api-address", nodes[WARM].address)
        executor = stack.enter_context(run_process(folder, *module, *with_api))
        memory: list[int] = []
        seconds = {}
        for kind, message in messages.items():

            def ask_warm(message: Message = message) -> float:
                taken = nodes[WARM].ask(message)
                memory.append(resident_bytes(executor))
                return taken

            works = {ANEW: lambda m=message: nodes[ANEW].ask(m), WARM: ask_warm}
            seconds[kind] = take_turns(works, num_turns)
        weights = (folder / config.model.name).glob("*.safetensors")
        weights_bytes = sum(path.stat().st_size for path in weights)
    return {
        "compared": "seconds from a message's arrival at a SuperNode to its reply",
        "base": Path(base).name if base else f"random, {num_layers} layers",
        "weights_bytes": weights_bytes,
        "seconds": {
            kind: {way: _summarise(values) for way, values in ways.items()}
            for kind, ways in seconds.items()
        },
        "ratio": {kind: compute_ratio(ways[ANEW], ways[WARM]) for kind, ways in seconds.items()},
        "executor_resident_bytes": {
            "first_with_base": memory[num_turns + 1],
            "last": memory[-1],
            "messages_between": num_turns,
        },
    }


def describe(figures: dict[str, Any]) -> str:
    """Return both ways for both kinds as a table."""
    memory = figures["executor_resident_bytes"]
    lines = [
        f"{figures['base']}, {figures['weights_bytes'] / 1e6:.0f} MB of weights",
        "",
        f"| message | {ANEW}, s | {WARM}, s | ratio |",
        "|---|---|---|---|",
    ]
    for kind, ways in figures["seconds"].items():
        spans = [
            f"{ways[way]['value']:.2f} [{ways[way]['low']:.2f}, {ways[way]['high']:.2f}]"
            for way in (ANEW, WARM)
        ]
        lines.append(f"| {kind} | {' | '.join(spans)} | {describe_ratio(figures['ratio'][kind])} |")
    first, last = memory["first_with_base"] / MIB, memory["last"] / MIB
    lines += [
        "",
        f"The executor held {first:.0f} MiB after its first message with the base and {last:.0f} "
        f"{memory['messages_between']} messages later.",
    ]
    return "\n".join(lines)


def build_messages(folder: Path, config: Config) -> dict[str, Message]:
    """Return a message of each kind."""
    task = Task(
        client_id=CLIENT,
        server_round=0,
        global_sha256="",
        resumes=False,
        run_name="run",
        project_dir="",
        output_dir="",
        package_sha256=hash_package(),
        experiment=json.dumps(config.dump()),
        is_final=True,
    )
    model, faults = build_shapes(config, folder)
    assert model is not None, faults
    arrays = pack_state(build_initial_state(model, GLOBAL, 1))
    with_base = build_task_content(replace(task, is_final=False), arrays)
    return {
        EMPTY: build_message(build_task_content(task), MessageType.QUERY, NODE_ID),
        WITH_BASE: build_message(with_base, MessageType.EVALUATE, NODE_ID),
    }


class RuntimeNode:
    """The state of a SuperNode that is connected to nobody."""

    def __init__(self, factory: NodeStateFactory, address: str, folder: Path) -> None:
        self.address = address
        self._state = factory.state()
        self._store = factory.objectstore_factory.store()
        self._run = Run.create_empty(RUN_ID)
        content = build_fab_from_disk(ROOT)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        self._run.fab_id, self._run.fab_version = get_fab_metadata(content)
        self._run.fab_hash = self._state.store_fab(fab)
        self._state.set_node_id(NODE_ID)
        self._state.store_run(self._run)
        node_config = {
            "client-id": CLIENT,
            "project-dir": str(folder),
            "output-dir": secrets.token_hex(4),
        }
        run_config = get_fused_config_from_fab(content, self._run)
        context = Context(RUN_ID, NODE_ID, node_config, RecordDict(), run_config)
        self._state.set_run_series_context(self._run.series_id, context)

    def ask(self, message: Message) -> float:
        """Put a message into the state and return the seconds until its reply is there."""
        request = Message(
            message.content, dst_node_id=NODE_ID, message_type=message.metadata.message_type
        )
        request.metadata.__dict__["_run_id"] = RUN_ID
        started = time.perf_counter()
        _insert_message(request, self._state, self._store)
        self._state.create_task(TaskType.CLIENT_APP, RUN_ID, self._run.fab_hash)
        deadline = started + LONGEST_SECONDS
        while not (replies := self._state.get_messages_legacy(is_reply=True)):
            _pause(deadline)
        (reply,) = replies
        tree = self._store.get_object_tree(reply.metadata.message_id)
        contents = []
        for part in iterate_object_tree(tree):  # which come after the message itself
            while (content := self._store.get(part.object_id)) == b"":
                _pause(deadline)
            contents.append(content)
        seconds = time.perf_counter() - started
        asked = [reply.metadata.message_id, reply.metadata.reply_to_message_id]
        self._state.delete_messages(message_ids=asked)
        for message_id in asked:
            self._store.delete(message_id)
        if reply.has_error() or any(b"error" in content for content in contents):
            raise RuntimeError(f"The client failed: {reply} {contents}")
        return seconds


def _pause(deadline: float) -> None:
    if time.perf_counter() > deadline:
        raise TimeoutError("No reply came.")
    time.sleep(POLL_SECONDS)


@contextmanager
def run_node(folder: Path) -> Iterator[RuntimeNode]:
    """Serve a SuperNode's Runtime API on loopback, in a thread."""
    use_tests()
    from flower_process import free_port

    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    port = free_port()
    app = create_app(state_factory=factory)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(POLL_SECONDS)
        yield RuntimeNode(factory, f"127.0.0.1:{port}", folder)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def run_process(folder: Path, *command: str) -> Iterator[int]:
    """Run a process, with what it starts, for the block; yield its id."""
    bin_dir = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": os.pathsep.join([bin_dir, os.environ.get("PATH", "")]),
    }
    with (folder / f"{Path(command[-3]).name}.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _summarise(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "value": round(statistics.median(seconds), 4),
        "low": round(min(seconds), 4),
        "high": round(max(seconds), 4),
    }
