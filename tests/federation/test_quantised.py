from __future__ import annotations

import pytest
import torch
from families import QWEN_7B
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from transformers import Qwen2Config, Qwen2ForCausalLM

from fedlora_app.config.schema import GLOBAL, AdaptersConfig
from fedlora_app.federation.messages import UPDATE_RECORD
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.federation.quantised import (
    BLOCK_SIZE,
    CODE_BITS,
    count_upload_bytes,
    count_wire_bytes,
    dequantise,
    feed_back,
    quantise,
)
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import attach_adapters, state_shapes

LARGEST_GAP = {"int8": 2 / 254, "nf4": 1 - 0.6961928}
"""Between neighbouring levels, of a block whose largest value is 1."""
MOST_BYTES = 22_000_000

both_dtypes = pytest.mark.parametrize("dtype", CODE_BITS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def send(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return dequantise(quantise(tensor, dtype), tensor.shape, dtype)


@both_dtypes
@pytest.mark.parametrize(
    "shape", [(1,), (2, 1), (3,), (127,), (1, 129), (2, 3), (8, 16), (5, 77), (16, 3584)]
)
def test_every_value_comes_back_to_half_a_level_of_its_block(dtype, shape):
    tensor = draw(*shape)
    wire = quantise(tensor, dtype)
    assert wire.dtype == torch.uint8 and wire.shape == (count_wire_bytes(tensor.numel(), dtype),)
    assert torch.equal(wire, quantise(tensor.clone(), dtype))
    back = dequantise(wire, tensor.shape, dtype)
    assert back.shape == tensor.shape and back.dtype == torch.float32
    blocks = zip(
        *(values.flatten().split(BLOCK_SIZE) for values in (tensor, back, tensor - back)),
        strict=True,
    )
    for values, received, error in blocks:
        largest = values.abs().max()
        assert error.abs().max() <= 0.505 * LARGEST_GAP[dtype] * largest
        assert received.abs().max() == largest


@both_dtypes
def test_blocks_of_zeros_and_of_huge_or_tiny_values_come_back_finite(dtype):
    tensor = torch.cat([torch.zeros(200), torch.full((200,), 3e38), torch.full((200,), 1e-41)])
    back = send(tensor, dtype)
    assert torch.isfinite(back).all() and not back[:BLOCK_SIZE].any()


@both_dtypes
def test_the_bytes_of_a_damaged_message_cannot_be_anything_but_values(dtype):
    """Whatever codes an array holds, each stands for a value up to its block's scale."""
    wire = quantise(draw(64, 64), dtype)
    num_scale_bytes = 4 * 64 * 64 // BLOCK_SIZE
    wire[num_scale_bytes:] = torch.arange(len(wire) - num_scale_bytes).to(torch.uint8)
    scales = wire[:num_scale_bytes].view(torch.float32)
    blocks = dequantise(wire, torch.Size([64, 64]), dtype).view(-1, BLOCK_SIZE)
    assert (blocks.abs().amax(1) <= scales).all()


@both_dtypes
def test_what_is_lost_in_one_round_is_sent_in_the_next_ones(dtype):
    """sum of what the server gets + last remainder = sum of what was learnt."""
    sent, learnt, residual = torch.zeros(16, 40), torch.zeros(16, 40), {}
    plain = torch.zeros(16, 40)
    for server_round in range(12):
        update = draw(16, 40, seed=server_round) + 1e-3 * draw(16, 40, seed=99)
        owed, residual = feed_back({"a": update}, residual, dtype)
        sent += send(owed["a"], dtype)
        plain += send(update, dtype)
        learnt += update
    torch.testing.assert_close(sent + residual["a"], learnt, rtol=0, atol=1e-8)
    error, without = ((learnt - got).norm() for got in (sent, plain))
    assert error < 0.5 * without


def test_tensors_that_do_not_travel_keep_what_they_have_left():
    first = {"a": draw(4, 50), "b": draw(50, 4, seed=1)}
    _, left = feed_back(first, {}, "nf4")
    owed, later = feed_back({"b": draw(50, 4, seed=2)}, left, "nf4")
    assert set(owed) == {"b"} and set(later) == {"a", "b"}
    assert torch.equal(later["a"], left["a"]) and not torch.equal(later["b"], left["b"])
    assert torch.equal(owed["b"], draw(50, 4, seed=2) + left["b"])


def test_an_update_that_is_not_finite_is_not_rounded():
    with pytest.raises(AdapterError, match="The update: a holds values that are not finite"):
        feed_back({"a": torch.tensor([1.0, torch.nan])}, {}, "int8")


@pytest.mark.slow
def test_an_update_of_7b_is_small_enough():
    with torch.device("meta"):
        base = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B))
    shapes = state_shapes(attach_adapters(base, AdaptersConfig()), GLOBAL)
    assert sum(shape.numel() for shape in shapes.values()) == 40_370_176
    for dtype, most in (("nf4", MOST_BYTES), ("int8", 2 * MOST_BYTES)):
        # As serialised: the bytes of one real tensor of every shape, and what is around them.
        size_of = {shape: len(quantise(torch.zeros(shape), dtype)) for shape in {*shapes.values()}}
        whole = sum(size_of[shape] for shape in shapes.values())
        assert whole == count_upload_bytes(shapes, dtype)
        assert whole + serialised_bytes({"x": torch.zeros(1)}, dtype) < most


def serialised_bytes(state, dtype: str) -> int:
    record: ArrayRecord = pack_state(state, dtype)
    content = recorddict_to_proto(RecordDict({UPDATE_RECORD: record}))
    return len(content.SerializeToString())
