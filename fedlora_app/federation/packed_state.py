"""An adapter on its way: all tensors of a state end to end in one array.

Flower makes a request and a transaction of every array, on each hop, so that a message with one
array costs it little and one with hundreds seconds. The tensors lie in the order of their names.
What they are called and how they are shaped is not in the array: both ends know it from the
experiment, and the array's key is a hash by which they notice where they do not agree. Flower cuts
what is long into chunks of 5 MB itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedlora_app.federation.quantised import (
    WIRE_DTYPES,
    count_upload_bytes,
    count_wire_bytes,
    dequantise,
    is_quantised,
    quantise,
)
from fedlora_app.model.adapter_state import AdapterError, AdapterState, check_state

MAX_ARRAY_HEADER_BYTES = 4096
NUMPY_FORMAT = "numpy.ndarray"  # what Flower calls it


class MessageError(ValueError):
    """A message is not what was agreed on; the text says who sent it and what is wrong."""


def pack_state(state: AdapterState, dtype: str = "float32") -> ArrayRecord:
    """Return a state as one Flower array, which is one copy of its bytes.

    bfloat16 travels as its 16 bits, int8 and nf4 as bytes.
    """
    wire_dtype = np.dtype(WIRE_DTYPES[dtype])
    shapes = {key: tensor.shape for key, tensor in state.items()}
    length = sum(_count_values(shape, dtype) for shape in shapes.values())
    stream = io.BytesIO()  # numpy's own format, written without a tensor of all tensors
    header = {"descr": wire_dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, header)
    for key in sorted(state):
        stream.write(_to_wire(state[key], dtype))
    array = Array(str(wire_dtype), (length,), NUMPY_FORMAT, stream.getvalue())
    return ArrayRecord({hash_layout(shapes): array})


def unpack_state(
    record: ArrayRecord, shapes: Mapping[str, torch.Size], sender: str, dtype: str = "float32"
) -> AdapterState:
    """Return the fp32 state in a record after checking its layout, dtype, length and values.

    The tensors of an fp32 record are views of its bytes, which are only to be read.

    Args:
        shapes: of the tensors that it must hold.

    Raises:
        MessageError, AdapterError: naming the sender, and the tensor whose values are wrong.
    """
    if list(record) != [hash_layout(shapes)]:
        raise AdapterError(
            f"{sender} sent another adapter than the {len(shapes)} tensors that are expected here: "
            "their names or shapes differ. Compare at both ends the base model, "
            "adapters.target_modules, the clients' ranks and federated.aggregation."
        )
    (array,) = record.values()
    wire_dtype = WIRE_DTYPES[dtype]
    if array.dtype != wire_dtype:
        raise MessageError(
            f"{sender} sent its adapter as {array.dtype:.50}, expected {wire_dtype} (for {dtype})."
        )
    most = count_upload_bytes(shapes, dtype) + MAX_ARRAY_HEADER_BYTES
    if len(array.data) > most:
        raise MessageError(
            f"{sender} sent its adapter as {len(array.data)} bytes, expected at most {most}."
        )
    try:
        values = _view_array(array)
    except Exception as error:  # numpy raises nearly anything for damaged bytes
        reason = str(error)[:200]
        raise MessageError(f"{sender} sent its adapter as a damaged array: {reason!a}.") from None
    lengths = {key: _count_values(shapes[key], dtype) for key in sorted(shapes)}
    expected = (sum(lengths.values()),)
    if values.shape != expected:
        raise MessageError(
            f"{sender} sent its adapter in an array of shape {tuple(values.shape)}, expected "
            f"{expected}."
        )
    parts = dict(zip(lengths, values.split(list(lengths.values())), strict=True))
    state = {key: _from_wire(parts[key], shape, dtype) for key, shape in shapes.items()}
    check_state(state, dict(shapes), f"{sender} sent")
    return state


def hash_layout(shapes: Mapping[str, torch.Size]) -> str:
    """Return the sha256 of tensors' names and shapes, by which both ends name what travels."""
    layout = json.dumps([[key, list(shapes[key])] for key in sorted(shapes)])
    return hashlib.sha256(layout.encode()).hexdigest()


def _count_values(shape: torch.Size, dtype: str) -> int:
    """Return how many of the array's values are a tensor's."""
    return count_wire_bytes(shape.numel(), dtype) // np.dtype(WIRE_DTYPES[dtype]).itemsize


def _view_array(array: Array) -> torch.Tensor:
    """Return what an array holds in numpy's own format, without a copy and without pickle."""
    if array.stype != NUMPY_FORMAT:
        raise TypeError(f"it is of type {array.stype!r:.50}")
    stream = io.BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("its version is not 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if is_fortran or dtype != array.dtype:
        raise TypeError("it holds something else than it says")
    values = np.frombuffer(array.data, dtype, offset=stream.tell())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values.reshape(shape))


def _from_wire(values: torch.Tensor, shape: torch.Size, dtype: str) -> torch.Tensor:
    """Return the fp32 tensor of this shape that its part of the array stands for."""
    if is_quantised(dtype):
        return dequantise(values, shape, dtype)
    if dtype == "bfloat16":
        values = values.view(torch.bfloat16).float()
    return values.reshape(shape)


def _to_wire(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """Return a tensor's part of the array."""
    if is_quantised(dtype):
        return quantise(tensor, dtype).numpy()
    values = tensor.contiguous()
    if dtype == "bfloat16":
        return values.bfloat16().view(torch.uint16).numpy()
    return values.float().numpy()
