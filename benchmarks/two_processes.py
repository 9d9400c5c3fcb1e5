"""A federation on one machine: the real apps, server and clients each in a process of their own.

Messages pass through a pipe, serialised.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from flwr.app import Context, Message, RecordDict
from transformers import AutoTokenizer

from benchmarks.pipe import FIRST_NODE_ID, PipeGrid, answer_messages, start_clients
from benchmarks.toy_models import use_tests
from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import Config

CLIENTS = ("ann", "bob")
COLOURS = ("red", "blue", "green", "black")


def build_project(
    project: Path,
    clients: Sequence[str] = CLIENTS,
    copies: int = 1,
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> Config:
    """Write a project with a random model and the tests' kind of data; return its experiment.

    Args:
        copies: of every training record, each with a number of its own.
        model: sizes that differ from the tests' tiny model.
        changes: sections of the experiment with the keys that differ.
    """
    use_tests()
    from conftest import DEMO_MODEL, build_tiny_config, build_tiny_model

    transformers.utils.logging.disable_progress_bar()
    (project / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    build_tiny_model(len(tokenizer), **(model or {})).save_pretrained(project / "model")
    tokenizer.save_pretrained(project / "model")
    for client in clients:
        for kind, answer in (("local", f"{client} says"), ("universal", "It is")):
            records = [
                {"instruction": f"What is the {c} {kind} rule{mark}?", "output": f"{answer} {c}."}
                for mark in ["", *(f" number {n}" for n in range(2, copies + 1))]
                for c in COLOURS
            ]
            _write(project / f"{client}_{kind}.json", records)
    asked = [{"instruction": f"Name the {c} rule.", "output": f"It is {c}."} for c in COLOURS]
    _write(project / "test.json", asked)
    config = build_tiny_config(tuple(clients), **changes).dump()
    config["data"] |= {"universal_test": "test.json", "conflict_test": None}
    for client in config["federated"]["clients"]:
        client["local_test"] = "test.json"
    return parse_config(config)


def start_client_process(project: str | Path) -> AbstractContextManager[tuple[Connection, int]]:
    """Run all clients in one process, as Flower's simulation does; yield the pipe and its pid."""
    return start_clients(_serve, str(project))


def federate(
    project: Path,
    config: Config,
    clients: Connection,
    *,
    name: str = "run",
    on_message: Callable[[Message], None] = lambda message: None,
) -> Path:
    """Run the whole experiment and return its run directory; there is no report at its end."""
    from fedlora_app import server_app

    _write(project / f"{name}.yaml", config.dump())
    run_config = {
        "config": str(project / f"{name}.yaml"),
        "num-rounds": 0,
        "mode": "",
        "output-dir": str(project / "results"),
        "run-name": name,
        "resume": "",
        "overrides": "",
    }
    grid = PipeGrid(clients, len(config.federated.clients), on_message)
    # The report would come once, after all rounds, with matplotlib.
    with mock.patch.object(server_app, "report_run"), quiet():
        server_app.main(grid, Context(1, 1, {}, RecordDict(), run_config))
    return project / "results" / name


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed in the block, which says how a run goes on."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _serve(server: Connection, project: str) -> None:
    """Answer messages until the server hangs up. Runs in the clients' process."""
    from fedlora_app import client_app
    from fedlora_app.federation.messages import read_task

    contexts: dict[int, Context] = {}

    def answer(message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in contexts:
            clients = read_task(message).config.federated.clients
            contexts[node] = Context(
                run_id=1,
                node_id=node,
                node_config={
                    "client-id": clients[node - FIRST_NODE_ID].id,
                    "project-dir": project,
                    "output-dir": str(Path(project, "results")),
                },
                state=RecordDict(),
                run_config={},
            )
        return client_app.app(message, contexts[node])

    with quiet():
        answer_messages(server, answer)
