"""What the server keeps of many clients without any of their updates.

Registration, histories, manifest and evidence, with all that a client reports of a round.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from benchmarks.pipe import FIRST_NODE_ID
from benchmarks.turns import least
from fedlora_app.config.schema import Config
from fedlora_app.deployment.evidence import Evidence
from fedlora_app.federation.digest import Digester
from fedlora_app.federation.grid import PacedGrid
from fedlora_app.federation.messages import (
    REGISTRATION_COUNTS,
    REGISTRATION_ROUND,
    Task,
    build_reply,
    build_task_content,
)
from fedlora_app.federation.registration import register_clients
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.history import read_history
from fedlora_app.runs.round_record import RoundRecord

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
FACTS = {
    "device": "NVIDIA GeForce RTX 4090",
    "findings": "[]",
    **{f"sha256/{name}": "0" * 64 for name in ("universal_train", "local_train", "local")},
}
PHASE = ("num_steps", "num_examples", "num_tokens", "num_answer_tokens", "train_loss", "seconds")
PHASE += ("final_train_loss", "penalty", "peak_memory_bytes", "memory_retries")
SCORES = ("n", "n_ranked", "n_facts", "exact_match", "rank_accuracy", "rank_chance")
METRICS = {
    "global": ["num-examples", "update_norm", *(f"train_global/{name}" for name in PHASE)],
    "local": [f"train_global+local/{name}" for name in PHASE],
    "evaluate": [
        *("evaluation_seconds", "peak_memory_bytes"),
        *(
            f"{adapters}/{questions}/{score}"
            for adapters in ("global", "local", "global+local")
            for questions in ("universal", "universal_unseen", "local", "conflict")
            for score in SCORES
        ),
    ],
}
"""What a client reports of a round with both phases and an evaluation."""
TRAFFIC = ("bytes_down", "bytes_up", "adapter_bytes_down", "adapter_bytes_up")


def measure_clients(num_clients: int, folder: Path) -> dict[str, Any]:
    """Return what the server's records of many clients take, without any of their updates."""
    config = build_config(num_clients)
    task = _build_task(config)
    registration = _register(config, task)
    records = _measure_records(config, folder / f"run-{num_clients}")
    log = Evidence(folder / f"evidence-{num_clients}.jsonl")
    content = build_task_content(task)
    fields = {"kind": "train", "message": "0" * 64, "client": "client", "round": 1, "node": "1"}

    def enter() -> None:
        digest = Digester().digest(content)
        log.add("sent", **fields, sha256=digest.sha256, rest_sha256=digest.rest_sha256)

    _, evidence = least(enter, 20)
    return {
        "num_clients": num_clients,
        "experiment_bytes": len(task.experiment),
        "registration_seconds": registration / num_clients,
        "evidence_seconds": evidence,
        **records,
    }


def _build_task(config: Config) -> Task:
    return Task(
        client_id="",
        server_round=REGISTRATION_ROUND,
        global_sha256="",
        resumes=False,
        run_name="capacity",
        project_dir="",
        output_dir="",
        package_sha256="0" * 64,
        experiment=json.dumps(config.dump()),
    )


class _AnsweringGrid(Grid):
    """Nodes that register as soon as they are asked."""

    def __init__(self, clients: list[str]) -> None:
        self.clients = dict(enumerate(clients, start=FIRST_NODE_ID))
        self.replies: dict[str, Message] = {}

    def get_node_ids(self):
        return list(self.clients)

    def push_messages(self, messages):
        for message in messages:
            number = f"message-{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = number
            client = self.clients[message.metadata.dst_node_id]
            counts = dict.fromkeys(REGISTRATION_COUNTS, 100)
            self.replies[number] = build_reply(message, client, REGISTRATION_ROUND, counts, FACTS)
            yield number

    def pull_messages(self, message_ids):
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def _register(config: Config, task: Task) -> float:
    """Return the seconds of the processor that the registration of all clients takes."""
    grid = PacedGrid(_AnsweringGrid(config.client_ids), clients_at_once=10)

    def register() -> None:
        found = register_clients(grid, config, task, {})
        if len(found) != len(config.client_ids):
            raise RuntimeError(f"{len(found)} of {len(config.client_ids)} clients registered.")

    return least(register, 3)[0]


def _measure_records(config: Config, path: Path) -> dict[str, Any]:
    """Complete rounds of which every client reports what it reports of an evaluated one."""
    reports = {
        client: dict.fromkeys(REGISTRATION_COUNTS, 100) | FACTS for client in config.client_ids
    }
    run = RunDirectory.create(path, config, ROOT, clients=reports)
    history, manifest, seconds = [], [], []
    with closing(run):
        for server_round in range(1, ROUNDS + 1):
            record = RoundRecord(run, server_round, report=lambda line: None)
            cpu = time.process_time()
            for client in config.client_ids:
                for phase, names in METRICS.items():
                    record.add_metrics(client, phase, dict.fromkeys(names, 0.8571428571428571))
                record.adapters[f"local:{client}"] = "1" * 64
            traffic = {client: dict.fromkeys(TRAFFIC, 161_500_000) for client in config.client_ids}
            record.complete(traffic, {"aggregation_seconds": 1.0})
            seconds.append(time.process_time() - cpu)
            history.append(run.paths.history.stat().st_size)
            manifest.append(run.paths.manifest.stat().st_size)
    read, _ = least(lambda: read_history(path), 1)
    return {
        "history_bytes": history[-1] - history[-2],
        "manifest_bytes": manifest[-1] - manifest[-2],
        "first_manifest_bytes": 2 * manifest[0] - manifest[1],
        "round_seconds": min(seconds),
        "read_history_seconds": read / ROUNDS,
    }


def build_config(
    clients: int, dtype: str = "float32", rule: str = "fedavg", rank: int = 16
) -> Config:
    """Return an experiment of so many clients, on the tests' tiny model."""
    from conftest import build_tiny_config

    adapter = {"rank": rank, "alpha": 2 * rank}
    return build_tiny_config(
        tuple(f"client-{index:06d}" for index in range(clients)),
        adapters={"global": adapter, "local": adapter},
        federated={"upload_dtype": dtype, "aggregation": rule},
        data={"conflict_test": None},
    )
