"""What one update of a 7B model costs a server and Flower's store, and what many clients do.

The shapes are those of Qwen2.5-7B's global adapter at rank 16, the values random. Times are the
least of several repeats: this process's time on the processor, and the clock where a disk is waited
for. The store is Flower's own, as a SuperLink with ``--database`` has it, without its HTTP.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.client_records import build_config, measure_clients
from benchmarks.pipe import identify_process
from benchmarks.process import peak_bytes, resident_bytes
from benchmarks.toy_models import QWEN_7B, equal_adapters, use_tests
from benchmarks.turns import least
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.digest import Digester
from fedlora_app.federation.grid import build_message
from fedlora_app.federation.messages import (
    METRIC_RECORD,
    UPDATE_RECORD,
)
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.federation.replies import Reply
from fedlora_app.foundation.process_memory import reset_peak
from fedlora_app.model.adapter_files import save_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, attach_adapters, state_shapes

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16", "int8", "nf4")
RULES = ("fedavg", "median")
MB = 1e6
RUN_ID = 1


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
            "clients": [measure_clients(count, Path(folder)) for count in clients],
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


def _shapes(state: AdapterState) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


def _begin_aggregation(config: Config, state: AdapterState) -> Aggregation:
    aggregation = Aggregation(config, _shapes(state))
    aggregation.begin({key: torch.zeros_like(tensor) for key, tensor in state.items()}, 1)
    return aggregation


def _measure_dtype(state: AdapterState, dtype: str, rank: int, repeats: int) -> dict[str, Any]:
    """Return what the server does with an update that is in its memory."""
    packed = pack_state(state, dtype)
    aggregation = _begin_aggregation(build_config(1, dtype, rank=rank), state)
    reply = Reply("client-000000", {}, {}, packed)
    fold, _ = least(lambda: aggregation.add(reply, 1), repeats)
    content = RecordDict({UPDATE_RECORD: packed})
    hashing, _ = least(lambda: Digester().digest(content), repeats)
    result, _ = least(aggregation.result, 1)
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
    config = build_config(max(3, num_updates), rule=rule, rank=rank)
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
    cpu, clock = least(lambda: save_adapter(target, model, GLOBAL, state, "base"), repeats)
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
            writes.append(least(lambda sent=message: _write(store, sent), 1))
            message_id = message.object_id
            num_objects = len(store)
        reads.append(least(lambda found=message_id: _read(store, found), 1))
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


if __name__ == "__main__":
    rule, num_updates, model, rank = sys.argv[1:]
    print(measure_peak(rule, int(num_updates), json.loads(model), int(rank)))
