"""One round of the strategy with many clients: does the server's memory depend on their number?

Each size runs in a process of its own, whose peak is compared with what it held before the round.
The replies are made one at a time, as the paced grid hands them over, and each is serialised and
read again as on a wire. What clients do is left out: their updates are random numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.process import MIB, peak_bytes, reset_peak, resident_bytes

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "rank": 4},
    "40 MB": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "rank": 28},
}
EVALUATED = ("universal", "universal_unseen", "local")
METRICS = ("n", "n_ranked", "exact_match", "rank_accuracy", "rank_accuracy_per_byte")


def measure(sizes: dict[str, list[int]]) -> dict[str, Any]:
    """Run every size of every adapter in a fresh process; return what each has measured."""
    rows = []
    for adapter, counts in sizes.items():
        for num_clients in counts:
            command = [sys.executable, "-m", __spec__.name, adapter, str(num_clients)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{adapter}, {num_clients} clients:\n{done.stderr}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(describe({"rows": rows[-1:]}).splitlines()[-1], flush=True)
    return {"rows": rows}


def describe(figures: dict[str, Any]) -> str:
    """Return the rows as a table."""
    lines = [
        "| adapter | clients | peak above the start, MiB | kept after the round, MiB "
        "| ms per client | of which aggregation |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {row['adapter']}: {row['adapter_bytes'] / MIB:.2f} MiB | {row['num_clients']} "
            f"| {row['peak_above_start_bytes'] / MIB:.1f} | {row['kept_bytes'] / MIB:.1f} "
            f"| {1000 * row['seconds_per_client']:.1f} "
            f"| {1000 * row['aggregation_seconds_per_client']:.1f} |"
        )
    return "\n".join(lines)


def measure_here(adapter: str, num_clients: int) -> dict[str, Any]:
    """Run one round in this process; call it in a fresh one."""
    from fedlora_app.adapters import build_initial_state
    from fedlora_app.config import GLOBAL

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        strategy, model = _build_strategy(adapter, num_clients, Path(folder))
        arrays = strategy.save_initial(build_initial_state(model, GLOBAL, seed=1))
        update = {
            key: torch.randn(shape) * 1e-3 for key, shape in strategy._shapes.items()
        }  # one for all: making random numbers is no server's work
        adapter_bytes = sum(4 * tensor.numel() for tensor in update.values())
        _take_round(strategy, 0, arrays, {})
        start = resident_bytes()
        reset_peak()
        started = time.monotonic()
        _take_round(strategy, 1, arrays, update)
        seconds = time.monotonic() - started
        return {
            "adapter": adapter,
            "adapter_bytes": adapter_bytes,
            "num_clients": num_clients,
            "start_bytes": start,
            "peak_above_start_bytes": peak_bytes() - start,
            "kept_bytes": resident_bytes() - start,
            "seconds_per_client": seconds / num_clients,
            "aggregation_seconds_per_client": _aggregation_seconds(strategy) / num_clients,
        }


def _aggregation_seconds(strategy: Any) -> float:
    entries = [entry["metrics"] for entry in strategy._run.history]
    return next(e["aggregation_seconds"] for e in entries if "aggregation_seconds" in e)


def _take_round(strategy: Any, server_round: int, arrays: Any, update: dict[str, Any]) -> None:
    """Have the strategy take one round, or in round 0 the base model's evaluation."""
    config = ConfigRecord()
    if server_round > 0:
        sent = strategy.configure_train(server_round, arrays, config, None)
        arrays, _ = strategy.aggregate_train(server_round, _answer(sent, server_round, update))
    sent = strategy.configure_evaluate(server_round, arrays, config, None)
    strategy.aggregate_evaluate(server_round, _answer(sent, server_round, None))


def _answer(
    messages: Iterable[Message], server_round: int, update: dict[str, Any] | None
) -> Iterator[Message]:
    """Yield a client's reply to each message, once the one before has been dealt with."""
    from fedlora_app.messages import UPDATE_RECORD, build_reply, pack_state, read_task

    evaluation = {f"global+local/{s}/{m}": 0.5 for s in EVALUATED for m in METRICS}
    report = {"evaluation_seconds": 1.0, "peak_memory_bytes": 1} | evaluation
    facts = {"base_model": "0" * 64, "local_adapter": "1" * 64}
    for number, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"message-{server_round}-{number}"
        request = message_from_proto(_through_wire(message))
        client = read_task(request).client_id
        if update is None:
            reply = build_reply(request, client, server_round, report, facts)
        else:
            metrics = {"num-examples": 100 + number, "update_norm": 1.0}
            reply = build_reply(request, client, server_round, metrics, {})
            reply.content[UPDATE_RECORD] = pack_state(update)
        yield message_from_proto(_through_wire(reply))


def _through_wire(message: Message) -> ProtoMessage:
    return ProtoMessage.FromString(message_to_proto(message).SerializeToString())


def _build_strategy(adapter: str, num_clients: int, folder: Path) -> tuple[Any, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import build_tiny_config

    from fedlora_app.adapters import attach_adapters
    from fedlora_app.messages import Task
    from fedlora_app.run_directory import RunDirectory
    from fedlora_app.strategy import GlobalAdapterFedAvg

    settings = dict(MODELS[adapter])
    rank = settings.pop("rank")
    clients = tuple(f"client-{index:04d}" for index in range(num_clients))
    config = build_tiny_config(
        clients,
        adapters={"global": {"rank": rank, "alpha": 8}, "local": {"rank": 2, "alpha": 4}},
        data={"conflict_test": None},
    )
    with torch.device("meta"):
        base = Qwen2ForCausalLM(
            Qwen2Config(vocab_size=1000, num_attention_heads=4, num_key_value_heads=2, **settings)
        )
    model = attach_adapters(base, config.adapters)
    fields = {name: "" for name in Task.__dataclass_fields__}
    task = Task(
        **fields
        | {
            "server_round": 0,
            "local_round": -1,
            "run_name": "large",
            "experiment": json.dumps(config.dump()),
        }
    )
    run = RunDirectory.create(folder / "run", config, ROOT, clients={})
    nodes = {client: 11 + index for index, client in enumerate(clients)}
    quiet = GlobalAdapterFedAvg(config, nodes, task, model, run, report=lambda line: None)
    return quiet, model


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]))))
