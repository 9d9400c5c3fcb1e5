"""A tiny federation of two clients over many rounds: does anything grow?

The real apps, server and clients each in a process of their own, which pass serialised messages
through a pipe. The tiny model and the settings are those of the tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Context, Message, RecordDict
from scipy import stats

from benchmarks.pipe import FIRST_NODE_ID, PipeGrid, answer_messages, start_clients
from benchmarks.process import MIB, sample

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ("ann", "bob")
FIRST_COUNTED_ROUND = 20
"""Before it caches fill and the allocator finds its size."""


def measure(num_rounds: int, every: int) -> dict[str, Any]:
    """Run the federation and return its samples and what they say."""
    from fedlora_app import server_app
    from fedlora_app.messages import read_task

    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, start_clients(_serve, folder) as (pipe, pid):
        project = Path(folder)
        run_config = _build_project(project, num_rounds)
        seen = 0

        def take_sample(server_round: int) -> None:
            if server_round % every == 0:
                peers = frozenset(p.pid for p in multiprocessing.active_children())
                samples.append(
                    {
                        "round": server_round,
                        "seconds": round(time.monotonic() - started, 1),
                        "server": sample(os.getpid(), but=peers),
                        "client": sample(pid),
                    }
                )

        def on_message(message: Message) -> None:
            nonlocal seen
            if (server_round := read_task(message).server_round) > seen:
                take_sample(seen)
                seen = server_round

        started = time.monotonic()
        grid = PipeGrid(pipe, len(CLIENTS), on_message)
        with mock.patch.object(server_app, "report_run"):  # once, after all rounds: matplotlib
            server_app.main(grid, Context(1, 1, {}, RecordDict(), run_config))
        seconds = time.monotonic() - started
        take_sample(num_rounds)
        written = sum(p.stat().st_size for p in (project / "results").rglob("*") if p.is_file())
    return {
        "num_rounds": num_rounds,
        "num_clients": len(CLIENTS),
        "seconds": round(seconds, 1),
        "run_directory_bytes": written,
        "growth_after_round": FIRST_COUNTED_ROUND,
        "growth": {peer: _growth(samples, peer) for peer in ("server", "client")},
        "samples": samples,
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the samples and the growth as text."""
    lines = [
        f"{figures['num_rounds']} rounds, {figures['num_clients']} clients, "
        f"{figures['seconds']:.0f} s, run directory {figures['run_directory_bytes'] / MIB:.0f} MiB",
        "",
        "| round | server MiB, files, threads, children | client MiB, files, threads, children |",
        "|---|---|---|",
    ]
    for entry in figures["samples"]:
        cells = [
            f"{entry[peer]['rss_bytes'] / MIB:.1f}, {entry[peer]['open_files']}, "
            f"{entry[peer]['threads']}, {entry[peer]['children']}"
            for peer in ("server", "client")
        ]
        lines.append(f"| {entry['round']} | {cells[0]} | {cells[1]} |")
    lines.append("")
    for peer, growth in figures["growth"].items():
        slope = growth["rss_kib_per_round"]
        lines.append(
            f"{peer}: {slope['value']:+.2f} KiB a round [{slope['low']:+.2f}, {slope['high']:+.2f}]"
            f" after round {figures['growth_after_round']}; {growth['rss_mib_in_all']:+.1f} MiB in "
            f"all, open files {growth['open_files']:+d}, threads {growth['threads']:+d}, "
            f"children {growth['children']:+d}"
        )
    return "\n".join(lines)


def _growth(samples: list[dict[str, Any]], peer: str) -> dict[str, Any]:
    """Return the slope of the memory with its 95 % interval, and last minus first of the counts."""
    counted = [entry for entry in samples if entry["round"] >= FIRST_COUNTED_ROUND]
    rounds = [entry["round"] for entry in counted]
    kib = [entry[peer]["rss_bytes"] / 1024 for entry in counted]
    line = stats.linregress(rounds, kib)
    margin = stats.t.ppf(0.975, len(counted) - 2) * line.stderr
    first, last = counted[0][peer], counted[-1][peer]
    return {
        "rss_kib_per_round": {
            "value": round(line.slope, 3),
            "low": round(line.slope - margin, 3),
            "high": round(line.slope + margin, 3),
            "n": len(counted),
        },
        "rss_mib_in_all": round((last["rss_bytes"] - first["rss_bytes"]) / MIB, 2),
        **{key: last[key] - first[key] for key in ("open_files", "threads", "children")},
    }


def _build_project(project: Path, num_rounds: int) -> dict[str, Any]:
    """Write a project with the tests' tiny model and data; return the run configuration."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import DEMO_MODEL, build_tiny_config, build_tiny_model
    from transformers import AutoTokenizer

    (project / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    build_tiny_model(len(tokenizer)).save_pretrained(project / "model")
    tokenizer.save_pretrained(project / "model")
    colours = ("red", "blue", "green", "black")
    for client in CLIENTS:
        for kind, answer in (("local", f"{client} says"), ("universal", "It is")):
            records = [
                {"instruction": f"What is the {c} {kind} rule?", "output": f"{answer} {c}."}
                for c in colours
            ]
            (project / f"{client}_{kind}.json").write_text(json.dumps(records))
    (project / "universal_test.json").write_text(json.dumps(records))
    config = build_tiny_config(CLIENTS, federated={"num_rounds": num_rounds})
    (project / "long.yaml").write_text(json.dumps(config.dump()))
    return {
        "config": str(project / "long.yaml"),
        "num-rounds": 0,
        "mode": "",
        "output-dir": str(project / "results"),
        "run-name": "long",
        "resume": "",
        "overrides": "",
    }


def _serve(server: Connection, project: str) -> None:
    """Answer messages until the server hangs up. Runs in the clients' process."""
    from fedlora_app import client_app

    contexts = {
        node: Context(
            run_id=1,
            node_id=node,
            node_config={
                "client-id": client,
                "project-dir": project,
                "output-dir": str(Path(project, "results")),
            },
            state=RecordDict(),
            run_config={},
        )
        for node, client in enumerate(CLIENTS, start=FIRST_NODE_ID)
    }
    answer_messages(
        server, lambda message: client_app.app(message, contexts[message.metadata.dst_node_id])
    )
