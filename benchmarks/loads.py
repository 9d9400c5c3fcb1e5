"""How often a run loads the base model: counted in the clients' process and in the server's.

Compared with a client app that loads the base for every client and round. The clients' process
says how often it has loaded at the end of every round; in the server both the project's own counter
and transformers' ``from_pretrained`` are watched.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoModelForCausalLM

from benchmarks.two_processes import build_project, federate, start_client_process
from fedlora_app.model import base as model_module


def measure(num_rounds: int = 5, num_clients: int = 4) -> dict[str, Any]:
    """Run a tiny federation and count."""
    clients = [f"client-{index}" for index in range(num_clients)]
    before = model_module.num_loads
    with (
        tempfile.TemporaryDirectory() as folder,
        start_client_process(folder) as (pipe, pid),
        mock.patch.object(AutoModelForCausalLM, "from_pretrained") as from_pretrained,
    ):
        project = Path(folder)
        config = build_project(project, clients, federated={"num_rounds": num_rounds})
        run_dir = federate(project, config, pipe)
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    facts = [event for event in map(json.loads, lines) if event["event"] == "facts"]
    loads: dict[str, int] = {}
    for event in facts:
        process, _, said = event["process"].partition(", base model loaded ")
        loads[process] = max(loads.get(process, 0), int(said.split()[0]))
    return {
        "compared": "loads of the base model in a whole run",
        "num_rounds": num_rounds,
        "num_clients": num_clients,
        "client_rounds_reported": len(facts),
        "client_processes": len(loads),
        "is_the_only_client_process": set(loads) == {str(pid)},
        "loads_per_client_process": list(loads.values()),
        "loads_in_server": model_module.num_loads - before + from_pretrained.call_count,
        "loads_per_client_and_round_would_be": num_clients * num_rounds,
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the counts as a table."""
    counts = ", ".join(map(str, figures["loads_per_client_process"]))
    return "\n".join(
        [
            f"{figures['num_clients']} clients, {figures['num_rounds']} rounds",
            "",
            "| process | loads of the base model |",
            "|---|---|",
            f"| clients' ({figures['client_processes']}) | {counts} |",
            f"| server's | {figures['loads_in_server']} |",
            "| loading for every client and round would make "
            f"| {figures['loads_per_client_and_round_would_be']} |",
        ]
    )
