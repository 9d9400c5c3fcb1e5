"""What one update of a 7B model costs a server and Flower's store, and what many clients do.

The shapes are those of Qwen2.5-7B's global adapter at rank 16, the values random. Times are the
least of several repeats: this process's time on the processor, and the clock where a disk is waited
for. The store is Flower's own, as a SuperLink with ``--database`` has it, without its HTTP.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.pipe import FIRST_NODE_ID, identify_process
from benchmarks.process import peak_bytes, resident_bytes
from benchmarks.toy_models import QWEN_7B, equal_adapters, use_tests
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.deployment.evidence import Evidence
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.digest import Digester
from fedlora_app.federation.grid import PacedGrid, build_message
from fedlora_app.federation.messages import (
    METRIC_RECORD,
    REGISTRATION_COUNTS,
    REGISTRATION_ROUND,
    UPDATE_RECORD,
    Task,
    build_reply,
    build_task_content,
)
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.federation.registration import register_clients
from fedlora_app.federation.replies import Reply
from fedlora_app.foundation.process_memory import reset_peak
from fedlora_app.model.adapter_files import save_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, attach_adapters, state_shapes
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.history import read_history
from fedlora_app.runs.round_record import RoundRecord

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16", "int8", "nf4")
RULES = ("fedavg", "median")
MB = 1e6
RUN_ID = 1
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


def measure(
    repeats: int = 5,
    updates: tuple[int, int] = (2, 10),
    clients: tuple[int, ...] = (10, 100, 1000),
    model: dict[str, Any] = QWEN_7B,
    rank: int = 16,
) -> dict[str, Any]:
    """Measure an update in every dtype, the server's memory, the store, and many clients.

    Args:
        updates: numbers of updates in a round, between which memory may grow.
    """
    use_tests()
    identify_process()
    torch.set_num_threads(1)
    adapted, shapes = build_shapes(model, rank)
    state = {key: torch.randn(shape) * 1e-3 for key, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        return {
            "num_parameters": sum(map(math.prod, shapes.values())),
            "dtypes": [_measure_dtype(state, dtype, rank, repeats) for dtype in DTYPES],
            "memory": [
                _measure_memory(rule, count, model, rank) for rule in RULES for count in updates
            ],
            "checkpoint": _measure_checkpoint(adapted, state, Path(folder), repeats),
            "store": [_measure_store(state, dtype, Path(folder), repeats) for dtype in DTYPES],
            "clients": [_measure_clients(count, Path(folder)) for count in clients],
        }


def describe(figures: dict[str, Any]) -> str:
    """Return the figures as tables."""
    lines = [
        f"{figures['num_parameters'] / 1e6:.1f} M parameters",
        "",
        "| update as | MB | server: check and fold, s | sha256, s | Flower's store: write, s "
        "| read, s | database, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for one, store in zip(figures["dtypes"], figures["store"], strict=True):
        lines.append(
            f"| {one['upload_dtype']} | {one['bytes'] / MB:.1f} | {one['fold_seconds']:.2f} "
            f"| {one['hash_seconds']:.2f} | {store['write_seconds']:.2f} "
            f"| {store['read_seconds']:.2f} | {store['database_bytes'][0] / MB:.0f}, with "
            f"message {store['messages']}: {store['database_bytes'][-1] / MB:.0f} |"
        )
    kept = figures["checkpoint"]
    lines += [
        "",
        f"Checkpoint: {kept['bytes'] / MB:.1f} MB in {kept['seconds']:.2f} s "
        f"({kept['cpu_seconds']:.2f} s of the processor).",
        "",
        "| rule | updates | peak above the start, MB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['rule']} | {row['num_updates']} | {row['peak_bytes'] / MB:.0f} |"
        for row in figures["memory"]
    ]
    lines += [
        "",
        "| clients | experiment in each message, kB | registration, ms a client "
        "| history a round, kB | manifest a round, kB | completing a round, s | evidence, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['num_clients']} | {row['experiment_bytes'] / 1e3:.1f} "
        f"| {1e3 * row['registration_seconds']:.2f} | {row['history_bytes'] / 1e3:.0f} "
        f"| {row['manifest_bytes'] / 1e3:.1f} | {row['round_seconds']:.2f} "
        f"| {1e3 * row['evidence_seconds']:.2f} |"
        for row in figures["clients"]
    ]
    return "\n".join(lines)


def _least(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the least processor time and the least time by the clock, each in seconds."""
    found = []
    for _ in range(repeats):
        gc.collect()
        cpu, clock = time.process_time(), time.monotonic()
        function()
        found.append((time.process_time() - cpu, time.monotonic() - clock))
    return min(cpu for cpu, _ in found), min(clock for _, clock in found)


