from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from random_states import SHAPES, STATE, draw_state

from fedlora_app.federation.messages import UPDATE_RECORD, MessageError
from fedlora_app.federation.packed_state import MAX_ARRAY_HEADER_BYTES, pack_state, unpack_state
from fedlora_app.federation.quantised import (
    WIRE_DTYPES,
    count_upload_bytes,
    dequantise,
    quantise,
)
from fedlora_app.model.adapter_state import AdapterError


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_a_message_has_as_many_objects_whatever_the_number_of_tensors(dtype, flower_identity):
    """Flower makes a request and a transaction of each, on every hop."""

    def count_objects(num_tensors: int) -> int:
        state = draw_state(0, {f"layer {n}": torch.Size([4, 3]) for n in range(num_tensors)})
        content = RecordDict({UPDATE_RECORD: pack_state(state, dtype)})
        message = Message(content, dst_node_id=5, message_type="train")
        return len(get_all_nested_objects(message))

    assert count_objects(100) == count_objects(1) == 5


def test_fp32_travels_exactly_and_bf16_to_its_precision():
    exact = unpack_state(pack_state(STATE), SHAPES, "ann")
    rounded = unpack_state(pack_state(STATE, "bfloat16"), SHAPES, "ann", "bfloat16")
    for key, tensor in STATE.items():
        assert torch.equal(exact[key], tensor)
        assert torch.equal(rounded[key], tensor.bfloat16().float())
    assert list(exact) == list(rounded) == list(SHAPES)


def test_the_array_is_numpys_own_and_its_tensors_are_in_the_order_of_their_names():
    backwards = dict(reversed(STATE.items()))
    (array,) = pack_state(backwards).values()
    (other,) = pack_state(STATE).values()
    assert list(backwards) != sorted(backwards) and array.data == other.data
    expected = np.concatenate([STATE[key].numpy().ravel() for key in sorted(STATE)])
    assert array.data == Array(expected).data
    assert np.array_equal(array.numpy(), expected)


def test_a_tensor_that_is_not_contiguous_travels_by_its_values():
    turned = {key: tensor.T for key, tensor in STATE.items()}
    shapes = {key: tensor.shape for key, tensor in turned.items()}
    assert not all(tensor.is_contiguous() for tensor in turned.values())
    for dtype in ("float32", "bfloat16"):
        back = unpack_state(pack_state(turned, dtype), shapes, "ann", dtype)
        expected = {
            k: v.bfloat16().float() if dtype == "bfloat16" else v for k, v in turned.items()
        }
        assert all(torch.equal(back[key], expected[key]) for key in turned)


def test_fp32_tensors_are_views_of_the_bytes_that_came():
    record = pack_state(STATE)
    (array,) = record.values()
    state = unpack_state(record, SHAPES, "ann")
    start = np.frombuffer(array.data, np.uint8).ctypes.data
    for tensor in state.values():
        assert start < tensor.data_ptr() < start + len(array.data)


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"other": torch.zeros(1)},
        lambda s: {k: v for k, v in s.items() if "lora_A" in k},
        lambda s: {k: v.T.contiguous() for k, v in s.items()},  # of the same size,
        lambda s: dict(zip(s, reversed(s.values()), strict=True)),
        lambda s: {f"other {k}": v for k, v in s.items()},
        lambda s: {"all": torch.cat([v.flatten() for v in s.values()])},
    ],
)
def test_another_adapter_is_refused_also_one_of_the_same_size(change, dtype):
    with pytest.raises(AdapterError, match="ann sent another adapter than the 2 tensors that are"):
        unpack_state(pack_state(change(STATE), dtype), SHAPES, "ann", dtype)


def test_more_than_one_array_or_none_is_refused():
    for record in (pack_state(STATE), ArrayRecord()):
        record["x"] = Array(np.ones(1, np.float32))
        with pytest.raises(AdapterError, match="ann sent another adapter"):
            unpack_state(record, SHAPES, "ann")
    with pytest.raises(AdapterError, match="ann sent another adapter"):
        unpack_state(ArrayRecord(), SHAPES, "ann")


@pytest.mark.parametrize("key", STATE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(key, value):
    state = STATE | {key: STATE[key].clone().fill_(value)}
    with pytest.raises(AdapterError, match=f"ann sent: {key} holds values that are not finite"):
        unpack_state(pack_state(state), SHAPES, "ann")


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_more_bytes_than_the_adapter_has_are_refused_unread(dtype):
    record = pack_state(STATE, dtype)
    (array,) = record.values()
    most = count_upload_bytes(SHAPES, dtype) + MAX_ARRAY_HEADER_BYTES
    array.data += b"x" * (most + 1 - len(array.data))
    with pytest.raises(MessageError, match=f"ann sent .* as {most + 1} bytes, expected at most"):
        unpack_state(record, SHAPES, "ann", dtype)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_rounded_tensors_travel_as_bytes_and_come_back_as_they_were_rounded(dtype):
    record = pack_state(STATE, dtype)
    assert {array.dtype for array in record.values()} == {"uint8"}
    back = unpack_state(record, SHAPES, "ann", dtype)
    for key, tensor in STATE.items():
        expected = dequantise(quantise(tensor, dtype), tensor.shape, dtype)
        assert torch.equal(back[key], expected) and not torch.equal(back[key], tensor)


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda wire: wire[:-1], r"in an array of shape \(\d+,\), expected \(\d+,\)"),
        (lambda wire: np.append(wire, wire[-1:]), "in an array of shape"),
        (lambda wire: wire[None], "in an array of shape"),
        (lambda wire: wire[:0], "in an array of shape"),
        (lambda wire: wire.astype(np.int16), "as int16, expected u?(int|float)[0-9]+ "),
        (lambda wire: wire.astype(np.float64), "as float64, expected u?(int|float)[0-9]+ "),
    ],
)
def test_an_array_of_another_dtype_or_length_is_refused(dtype, spoil, expected):
    record = pack_state(STATE, dtype)
    ((key, array),) = record.items()
    record[key] = Array(spoil(array.numpy()))
    with pytest.raises(MessageError, match=f"ann sent its adapter {expected}"):
        unpack_state(record, SHAPES, "ann", dtype)


def test_codes_of_another_width_are_refused():
    with pytest.raises(MessageError, match="ann sent its adapter in an array of shape"):
        unpack_state(pack_state(STATE, "nf4"), SHAPES, "ann", "int8")


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_no_rounding_gives_are_refused_with_their_tensor(dtype, scale):
    record = pack_state(STATE, dtype)
    ((name, array),) = record.items()
    first = np.array([scale], np.float32).view(np.uint8)
    record[name] = Array(np.concatenate([first, array.numpy()[4:]]))
    with pytest.raises(AdapterError, match=f"ann sent: {min(STATE)} holds values that are not fin"):
        unpack_state(record, SHAPES, "ann", dtype)
