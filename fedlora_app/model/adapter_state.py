"""An adapter's weights as a dictionary, and whether they are what is expected.

A *state* holds fp32 CPU tensors under PEFT's file keys, which do not name the adapter; so it always
travels and is stored together with its role.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedlora_app.foundation.errors import UserError

MAX_SHOWN_CHARS = 200

AdapterState = dict[str, torch.Tensor]


class AdapterError(UserError):
    """An adapter does not fit: other names, shapes, rank or base, or a damaged file."""


def check_state(state: AdapterState, shapes: dict[str, torch.Size], what: str) -> None:
    """Raise ``AdapterError`` unless names and shapes agree and every value is finite."""
    check_names(state, shapes, what)
    for key, shape in shapes.items():
        if state[key].shape != shape:
            raise AdapterError(
                f"{what}: {key} has shape {tuple(state[key].shape)}, expected {tuple(shape)} "
                "(another rank or another base model)."
            )
        if not all(map(torch.isfinite, state[key].aminmax())):  # NaN wins over every number
            raise AdapterError(f"{what}: {key} holds values that are not finite.")


def compute_norm(state: AdapterState) -> float:
    """Return the L2 norm of all of a state's values together."""
    return torch.stack([tensor.double().norm() for tensor in state.values()]).norm().item()


def check_names(names: Iterable[str], shapes: dict[str, torch.Size], what: str) -> None:
    """Raise ``AdapterError`` unless the tensors' names are those of the adapter."""
    names = set(names)
    missing, extra = sorted(set(shapes) - names), sorted(names - set(shapes))
    if missing or extra:
        raise AdapterError(
            f"{what}: {len(missing)} tensors are missing{_first(missing)} and {len(extra)} are "
            f"unknown{_first(extra)}. Expected an adapter of the same base and target_modules."
        )


def _first(names: list[str]) -> str:
    if not names:
        return ""
    first = names[0] if names[0].isprintable() else ascii(names[0])
    return f" ({first[:MAX_SHOWN_CHARS]}{', ...' if len(names) > 1 else ''})"
