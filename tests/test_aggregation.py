"""Every aggregation rule through whole rounds: what travels, what is kept, and resuming."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import build_tiny_config
from loopback import Federation
from safetensors.torch import load_file

from fedlora_app.federation.messages import UPDATE_RECORD
from fedlora_app.federation.rules import RULES, build_rule
from fedlora_app.runs.paths import MEMORY_FILE

CLIENTS = ("ann", "bob", "cy")
WEIGHTS = "adapter_model.safetensors"


def configure(rule: str, clients=CLIENTS, adapters=None, **federated):
    if rule == "trimmed-mean":
        federated["trim_share"] = 0.34
    return build_tiny_config(
        clients,
        federated={"aggregation": rule, **federated},
        evaluation={"interval": 0},
        data={"conflict_test": None},
        adapters=adapters or {},
    )


def adapter_files(run):
    return {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))
    }


def updates_in(grid, server_round: int):
    """Return what each client sent in a round, and the examples that it counts."""
    found = {}
    for reply in grid.received:
        about = reply.content.config_records["about"]
        if UPDATE_RECORD not in reply.content or about["server-round"] != server_round:
            continue
        arrays = reply.content.array_records[UPDATE_RECORD]
        update = {key: torch.tensor(array.numpy()) for key, array in arrays.items()}
        found[about["client-id"]] = (update, reply.content["metrics"]["num-examples"])
    return found


def server_state(run, server_round: int):
    return load_file(run / "server" / f"round_{server_round:03d}" / WEIGHTS)


@pytest.mark.parametrize(
    "rule",
    [
        rule
        if rule in ("svd", "share-a", "residual")
        else pytest.param(rule, marks=pytest.mark.slow)
        for rule in RULES
    ],
)
def test_a_run_is_what_the_rule_says_and_resumes_to_the_byte(rule, tiny_project, tmp_path):
    config = configure(rule)
    whole = Federation(tiny_project, tmp_path / "whole", config)
    run = whole.run()
    expected = build_rule(config)
    for server_round in (1, 2):
        expected.begin(server_state(run, server_round - 1), server_round)
        for client, (update, weight) in updates_in(whole.grids[0], server_round).items():
            expected.add(client, update, weight)
        result = expected.result()
        for key, tensor in server_state(run, server_round).items():
            torch.testing.assert_close(tensor, result[key], rtol=0, atol=1e-6)
    stopped = Federation(tiny_project, tmp_path / "stopped", config)

    def stop(message, reply):
        is_second = reply.content.config_records["about"].get("server-round") == 2
        return None if is_second and UPDATE_RECORD not in reply.content else reply

    with pytest.raises(KeyboardInterrupt):
        stopped.run(tamper=interrupt_in_round(2))
    again = stopped.run(resume=str(stopped.path))
    assert adapter_files(again) == adapter_files(run)
    kept = {path.name for path in run.rglob(MEMORY_FILE)}
    assert kept == ({MEMORY_FILE} if rule == "rest-of-world" else set())


def interrupt_in_round(server_round: int):
    """Return what stops the run once the first client has trained in a round."""

    def tamper(message, reply):
        about = reply.content.config_records["about"]
        if UPDATE_RECORD in reply.content and about["server-round"] == server_round:
            raise KeyboardInterrupt
        return reply

    return tamper


def bytes_up(run, server_round: int = 1) -> int:
    history = json.loads((run / "history.json").read_text())
    (entry,) = [
        e
        for e in history
        if (e["round"], e["client"], e["phase"]) == (server_round, "ann", "traffic")
    ]
    return entry["metrics"]["adapter_bytes_up"]