def _config(clients: int, dtype: str = "float32", rule: str = "fedavg", rank: int = 16) -> Config:
    from conftest import build_tiny_config

    adapter = {"rank": rank, "alpha": 2 * rank}
    return build_tiny_config(
        tuple(f"client-{index:06d}" for index in range(clients)),
        adapters={"global": adapter, "local": adapter},
        federated={"upload_dtype": dtype, "aggregation": rule},
        data={"conflict_test": None},
    )


def _shapes(state: AdapterState) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


def _begin_aggregation(config: Config, state: AdapterState) -> Aggregation:
    aggregation = Aggregation(config, _shapes(state))
    aggregation.begin({key: torch.zeros_like(tensor) for key, tensor in state.items()}, 1)
    return aggregation


def _measure_dtype(state: AdapterState, dtype: str, rank: int, repeats: int) -> dict[str, Any]:
    """Return what the server does with an update that is in its memory."""
    packed = pack_state(state, dtype)
    aggregation = _begin_aggregation(_config(1, dtype, rank=rank), state)
    reply = Reply("client-000000", {}, {}, packed)
    fold, _ = _least(lambda: aggregation.add(reply, 1), repeats)
    content = RecordDict({UPDATE_RECORD: packed})
    hashing, _ = _least(lambda: Digester().digest(content), repeats)
    result, _ = _least(aggregation.result, 1)
    return {
        "upload_dtype": dtype,
        "bytes": Digester().digest(content).num_bytes,
        "fold_seconds": fold,
        "hash_seconds": hashing,
        "result_seconds": result,
    }


