"""One round of the strategy with many clients: does the server's memory depend on their number?

Each size runs in a process of its own, whose peak is compared with what it held before the round.
All clients live in one other process, and messages pass through a pipe, serialised. What clients do
is left out: their updates are random numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.pipe import FIRST_NODE_ID, PipeGrid, answer_messages, start_clients
from benchmarks.process import MIB, peak_bytes, resident_bytes
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.federation.grid import PacedGrid
from fedlora_app.federation.messages import UPDATE_RECORD, Task, build_reply, read_task
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.federation.roster import count_bytes
from fedlora_app.foundation.process_memory import reset_peak
from fedlora_app.model.adapters import (
    AdaptedModel,
    attach_adapters,
    build_initial_state,
    state_shapes,
)
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.history import read_history
from fedlora_app.strategy import GlobalAdapterFedAvg

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "rank": 4},
    "40 MB": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "rank": 28},
}
CHECKED_IN = {"universal_examples": 100_000, "local_examples": 0}
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
    torch.set_num_threads(2)
    with (
        tempfile.TemporaryDirectory() as folder,
        start_clients(_serve, adapter, num_clients) as (pipe, _),
    ):
        strategy, model = _build_strategy(adapter, num_clients, Path(folder))
        grid = PacedGrid(PipeGrid(pipe, num_clients), clients_at_once=1)
        arrays = strategy.save_initial(build_initial_state(model, GLOBAL, seed=1))
        adapter_bytes = count_bytes(RecordDict({"": arrays}))[1]
        strategy.evaluate_base(grid, arrays)
        start = resident_bytes()
        reset_peak()
        started = time.monotonic()
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1)
        seconds = time.monotonic() - started
        peak = peak_bytes()
        return {
            "adapter": adapter,
            "adapter_bytes": adapter_bytes,
            "num_clients": num_clients,
            "start_bytes": start,
            "peak_above_start_bytes": peak - start,
            "kept_bytes": resident_bytes() - start,
            "seconds_per_client": seconds / num_clients,
            "aggregation_seconds_per_client": _aggregation_seconds(strategy) / num_clients,
        }


def _aggregation_seconds(strategy: Any) -> float:
    entries = [entry["metrics"] for entry in read_history(strategy._run.path)]
    return next(e["aggregation_seconds"] for e in entries if "aggregation_seconds" in e)


def _serve(server: Connection, adapter: str, num_clients: int) -> None:
    """Answer every message as a client would that had done its work."""
    _, model = _build_model(adapter, num_clients)
    update = {
        key: torch.randn(shape) * 1e-3 for key, shape in state_shapes(model, GLOBAL).items()
    }  # one for all
    evaluation = {f"global+local/{s}/{m}": 0.5 for s in EVALUATED for m in METRICS}
    report = {"evaluation_seconds": 1.0, "peak_memory_bytes": 1} | evaluation
    facts = {"base_model": "0" * 64, "local_adapter": "1" * 64, "global_adapter": "2" * 64}

    def answer(message: Message) -> Message:
        task = read_task(message)
        if message.metadata.message_type != MessageType.TRAIN:
            return build_reply(message, task.client_id, task.server_round, report, facts)
        metrics = {"num-examples": 100 + message.metadata.dst_node_id, "update_norm": 1.0}
        base = {"base_model": facts["base_model"]}
        reply = build_reply(message, task.client_id, task.server_round, metrics, base)
        reply.content[UPDATE_RECORD] = pack_state(update)
        return reply

    answer_messages(server, answer)


def _build_model(adapter: str, num_clients: int) -> tuple[Config, AdaptedModel]:
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import build_tiny_config

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
    return config, attach_adapters(base, config.adapters)


def _build_strategy(
    adapter: str, num_clients: int, folder: Path
) -> tuple[GlobalAdapterFedAvg, AdaptedModel]:
    config, model = _build_model(adapter, num_clients)
    task = Task(
        client_id="",
        server_round=0,
        global_sha256="",
        resumes=False,
        run_name="large",
        project_dir="",
        output_dir="",
        package_sha256="",
        experiment=json.dumps(config.dump()),
    )
    run = RunDirectory.create(
        folder / "run", config, ROOT, clients=dict.fromkeys(config.client_ids, CHECKED_IN)
    )
    nodes = {client: FIRST_NODE_ID + index for index, client in enumerate(config.client_ids)}
    quiet = GlobalAdapterFedAvg(config, nodes, task, model, run, report=lambda line: None)
    return quiet, model


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]))))
