"""Poison in a whole federation: what one end sends, and what the other makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import build_tiny_config
from flwr.app import Array
from loopback import Federation, LoopbackGrid
from safetensors.torch import load_file

from fedlora_app.federation.messages import ADAPTER_RECORD, TASK_RECORD, UPDATE_RECORD
from fedlora_app.federation.packed_state import pack_state, unpack_state
from fedlora_app.federation.replies import RoundError
from fedlora_app.runs.console import _describe_weights
from fedlora_app.runs.paths import MEMORY_FILE, RunPaths

CLIENTS = ("ann", "bob")
BOB = 12
"""Its node."""
QUIET = {"evaluation": {"interval": 0}, "data": {"conflict_test": None}}


def configure(clients=CLIENTS, **federated):
    return build_tiny_config(clients, federated={"num_rounds": 2, **federated}, **QUIET)


def scale_update(server_round: int, factor: float):
    """Return what has bob send so many times its update in one round."""

    def tamper(message, reply):
        task, metadata = message.content.config_records[TASK_RECORD], message.metadata
        is_meant = metadata.message_type == "train" and task["server_round"] == server_round
        if is_meant and metadata.dst_node_id == BOB:
            record = reply.content.array_records[UPDATE_RECORD]
            ((key, array),) = record.items()
            record[key] = Array((array.numpy() * factor).astype(np.float32))
        return reply

    return tamper


def stop_at(server_round: int, kind: str, tamper=lambda message, reply: reply):
    def stop(message, reply):
        task = message.content.config_records[TASK_RECORD]
        if message.metadata.message_type == kind and task["server_round"] == server_round:
            raise KeyboardInterrupt
        return tamper(message, reply)

    return stop


def failures(run, server_round: int) -> dict[str, str]:
    manifest = json.loads((run / "manifest.json").read_text())
    return next(e for e in manifest["rounds"] if e["round"] == server_round).get("failures", {})


def adapters(run) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("adapter_model.safetensors")}


def server_state(run, server_round: int) -> dict[str, torch.Tensor]:
    return load_file(RunPaths(run).global_adapter(server_round) / "adapter_model.safetensors")


class TestAClientsUpdate:
    def test_one_that_is_too_large_has_failed_by_name(self, tiny_project, tmp_path):
        config = configure(max_norm_ratio=4.0, min_clients=1)
        federation = Federation(tiny_project, tmp_path, config)
        refused = federation.run("bounded", tamper=scale_update(2, 20.0))
        assert failures(refused, 1) == {}
        assert "bob sent an update of norm" in failures(refused, 2)["bob"]
        assert "federated.max_norm_ratio allows 4 times" in failures(refused, 2)["bob"]
        missing = federation.run("missing", tamper=scale_update(2, float("nan")))
        assert adapters(refused) == adapters(missing)
        unbounded = federation.run(
            "unbounded", configure(min_clients=1), tamper=scale_update(2, 20.0)
        )
        assert failures(unbounded, 2) == {}
        assert adapters(unbounded) != adapters(refused)

    def test_where_all_clients_are_needed_the_run_stops(self, tiny_project, tmp_path):
        federation = Federation(tiny_project, tmp_path, configure(max_norm_ratio=4.0))
        with pytest.raises(RoundError, match=r"Round 2: 1 of 2 .*\n  bob sent an update of norm"):
            federation.run(tamper=scale_update(2, -20.0))

    def test_in_the_first_round_a_largest_norm_is_needed(self, tiny_project, tmp_path):
        federation = Federation(
            tiny_project, tmp_path, configure(max_norm_ratio=4.0, min_clients=1, num_rounds=1)
        )
        first = federation.run("ratio", tamper=scale_update(1, 20.0))
        assert failures(first, 1) == {}  # nothing is known yet
        bounded = configure(max_update_norm=2.0, min_clients=1, num_rounds=1)
        second = federation.run("bounded", bounded, tamper=scale_update(1, 20.0))
        assert "above federated.max_update_norm, which is 2" in failures(second, 1)["bob"]

    def test_a_resumed_run_decides_the_same(self, tiny_project, tmp_path):
        config = configure(max_norm_ratio=4.0, min_clients=1)
        tamper = scale_update(2, 20.0)
        whole = Federation(tiny_project, tmp_path / "whole", config)
        whole.run(tamper=tamper)
        stopped = Federation(tiny_project, tmp_path / "stopped", config)
        with pytest.raises(KeyboardInterrupt):
            stopped.run(tamper=stop_at(2, "train", tamper))
        stopped.run(tamper=tamper, resume="run")
        assert failures(stopped.path, 2) == failures(whole.path, 2) != {}
        assert adapters(stopped.path) == adapters(whole.path)
        memory = RunPaths(whole.path).global_adapter(2) / MEMORY_FILE
        assert len(load_file(memory)["bounds:norms"]) == 3  # all but the refused one


def test_without_bounds_nothing_changes_and_wide_ones_change_no_adapter(
    finished, tiny_project, tmp_path
):
    assert not list(finished.path.rglob(MEMORY_FILE))
    assert not list(finished.path.rglob("changes.json"))
    config = build_tiny_config(federated={"max_norm_ratio": 50.0, "max_update_norm": 1e4})
    run = Federation(tiny_project, tmp_path, config).run()
    assert adapters(run) == adapters(finished.path)


class PoisonedGrid(LoopbackGrid):
    """A server that changes the global adapter on its way to bob in the second round."""

    poison = staticmethod(lambda state: state)
    kind = "evaluate"

    def push_messages(self, messages):
        return super().push_messages(map(self._spoil, messages))

    def _spoil(self, message):
        task, metadata = message.content.config_records[TASK_RECORD], message.metadata
        records = message.content.array_records
        is_meant = metadata.message_type == self.kind and task["server_round"] == 2
        if is_meant and metadata.dst_node_id == BOB:
            shapes = {key: tensor.shape for key, tensor in server_state(self.server, 0).items()}
            state = (
                unpack_state(records[ADAPTER_RECORD], shapes, "the server")
                if ADAPTER_RECORD in records
                else server_state(self.server, 1)
            )
            records[ADAPTER_RECORD] = pack_state(self.poison(state))
        return message


def plant_row(state):
    """Zero B but for one row, in a module whose output is wide enough to tell."""
    key = next(key for key in state if "up_proj.lora_B" in key)
    planted = torch.zeros_like(state[key])
    planted[3] = 1.0
    return state | {key: planted}


def plant_inputs(state):
    key = next(key for key in state if "down_proj.lora_A" in key)
    return state | {key: torch.eye(*state[key].shape)}


def scale(factor: float):
    return lambda state: {key: tensor * factor for key, tensor in state.items()}


POISONS = {
    "a row": (plant_row, "up_proj.lora_B.weight lie in the largest entry of each rank"),
    "inputs": (plant_inputs, "down_proj.lora_A.weight lie in the largest entry of each rank"),
    "huge": (scale(100.0), "times the median of earlier changes"),
    "nan": (scale(float("nan")), "holds values that are not finite"),
}


def poison_server(project, folder, poison, kind="evaluate", **federated):
    """Return a federation whose server poisons what bob gets in round 2."""
    settings = {"poison": staticmethod(poison), "kind": kind, "server": folder / "run"}
    grid = type("Poisoned", (PoisonedGrid,), settings)
    return Federation(project, folder, configure(min_clients=1, **federated), grid_class=grid)


class TestTheServersAdapter:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [*((name, "evaluate") for name in POISONS), ("inputs", "train"), ("huge", "train")],
    )
    def test_poison_is_refused_by_the_clients_name(self, tiny_project, tmp_path, name, kind):
        poison, expected = POISONS[name]
        federation = poison_server(tiny_project, tmp_path, poison, kind, max_norm_ratio=5.0)
        why = failures(federation.run(), 2)["bob"]
        assert why.startswith("bob: The server sent") and expected in why

    @pytest.mark.parametrize("name", ["a row", "huge"])
    def test_without_the_bound_it_is_trained_on(self, tiny_project, tmp_path, name):
        federation = poison_server(tiny_project, tmp_path, POISONS[name][0])
        assert failures(federation.run(), 2) == {}

    def test_a_run_that_resumes_from_an_earlier_round_is_accepted(self, tiny_project, tmp_path):
        config = configure(max_norm_ratio=2.5, num_rounds=3)
        whole = Federation(tiny_project, tmp_path / "whole", config)
        whole.run()
        again = Federation(tiny_project, tmp_path / "again", config)
        with pytest.raises(KeyboardInterrupt):
            again.run(tamper=stop_at(3, "evaluate"))
        again.run(resume="run@1")
        assert adapters(again.path) == adapters(whole.path)

    def test_a_damaged_memory_is_named(self, tiny_project, tmp_path):
        config = configure(max_norm_ratio=5.0, min_clients=1)

        def damage(message, reply):
            task = message.content.config_records[TASK_RECORD]
            if message.metadata.message_type == "evaluate" and task["server_round"] == 1:
                RunPaths(tmp_path / "run").changes("bob").write_text("[]")
            return reply

        run = Federation(tiny_project, tmp_path, config).run(tamper=damage)
        assert "changes.json is damaged" in failures(run, 2)["bob"]


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_who_says_that_it_has_nearly_all_examples_is_named_at_the_start(
    tiny_project, tmp_path, capsys, weighting
):
    """They are its weight, and nobody else can count them."""

    def boast(message, reply):
        record = reply.content.metric_records.get("metrics", {})
        if message.metadata.dst_node_id == BOB:
            names = ("universal_examples", "num-examples")
            record.update({name: 10**3 for name in names if name in record})
        return reply

    config = configure((*CLIENTS, "cy"), weighting=weighting)
    Federation(tiny_project, tmp_path, config).run(tamper=boast)
    told = capsys.readouterr().out
    expected = "weights         bob has up to 99.3 % of an average, by the number of examples that"
    assert (expected in told) == (weighting == "examples")


def test_the_largest_share_is_of_any_round_and_of_nothing_there_is_none():
    """Each client is asked in some of the rounds only, not all of them in the first."""
    config = configure((*CLIENTS, "cy"), fraction=0.67, num_rounds=6)
    for big in config.client_ids:
        counts = {client: (1000 if client == big else 10, 5) for client in config.client_ids}
        said = next(_describe_weights(config, counts))
        assert said.startswith(f"{big} has up to 99.0 % of an average")
    assert list(_describe_weights(config, dict.fromkeys(config.client_ids, (0, 5)))) == []
