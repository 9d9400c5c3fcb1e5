"""What a reply must hold beyond its form before it counts: facts, a weight, an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlora_app.federation.messages import MessageError, Reply, unpack_state
from fedlora_app.model.adapters import AdapterState


def require_facts(expected: Sequence[str], reply: Reply) -> None:
    """Raise ``MessageError`` unless a client says all that is expected of it."""
    for name in expected:
        if name not in reply.facts:
            what = name.replace("_", " ")
            raise MessageError(f"{reply.client_id} did not say which {what} it holds.")


def require_examples(reply: Reply, most: int) -> int:
    """Return the number of examples that a client trained on, which is its weight.

    Args:
        most: how many it had when it registered.

    Raises:
        MessageError: it is not a number from 1 to ``most``.
    """
    num_examples = reply.metrics.get("num-examples")
    if not isinstance(num_examples, int) or num_examples < 1:
        raise MessageError(
            f"{reply.client_id} reports {num_examples!r} examples; at least 1 is needed."
        )
    if num_examples > most:
        raise MessageError(
            f"{reply.client_id} reports {num_examples} examples, and at registration it had "
            f"{most}. They would be its weight in the mean."
        )
    return num_examples


def require_update(reply: Reply, shapes: dict[str, torch.Size], dtype: str) -> AdapterState:
    """Return the update of the global adapter in a reply, fp32.

    Args:
        dtype: in which it travelled.

    Raises:
        MessageError: there is none, or its names, shapes, dtype or values are not possible.
    """
    if reply.arrays is None:
        raise MessageError(f"{reply.client_id} sent no update.")
    return unpack_state(reply.arrays, shapes, reply.client_id, dtype)
