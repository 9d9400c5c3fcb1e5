from __future__ import annotations

import json
import re
import weakref

import pytest
import torch
from conftest import build_tiny_config, build_tiny_model
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora_app.config.schema import GLOBAL
from fedlora_app.federation.messages import Task, build_reply
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.model.adapters import attach_adapters, build_initial_state, state_shapes
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.strategy import GlobalAdapterFedAvg

NUM_CLIENTS = 60
CHECKED_IN = {"universal_examples": 2, "local_examples": 1}


@pytest.fixture
def strategy(tokenizer, tmp_path):
    """A strategy for sixty clients, which need no data here."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    clients = [
        {"id": f"c{index:02d}", "system_prompt": "", "local_train": "x", "universal_train": "x"}
        for index in range(NUM_CLIENTS)
    ]
    config = build_tiny_config(federated={"clients": clients})
    with torch.device("meta"):
        model = attach_adapters(build_tiny_model(len(tokenizer)), config.adapters)
    return GlobalAdapterFedAvg(
        config,
        nodes={client["id"]: index + 1 for index, client in enumerate(clients)},
        task=Task("", 0, "", False, "run", "", "", "", "{}"),
        model=model,
        run=RunDirectory.create(
            tmp_path / "run", config, tmp_path, {client["id"]: CHECKED_IN for client in clients}
        ),
        report=lambda line: None,
    ), build_initial_state(model, GLOBAL, 1)


def reply_from(message: Message, strategy, value: float) -> Message:
    nodes = strategy.roster.nodes
    client = next(name for name in nodes if nodes[name] == message.metadata.dst_node_id)
    shapes = state_shapes(strategy._model, GLOBAL)
    update = {key: torch.full(shape, value) for key, shape in shapes.items()}
    shapes = {key: tensor.shape for key, tensor in update.items()} if update else None
    facts = {"base_model": "0" * 64}
    return build_reply(message, client, 1, {"num-examples": 2}, facts, update, shapes=shapes)


def test_replies_are_folded_in_and_let_go_one_by_one(strategy):
    strategy, state = strategy
    arrays = strategy.save_initial(state)
    alive: weakref.WeakSet[RecordDict] = weakref.WeakSet()
    most = 0

    def replies():
        nonlocal most
        for message in strategy.configure_train(1, arrays, ConfigRecord(), None):
            reply = reply_from(message, strategy, 0.5)
            alive.add(reply)
            most = max(most, len(alive))
            yield reply
            del reply

    result, _ = strategy.aggregate_train(1, replies())
    assert most == 1
    shapes = {key: tensor.shape for key, tensor in state.items()}
    for key, tensor in unpack_state(result, shapes, "The server").items():
        torch.testing.assert_close(tensor, state[key] + 0.5)


def test_messages_are_addressed_in_the_order_of_ids_and_do_not_expire(strategy):
    strategy, state = strategy
    arrays = strategy.save_initial(state)
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), None))
    assert [message.metadata.dst_node_id for message in messages] == list(range(1, 61))
    assert all(message.metadata.message_type == MessageType.TRAIN for message in messages)
    assert min(message.metadata.ttl for message in messages) > 365 * 24 * 3600


def test_the_error_of_the_average_is_logged_and_costs_no_copy_of_an_update(strategy):
    strategy, state = strategy
    arrays = strategy.save_initial(state)
    messages = strategy.configure_train(1, arrays, ConfigRecord(), None)
    replies = (reply_from(m, strategy, 0.01 * (i % 2)) for i, m in enumerate(messages))
    strategy.aggregate_train(1, replies)
    events = (strategy._run.path / "metrics.jsonl").read_text().splitlines()
    (event,) = [e for e in map(json.loads, events) if e["event"] == "aggregation"]
    errors = event["relative_error"]
    assert len(errors) == 14 and "model.layers.0.self_attn.q_proj" in errors
    assert all(value > 0 for value in errors.values())
    assert 0 < strategy._aggregation.metrics["aggregation_error"] < max(errors.values())


def test_a_long_round_says_how_many_clients_have_answered(strategy, monkeypatch):
    from fedlora_app.foundation import progress

    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    strategy, state = strategy
    lines = []
    strategy._report = lines.append
    arrays = strategy.save_initial(state)
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), None))
    strategy.aggregate_train(1, (reply_from(m, strategy, 0.5) for m in messages))
    assert re.fullmatch(r"round 1/2, train: 1 of 60 clients, about \d+ s left", lines[0])
    assert len(lines) == NUM_CLIENTS - 1  # none once all have
