"""A client's gate on its disk, where the rounds, later evaluations and exports find it.

Two files: ``gate.safetensors``, and ``gate.json``, which says how the features are made and what
the gate was fitted to. Both derive from the client's own questions, and stay where its local
adapter stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedlora_app.config.schema import ClientConfig
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.evaluation.feature_space import Space
from fedlora_app.evaluation.fitted_files import (
    UNREADABLE,
    About,
    about_file,
    load_fitted,
    save_fitted,
    tensors_file,
)
from fedlora_app.evaluation.gate import Gate, GateFigures
from fedlora_app.evaluation.gate_fit import fit_gate
from fedlora_app.evaluation.prompt_features import DESCRIPTION
from fedlora_app.foundation.files import make_private_dir, replace_folder
from fedlora_app.model.adapters import AdaptedModel
from fedlora_app.model.base import LoadedModel

FORMAT = 2
NAME = "gate"
PARTS = ("is_local", "coefficients", "floor", "foreign")
"""Tensors that are not of one feature, named and in the order of ``Gate``'s fields."""
TENSORS_FILE = tensors_file(NAME)
ABOUT_FILE = about_file(NAME)
RULE = (
    "A feature x becomes c + basis ((basis^T c) * gains) with c = x - centre, divided by its "
    "length; a similarity is the mean over the features of its inner product with a row of means. "
    "With l and u the largest similarities to local and to universal rows, the local adapter "
    "answers where coefficients[0] l + coefficients[1] u + coefficients[2] > 0, l >= floor and no "
    "token of the prompt is in foreign."
)


def find_gate(
    folder: Path,
    model: AdaptedModel,
    loaded: LoadedModel,
    client: ClientConfig,
    files: ClientFiles,
    *,
    keep: bool = False,
) -> Gate | None:
    """Return the gate in ``folder`` if it was fitted to the same, or fit one.

    Args:
        keep: a new one is written there.

    Returns:
        None where the client has local or universal questions only.
    """
    about = describe_origin(loaded.fingerprint, client, files.hashes)
    if (kept := load_gate(folder, about, client.system_prompt)) is not None:
        return kept
    records = (files.local.records, files.universal.records)
    gate = fit_gate(model, loaded.tokenizer, client.system_prompt, *records)
    if keep and gate is not None:
        make_private_dir(folder.parent)
        with replace_folder(folder) as partial:
            save_gate(partial, gate, about)
    return gate


def describe_origin(
    fingerprint: str, client: ClientConfig, hashes: Mapping[str, str | None]
) -> About:
    """Return what a client's gate is fitted to, on the base model of this fingerprint.

    Args:
        hashes: of its data files, as ``ClientFiles.hashes`` and a run's manifest name them.
    """
    return {
        "base_model": fingerprint,
        "system_prompt": hashlib.sha256(client.system_prompt.encode()).hexdigest(),
        "local_train": hashes.get("sha256/local_train"),
        "universal_train": hashes.get("sha256/universal_train"),
    }


def save_gate(folder: Path, gate: Gate, about: About, **more: Any) -> None:
    """Write a gate's two files into an existing folder.

    Args:
        more: what else its JSON says.
    """
    tensors = {name: getattr(gate, name) for name in PARTS}
    for name, space, means in zip(DESCRIPTION, gate.spaces, gate.means, strict=True):
        parts = {"centre": space.centre, "basis": space.basis, "gains": space.gains, "means": means}
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    content = {
        "format": FORMAT,
        "fitted_to": dict(about),
        "features": DESCRIPTION,
        "rule": RULE,
        "prompt": "system prompt and one question by the base model's chat template, up to where "
        "the answer begins; no adapter active",
        "figures": asdict(gate.figures),
        **more,
    }
    save_fitted(folder, NAME, tensors, content)


def load_gate(folder: Path, about: About, system_prompt: str = "") -> Gate | None:
    """Return a gate that was saved, or None where there is none that was fitted to the same.

    A damaged one, or one that links lead to, is none either.

    Args:
        system_prompt: the client's own, of which ``about`` has the hash.
    """
    try:
        if (found := load_fitted(folder, NAME, FORMAT, about)) is None:
            return None
        tensors, content = found
        spaces = [
            Space(*(tensors[f"{name}.{part}"] for part in ("centre", "basis", "gains")))
            for name in DESCRIPTION
        ]
        means = tuple(tensors[f"{name}.means"] for name in DESCRIPTION)
        figures = GateFigures(**content["figures"])
        parts = (tensors[name] for name in PARTS)
        gate = Gate(tuple(spaces), means, *parts, figures, system_prompt)
        figures.metrics()
        return gate if _is_whole(gate) else None
    except UNREADABLE:
        return None  # it is fitted again


def _is_whole(gate: Gate) -> bool:
    """Return whether shapes, dtypes and values are such as ``separate`` makes them."""
    parts = [(gate.coefficients, (3,)), (gate.floor, ())]
    for space, means in zip(gate.spaces, gate.means, strict=True):
        size, rank = len(space.centre), len(space.gains)
        parts += [(space.centre, (size,)), (space.basis, (size, rank)), (space.gains, (rank,))]
        parts += [(means, (len(gate.is_local), size))]
    kinds = set(gate.is_local.tolist())
    return (
        gate.is_local.dtype == torch.bool
        and gate.foreign.dtype == torch.int64
        and gate.foreign.dim() == 1
        and kinds == {True, False}
        and all(t.shape == shape and t.dtype == torch.float32 for t, shape in parts)
        and all(bool(t.isfinite().all()) for t, _ in parts)
    )
