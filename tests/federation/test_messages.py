from __future__ import annotations

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    MAX_ARRAY_HEADER_BYTES,
    MessageError,
    Task,
    build_error_reply,
    build_reply,
    build_task_content,
    pack_state,
    unpack_state,
)
from fedlora_app.federation.replies import read_reply
from fedlora_app.federation.roster import Traffic, count_bytes
from fedlora_app.model.adapters import AdapterError

STATE = {"x.lora_A.weight": torch.randn(2, 3), "x.lora_B.weight": torch.randn(3, 2)}
FINDING = {"severity": "error", "rule": "train-test", "file": "data/a.json", "record": 3}
SHAPES = {key: tensor.shape for key, tensor in STATE.items()}


@pytest.fixture(autouse=True)
def _identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


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


def test_fp32_travels_exactly_and_bf16_to_its_precision():
    exact = unpack_state(pack_state(STATE), SHAPES, "ann")
    rounded = unpack_state(pack_state(STATE, "bfloat16"), SHAPES, "ann", "bfloat16")
    for key, tensor in STATE.items():
        assert torch.equal(exact[key], tensor)
        assert torch.equal(rounded[key], tensor.bfloat16().float())
    size = sum(len(array.data) for array in pack_state(STATE, "bfloat16").values())
    assert size < sum(len(array.data) for array in pack_state(STATE).values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s | {"other": torch.zeros(1)}, "ann sent: 0 tensors are missing and 1 are unkn"),
        (lambda s: {k: v for k, v in s.items() if "lora_A" in k}, "1 tensors are missing"),
        (lambda s: {k: v.T.contiguous() for k, v in s.items()}, "has shape"),
        (lambda s: {k: v * torch.nan for k, v in s.items()}, "not finite"),
    ],
)
def test_a_state_of_another_kind_is_refused(change, expected):
    with pytest.raises(AdapterError, match=expected):
        unpack_state(pack_state(change(STATE)), SHAPES, "ann")


def test_another_dtype_is_refused():
    record = ArrayRecord({key: Array(t.double().numpy()) for key, t in STATE.items()})
    with pytest.raises(MessageError, match="ann sent x.lora_A.weight as float64, expected float32"):
        unpack_state(record, SHAPES, "ann")


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2)])
def test_an_array_of_more_bytes_than_its_tensor_has_is_refused_unread(dtype, bytes_each):
    key, tensor = next(iter(STATE.items()))
    record = pack_state(STATE, dtype)
    array = record[key]
    most = tensor.numel() * bytes_each + MAX_ARRAY_HEADER_BYTES
    array.data += b"x" * (most + 1 - len(array.data))
    with pytest.raises(MessageError, match=f"ann sent {key} as {most + 1} bytes, too many for it"):
        unpack_state(record, SHAPES, "ann", dtype)


@pytest.mark.parametrize("name", ["answer", "local_weights", "train_global/text", "global/x/n"])
def test_what_was_not_declared_does_not_leave(name):
    with pytest.raises(MessageError, match=f"not declared and stay here: {name}"):
        build_reply(build_request(), "ann", 1, {name: 1.0}, {})
    with pytest.raises(MessageError, match="not declared"):
        build_reply(build_request(), "ann", 1, {}, {name: "secret"})


def test_a_reply_reads_back():
    metrics = {"num-examples": 3, "train_global/train_loss": 0.5, "peak_memory_bytes": 2**36}
    metrics |= {"train_global+local/peak_memory_bytes": 2**36}
    reply = build_reply(
        build_request(), "ann", 2, metrics, {"device": "CPU"}, STATE, "bfloat16", SHAPES
    )
    read = read_reply(reply, "ann", 2)
    assert (read.metrics, read.facts) == (metrics, {"device": "CPU"})
    assert set(read.arrays) == set(STATE)


@pytest.mark.parametrize(("client", "server_round"), [("bob", 2), ("ann", 1)])
def test_a_reply_of_another_client_or_round_is_refused(client, server_round):
    reply = build_reply(build_request(), "ann", 2, {}, {})
    with pytest.raises(MessageError, match="answered as 'ann' for round 2"):
        read_reply(reply, client, server_round)


def test_an_error_or_an_undeclared_metric_in_a_reply_is_named():
    about = ConfigRecord({"client-id": "ann", "error": "out of paper"})
    with pytest.raises(MessageError, match="ann: out of paper"):
        read_reply(Message(RecordDict({ABOUT_RECORD: about}), reply_to=build_request()), "ann", 1)
    reply = build_reply(build_request(), "ann", 1, {}, {})
    reply.content.metric_records["metrics"]["secret"] = 1
    with pytest.raises(MessageError, match="not declared"):
        read_reply(reply, "ann", 1)


def test_facts_are_plain_json():
    reply = build_reply(build_request(), "ann", 1, {}, {"device": "CPU"})
    assert json.loads(reply.content.config_records[ABOUT_RECORD]["facts"]) == {"device": "CPU"}


def test_the_bytes_of_a_message_grow_by_what_is_put_in():
    task = Task(
        "", 0, -1, "", "", False, "run", "", "", "", "{}"
    )  # with empty texts, as when checking in
    without, arrays = count_bytes(build_task_content(task))
    assert without > 60 and arrays == 0
    packed = pack_state(STATE)
    both, arrays = count_bytes(build_task_content(task, packed))
    assert arrays == sum(len(array.data) for array in packed.values())
    assert both == without + arrays + sum(map(len, STATE))
    longer, _ = count_bytes(
        build_task_content(Task("", 0, -1, "", "", False, "run", "", "", "", "{}" * 10))
    )
    assert longer == without + 18


def test_traffic_is_counted_by_client_and_direction():
    traffic, request = Traffic(), build_request()
    request.content = build_task_content(
        Task("ann", 1, 0, "", "", False, "r", "", "", "", ""), pack_state(STATE)
    )
    traffic.add("ann", "down", request)
    reply = build_reply(request, "ann", 1, {"num-examples": 3}, {}, STATE, shapes=SHAPES)
    traffic.add("ann", "up", reply)
    traffic.add("bob", "up", build_error_reply(request, "bob", "out of paper"))
    traffic.add("cy", "up", Message(Error(code=0), reply_to=request))
    ann, bob = traffic.by_client["ann"], traffic.by_client["bob"]
    assert ann["adapter_bytes_up"] == ann["adapter_bytes_down"] == count_bytes(request.content)[1]
    assert ann["bytes_down"] == count_bytes(request.content)[0] > ann["adapter_bytes_down"]
    assert bob["bytes_up"] > len("out of paper") and bob["bytes_down"] == 0
    assert set(traffic.by_client["cy"].values()) == {0}
