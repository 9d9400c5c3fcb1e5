"""What the rounding of updates leaves, in real federations of one process."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import build_tiny_config
from loopback import Federation
from observation import find_windows
from safetensors.torch import load_file

from fedlora_app.client import Client
from fedlora_app.federation.messages import ABOUT_RECORD, UPDATE_RECORD
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.runs.paths import RunPaths
from fedlora_app.strategy import RoundError

CLIENTS = ("ann", "bob")


def global_state(run, server_round):
    return load_file(RunPaths(run).global_adapter(server_round) / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_each_round_sends_what_the_one_before_has_left(tiny_project, tmp_path, monkeypatch, dtype):
    learnt = {}
    train = Client.train

    def watch(self, server_round, *arguments):
        update, *rest = train(self, server_round, *arguments)
        learnt[self.client_id, server_round] = update
        return update, *rest

    monkeypatch.setattr(Client, "train", watch)
    config = build_tiny_config(federated={"upload_dtype": dtype})
    federation = Federation(tiny_project, tmp_path, config)
    run, (grid,) = federation.run(), federation.grids
    before, after = global_state(run, 0), global_state(run, 2)
    shapes = {key: tensor.shape for key, tensor in before.items()}
    sent = {}
    for reply in grid.received:
        if (record := reply.content.array_records.get(UPDATE_RECORD)) is not None:
            about = reply.content.config_records[ABOUT_RECORD]
            who = about["client-id"], about["server-round"]
            sent[who] = unpack_state(record, shapes, who[0], dtype)
    assert set(sent) == set(learnt) == {(c, n) for c in CLIENTS for n in (1, 2)}
    kept = {who: load_file(RunPaths(run).feedback(*who)) for who in sent}
    for client in CLIENTS:
        for key in shapes:
            first, second = (learnt[client, n][key] for n in (1, 2))
            left = first - sent[client, 1][key]
            assert torch.equal(kept[client, 1][key], left)
            assert torch.equal(kept[client, 2][key], second + left - sent[client, 2][key])
    # Both clients have 4 examples.
    for key in shapes:
        total = sum(update[key] for update in sent.values()) / 2
        torch.testing.assert_close(after[key] - before[key], total, rtol=0, atol=1e-6)
    assert any(tensor.any() for tensor in kept["ann", 2].values())
    needles = [tensor.numpy() for state in kept.values() for tensor in state.values()]
    assert find_windows(needles, grid.bytes_received() + grid.bytes_sent()) == 0


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "what the rounding .* has left to send, .* never silently"),
        (lambda path: path.write_bytes(b"0" * 100), "is not the file that was written"),
    ],
)
def test_what_is_lost_in_a_run_stops_it(tiny_project, tmp_path, spoil, expected):
    config = build_tiny_config(federated={"upload_dtype": "int8", "mode": "fedavg"})
    federation = Federation(tiny_project, tmp_path, config)

    def lose(message, reply):
        task = message.content.config_records["task"]
        if message.metadata.message_type == "evaluate" and task["server_round"] == 1:
            spoil(RunPaths(federation.path).feedback(task["client_id"], 1))
        return reply

    with pytest.raises(RoundError, match=f"(?s)Round 2.*{expected}"):
        federation.run(tamper=lose)


def test_who_does_not_say_what_is_left_has_failed(tiny_project, tmp_path):
    config = build_tiny_config(federated={"upload_dtype": "nf4"})

    def forget(message, reply):
        if message.metadata.message_type == "train":
            about = reply.content.config_records[ABOUT_RECORD]
            facts = json.loads(about["facts"])
            del facts["feedback"]
            about["facts"] = json.dumps(facts)
        return reply

    with pytest.raises(RoundError, match="ann did not say which feedback it holds"):
        Federation(tiny_project, tmp_path, config).run(tamper=forget)
