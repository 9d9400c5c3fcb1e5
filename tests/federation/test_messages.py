from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from random_states import SHAPES, STATE

from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    DECLARED_METRICS,
    MAX_ARRAY_HEADER_BYTES,
    MessageError,
    build_reply,
    is_possible,
    pack_state,
    unpack_state,
)
from fedlora_app.federation.quantised import (
    WIRE_DTYPES,
    count_wire_bytes,
    dequantise,
    quantise,
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


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_an_array_of_more_bytes_than_its_tensor_has_is_refused_unread(dtype):
    key, tensor = next(iter(STATE.items()))
    record = pack_state(STATE, dtype)
    array = record[key]
    most = count_wire_bytes(tensor.numel(), dtype) + MAX_ARRAY_HEADER_BYTES
    array.data += b"x" * (most + 1 - len(array.data))
    with pytest.raises(MessageError, match=f"ann sent {key} as {most + 1} bytes, too many for it"):
        unpack_state(record, SHAPES, "ann", dtype)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_rounded_tensors_travel_as_bytes_and_come_back_as_they_were_rounded(dtype):
    record = pack_state(STATE, dtype)
    assert {array.dtype for array in record.values()} == {"uint8"}
    back = unpack_state(record, SHAPES, "ann", dtype)
    for key, tensor in STATE.items():
        expected = dequantise(quantise(tensor, dtype), tensor.shape, dtype)
        assert torch.equal(back[key], expected) and not torch.equal(back[key], tensor)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda wire: wire[:-1], r"damaged array: .it has shape \(\d+,\), expected \(\d+,\)"),
        (lambda wire: np.append(wire, wire[-1:]), "damaged array: .it has shape"),
        (lambda wire: wire[None], "damaged array: .it has shape"),
        (lambda wire: wire[:0], "damaged array: .it has shape"),
        (lambda wire: wire.astype(np.int8), "as int8, expected uint8"),
        (lambda wire: wire.astype(np.float32), "as float32, expected uint8"),
        (lambda wire: with_scale(wire, np.nan), "not finite"),
        (lambda wire: with_scale(wire, np.inf), "not finite"),
    ],
)
def test_bytes_that_no_rounding_gives_are_refused(dtype, spoil, expected):
    record = pack_state(STATE, dtype)
    key = next(iter(STATE))
    record[key] = Array(spoil(record[key].numpy()))
    with pytest.raises((MessageError, AdapterError), match=f"ann sent.*{key}.*{expected}"):
        unpack_state(record, SHAPES, "ann", dtype)


def with_scale(wire: np.ndarray, scale: float) -> np.ndarray:
    return np.concatenate([np.array([scale], np.float32).view(np.uint8), wire[4:]])


@pytest.mark.parametrize("name", ["answer", "local_weights", "train_global/text", "global/x/n"])
def test_what_was_not_declared_does_not_leave(name):
    with pytest.raises(MessageError, match=f"not declared and stay here: {name}"):
        build_reply(build_request(), "ann", 1, {name: 1.0}, {})
    with pytest.raises(MessageError, match="not declared"):
        build_reply(build_request(), "ann", 1, {}, {name: "secret"})


def test_facts_are_plain_json():
    reply = build_reply(build_request(), "ann", 1, {}, {"device": "CPU"})
    assert json.loads(reply.content.config_records[ABOUT_RECORD]["facts"]) == {"device": "CPU"}
