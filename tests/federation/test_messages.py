from __future__ import annotations

import json

import pytest
import torch
from flwr.app import Message, RecordDict
from random_states import SHAPES, STATE

from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    DECLARED_METRICS,
    MessageError,
    build_reply,
    is_possible,
)
from fedlora_app.model.adapter_state import AdapterError

pytestmark = pytest.mark.usefixtures("flower_identity")

FINDING = {"severity": "error", "rule": "train-test", "file": "data/a.json", "record": 3}


@pytest.mark.parametrize(
    ("facts", "update"),
    [
        ({"device": "a\nb"}, None),
        ({"device": "x" * 201}, None),
        ({"base_model": "the text of a record"}, None),
        ({"local_adapter": "0" * 63}, None),
        ({"sha256/local": "secret"}, None),
        ({"process": "1, secret"}, None),
        ({"needs": "the text of a record"}, None),
        ({"findings": "secret"}, None),
        ({"findings": json.dumps([{"text": "secret"}])}, None),
        ({"findings": json.dumps([FINDING | {"record": "secret"}])}, None),
        ({"findings": json.dumps([FINDING | {"rule": "a secret of 1,000"}])}, None),
        ({"findings": json.dumps([list(FINDING)])}, None),
        ({}, STATE | {"y.lora_A.weight": torch.zeros(2, 3)}),
        ({}, {key: tensor.T.contiguous() for key, tensor in STATE.items()}),
    ],
)
def test_what_is_not_as_declared_stays_at_the_client(facts, update):
    with pytest.raises((MessageError, AdapterError), match="stay here|The update"):
        build_reply(build_request(), "ann", 1, {}, facts, update, shapes=SHAPES)


@pytest.mark.parametrize(
    "metrics",
    [{"update_norm": [0.25] * 1000}, {"update_norm": float("nan")}, {"num-examples": -1}],
)
def test_a_value_that_a_metric_cannot_have_stays_at_the_client(metrics):
    with pytest.raises(MessageError, match="stay here"):
        build_reply(build_request(), "ann", 1, metrics, {})
    finding = json.dumps([FINDING])
    assert build_reply(build_request(), "ann", 1, {}, {"findings": finding}).has_content()


def build_request() -> Message:
    return Message(RecordDict(), dst_node_id=5, message_type="train")


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("base/local/fact_each", [-2, 0, 7], True),
        ("base/local/fact_each", [0.5], False),
        ("base/local/fact_each", [2**40], False),
        ("base/local/fact_each", 3, False),
        ("base/universal/unseen_each", [0, 1], True),
        ("global/local/exact_match_each", [1, 0, -1], True),
        ("global/local/exact_match_each", [7], False),
        ("global/local/exact_match", [1], False),
    ],
)
def test_lists_hold_verdicts_or_the_numbers_of_facts(name, value, fits):
    assert DECLARED_METRICS.fullmatch(name)
    assert is_possible(name, value) == fits


@pytest.mark.parametrize("name", ["answer", "local_weights", "train_global/text", "global/x/n"])
def test_what_was_not_declared_does_not_leave(name):
    with pytest.raises(MessageError, match=f"not declared and stay here: {name}"):
        build_reply(build_request(), "ann", 1, {name: 1.0}, {})
    with pytest.raises(MessageError, match="not declared"):
        build_reply(build_request(), "ann", 1, {}, {name: "secret"})


def test_facts_are_plain_json():
    reply = build_reply(build_request(), "ann", 1, {}, {"device": "CPU"})
    assert json.loads(reply.content.config_records[ABOUT_RECORD]["facts"]) == {"device": "CPU"}
