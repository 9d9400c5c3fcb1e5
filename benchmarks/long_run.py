"""A tiny federation of two clients over many rounds: does anything grow?

Compared is what server and client hold in the first and in the last rounds. The tiny model and the
settings are those of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from flwr.app import Message
from scipy import stats

from benchmarks.process import MIB, sample
from benchmarks.two_processes import CLIENTS, build_project, federate, start_client_process

FIRST_COUNTED_ROUND = 20
"""Before it caches fill and the allocator finds its size."""


def measure(num_rounds: int, every: int) -> dict[str, Any]:
    """Run the federation and return its samples and what they say."""
    from fedlora_app.federation.messages import read_task

    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, start_client_process(folder) as (pipe, pid):
        project = Path(folder)
        config = build_project(project, federated={"num_rounds": num_rounds})
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
        federate(project, config, pipe, on_message=on_message)
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
    """Return the slope of the memory with its 95 % interval, and last minus first of the counts.

    Without the last sample, which is taken when the run has printed its closing table.
    """
    counted = [entry for entry in samples[:-1] if entry["round"] >= FIRST_COUNTED_ROUND]
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
