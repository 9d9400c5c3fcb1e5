"""Bytes that travel per client and round, over the least that could.

The least is the global adapter's update once up, in ``federated.upload_dtype`` (of int8 and nf4 the
codes alone, without their scales), and its fp32 weights once down. Counted are the messages of a
real federation, each in full as Flower serialises it; and for Qwen2.5-7B its rank-16 adapter,
packed as in a message, beside what else the real messages held. Bytes of local adapters are looked
for in all that was sent.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.pipe import identify_process
from benchmarks.toy_models import QWEN_7B, equal_adapters, use_tests
from benchmarks.two_processes import CLIENTS, build_project, quiet
from fedlora_app.config.schema import GLOBAL
from fedlora_app.federation.messages import ADAPTER_RECORD, UPDATE_RECORD, read_task
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.foundation.files import WEIGHTS_FILE
from fedlora_app.model.adapters import attach_adapters, state_shapes
from fedlora_app.runs.paths import RunPaths

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "nf4": 0.5}
FP32_BYTES = 4
SEARCHED_BYTES = 64
"""Of each tensor of a local adapter, looked for in all that was sent."""
MODEL = {"hidden_size": 512, "intermediate_size": 1024}


def measure(
    num_rounds: int = 2, rank: int = 128, large_rank: int = 16, **sizes: int
) -> dict[str, Any]:
    """Count for every dtype; ``sizes`` change the federation's model."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPE_BYTES:
            rows.append(_count_run(Path(folder), dtype, num_rounds, rank, MODEL | sizes))
    rows += [_calculate(row, large_rank) for row in tuple(rows)]
    return {"compared": "bytes per client and round with the least possible", "rows": rows}


def describe(figures: dict[str, Any]) -> str:
    """Return the bytes as a table."""
    lines = [
        "| adapter | update as | down | up | least | sent to least | of local adapters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {row['what']}, {row['num_parameters'] / 1e6:.2f} M | {row['upload_dtype']} "
            f"| {row['bytes_down']:,.0f} | {row['bytes_up']:,.0f} | {row['least_bytes']:,} "
            f"| {row['ratio']:.5f} | {row['local_adapter_bytes']} |"
        )
    return "\n".join(lines)


def _count_run(
    folder: Path, dtype: str, num_rounds: int, rank: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """Run a federation and count its messages, from the first round on."""
    use_tests()
    from loopback import Federation

    identify_process()
    project = folder / dtype
    project.mkdir()
    adapters = {"global": {"rank": rank, "alpha": rank}, "local": {"rank": 2, "alpha": 4}}
    config = build_project(
        project,
        model=sizes,
        adapters=adapters,
        federated={"num_rounds": num_rounds, "upload_dtype": dtype},
        evaluation={"max_new_tokens": 1},
    )
    federation = Federation(project, project / "results", config)
    with quiet():
        run_dir = federation.run()
    (grid,) = federation.grids
    totals: dict[str, int] = defaultdict(int)
    names = set()
    for request, reply in zip(grid.sent, grid.received, strict=True):
        if read_task(request).server_round == 0:
            continue
        for direction, message in (("down", request), ("up", reply)):
            content = message.content
            totals[f"bytes_{direction}"] += _serialised_bytes(content)
            names |= set(content.array_records)
            for record in content.array_records.values():
                totals[f"array_bytes_{direction}"] += sum(len(a.data) for a in record.values())
    per_client = {key: total / num_rounds / len(CLIENTS) for key, total in totals.items()}
    state = load_file(RunPaths(run_dir).global_adapter(num_rounds) / WEIGHTS_FILE)
    num_parameters = sum(tensor.numel() for tensor in state.values())
    least = round((DTYPE_BYTES[dtype] + FP32_BYTES) * num_parameters)
    return {
        "what": f"{len(CLIENTS)} clients, {num_rounds} rounds, counted",
        "upload_dtype": dtype,
        "num_parameters": num_parameters,
        "num_tensors": len(state),
        **per_client,
        "least_bytes": least,
        "ratio": round((per_client["bytes_down"] + per_client["bytes_up"]) / least, 6),
        "array_records": sorted(names),
        "local_adapter_bytes": _find_local(run_dir, grid.bytes_received() + grid.bytes_sent()),
    }


def _calculate(counted: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the same row for Qwen2.5-7B; what is no array is as large as in the counted run."""
    dtype = counted["upload_dtype"]
    with torch.device("meta"):
        base = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B))
    shapes = state_shapes(attach_adapters(base, equal_adapters(rank)), GLOBAL)
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    packed = {
        "down": _serialised_bytes(RecordDict({ADAPTER_RECORD: pack_state(state)})),
        "up": _serialised_bytes(RecordDict({UPDATE_RECORD: pack_state(state, dtype)})),
    }
    num_parameters = sum(map(math.prod, shapes.values()))
    least = round((DTYPE_BYTES[dtype] + FP32_BYTES) * num_parameters)
    # The key and header of the counted run's array are in here too, which is on the safe side.
    sent = {
        f"bytes_{direction}": size
        + counted[f"bytes_{direction}"]
        - counted[f"array_bytes_{direction}"]
        for direction, size in packed.items()
    }
    return {
        "what": f"Qwen2.5-7B, rank {rank}, calculated",
        "upload_dtype": dtype,
        "num_parameters": num_parameters,
        "num_tensors": len(shapes),
        **sent,
        "least_bytes": least,
        "ratio": round(sum(sent.values()) / least, 6),
        "local_adapter_bytes": counted["local_adapter_bytes"],
    }


def _serialised_bytes(content: RecordDict) -> int:
    return len(recorddict_to_proto(content).SerializeToString())


def _find_local(run_dir: Path, sent: bytes) -> int:
    """Return the bytes of tensors of local adapters, as saved, whose beginning was sent."""
    found = 0
    files = [
        *run_dir.glob(f"clients/*/round_*/{WEIGHTS_FILE}"),
        *run_dir.glob(f"final/clients/*/{WEIGHTS_FILE}"),
    ]
    for path in files:
        for tensor in load_file(path).values():
            values = tensor.numpy().tobytes()
            is_empty = not values.strip(b"\0")  # B before anything was learnt
            if not is_empty and values[:SEARCHED_BYTES] in sent:
                found += len(values)
    if not files:
        raise RuntimeError(f"{run_dir} holds no local adapter to look for.")
    return found