def _measure_memory(
    rule: str, num_updates: int, model: dict[str, Any], rank: int
) -> dict[str, Any]:
    """Measure in a fresh process: memory that another measurement has freed would be used again."""
    arguments = [rule, str(num_updates), json.dumps(model), str(rank)]
    command = [sys.executable, "-m", __spec__.name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{rule}, {num_updates} updates:\n{done.stderr}")
    peak = int(done.stdout.splitlines()[-1])
    return {"rule": rule, "num_updates": num_updates, "peak_bytes": peak}


def measure_peak(rule: str, num_updates: int, model: dict[str, Any], rank: int) -> int:
    """Return the most memory that a round's aggregation takes above what the process had before.

    That is with one fp32 update in memory beside what the rule keeps, and the adapter itself.
    """
    use_tests()
    shapes = build_shapes(model, rank)[1]
    config = _config(max(3, num_updates), rule=rule, rank=rank)
    start = resident_bytes()
    reset_peak()
    state = {key: torch.randn(shape) * 1e-3 for key, shape in shapes.items()}
    aggregation = Aggregation(config, shapes)
    aggregation.begin(state, 1)
    for index in range(num_updates):
        packed = pack_state({key: torch.randn(shape) * 1e-3 for key, shape in shapes.items()})
        aggregation.add(Reply(f"client-{index:06d}", {}, {}, packed), 1)
        del packed
    aggregation.result()
    return peak_bytes() - start


def build_shapes(model: dict[str, Any], rank: int) -> tuple[AdaptedModel, dict[str, torch.Size]]:
    """Return a model on the meta device with its adapters, and the global one's shapes."""
    with torch.device("meta"):
        adapted = attach_adapters(Qwen2ForCausalLM(Qwen2Config(**model)), equal_adapters(rank))
    return adapted, state_shapes(adapted, GLOBAL)


def _measure_checkpoint(
    model: AdaptedModel, state: AdapterState, folder: Path, repeats: int
) -> dict[str, Any]:
    target = folder / "adapter"
    cpu, clock = _least(lambda: save_adapter(target, model, GLOBAL, state, "base"), repeats)
    size = sum(path.stat().st_size for path in target.iterdir())
    return {"bytes": size, "seconds": clock, "cpu_seconds": cpu}


def _measure_store(state: AdapterState, dtype: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Pass messages of one update each through Flower's store on the disk, one after the other."""
    path = folder / f"{dtype}.db"
    store = SqlObjectStore(str(path))
    store.initialize()
    request = build_message(RecordDict(), "train", 11)
    writes, reads, sizes = [], [], []
    for number in range(repeats):
        other = {key: tensor + 1e-5 * number for key, tensor in state.items()}
        content = RecordDict(
            {
                UPDATE_RECORD: pack_state(other, dtype),
                METRIC_RECORD: MetricRecord({"num-examples": number}),
            }
        )
        del other
        message = Message(content, reply_to=request)
        with no_object_id_recompute():
            writes.append(_least(lambda sent=message: _write(store, sent), 1))
            message_id = message.object_id
            num_objects = len(store)
        reads.append(_least(lambda found=message_id: _read(store, found), 1))
        sizes.append(_size(path))
        store.delete(message_id)
    return {
        "upload_dtype": dtype,
        "messages": repeats,
        "write_seconds": min(clock for _, clock in writes),
        "write_cpu_seconds": min(cpu for cpu, _ in writes),
        "read_seconds": min(clock for _, clock in reads),
        "read_cpu_seconds": min(cpu for cpu, _ in reads),
        "objects": num_objects,
        "objects_left": len(store),
        "database_bytes": sizes,
    }


def _write(store: SqlObjectStore, message: Message) -> None:
    """Do what a message's way into the store takes: hash, cut into chunks, enter."""
    objects = get_all_nested_objects(message)
    missing = set(store.preregister(RUN_ID, get_object_tree(message)))
    for object_id, one in objects.items():
        if object_id in missing:
            store.put(object_id, one.deflate())


def _read(store: SqlObjectStore, message_id: str) -> None:
    contents = {}
    pending = [store.get_object_tree(message_id)]
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        contents[node.object_id] = store.get(node.object_id) or b""
    inflate_object_from_contents(message_id, contents)


def _size(path: Path) -> int:
    """Return the bytes of a database with its write-ahead log."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def _measure_clients(num_clients: int, folder: Path) -> dict[str, Any]:
    """Return what the server's records of many clients take, without any of their updates."""
    config = _config(num_clients)
    task = _build_task(config)
    registration = _register(config, task)
    records = _measure_records(config, folder / f"run-{num_clients}")
    log = Evidence(folder / f"evidence-{num_clients}.jsonl")
    content = build_task_content(task)
    fields = {"kind": "train", "message": "0" * 64, "client": "client", "round": 1, "node": "1"}

    def enter() -> None:
        digest = Digester().digest(content)
        log.add("sent", **fields, sha256=digest.sha256, rest_sha256=digest.rest_sha256)

    _, evidence = _least(enter, 20)
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

    return _least(register, 3)[0]


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
    read, _ = _least(lambda: read_history(path), 1)
    return {
        "history_bytes": history[-1] - history[-2],
        "manifest_bytes": manifest[-1] - manifest[-2],
        "first_manifest_bytes": 2 * manifest[0] - manifest[1],
        "round_seconds": min(seconds),
        "read_history_seconds": read / ROUNDS,
    }


if __name__ == "__main__":
    rule, num_updates, model, rank = sys.argv[1:]
    print(measure_peak(rule, int(num_updates), json.loads(model), int(rank)))
