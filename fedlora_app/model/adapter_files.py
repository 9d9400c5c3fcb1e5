"""Adapters on disk: PEFT folders, written atomically and checked when they are read.

So are plain files of an adapter's tensors, which are no adapter by themselves.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from fedlora_app.foundation.files import (
    WEIGHTS_FILE,
    hash_file,
    replace_folder,
    write_atomically,
)
from fedlora_app.model.adapter_state import MAX_SHOWN_CHARS, AdapterError, AdapterState, check_state
from fedlora_app.model.adapters import AdaptedModel, PlainAdapter, file_config, state_shapes

CONFIG_FILE = "adapter_config.json"
ROLE_KEY = "fedlora_role"
FP32_BYTES = 4
HEADER_LENGTH_BYTES = 8
"""What a safetensors file begins with: the length of its table of contents."""
MAX_HEADER_BYTES = 8 << 20
"""Room for a table of some 50,000 tensors, beside their values."""
MAX_CONFIG_BYTES = 1 << 20
COMPARED = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "lora_bias"),
    *("use_rslora", "use_dora", "use_qalora", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layers_to_transform", "layer_replication", "exclude_modules"),
)
"""Settings of PEFT that change what an adapter adds, beside the modules that it is on."""


def save_adapter(
    folder: Path, model: AdaptedModel, name: str, state: AdapterState, base_name: str
) -> str:
    """Write a PEFT folder atomically and return its weights' sha256.

    The folder loads with ``PeftModel.from_pretrained(base, folder)``.
    """
    check_state(state, state_shapes(model, name), f"{folder}")
    with replace_folder(folder) as partial:
        _write_peft_files(partial, file_config(model, name), state, base_name, {ROLE_KEY: name})
    return hash_file(folder / WEIGHTS_FILE)


def save_plain_adapter(folder: Path, adapter: PlainAdapter, base_name: str) -> None:
    """Write the two files of a PEFT folder, as PEFT itself would, into an existing folder."""
    _write_peft_files(
        folder, adapter.peft_config.to_dict(), adapter.state, base_name, {"format": "pt"}
    )


def load_adapter(
    folder: Path,
    model: AdaptedModel,
    name: str,
    base_name: str,
    *,
    within: Path | None = None,
    sha256: str | None = None,
) -> AdapterState:
    """Read an adapter that was saved in this role, for this base and with these shapes.

    Only safetensors and JSON are read, each once and after its size; other files are left alone.

    Args:
        within: the run directory that a link may not lead out of; the folder itself with None.
        sha256: what the weight file's hash must be.

    Raises:
        AdapterError: the folder is missing, damaged or belongs to something else.
    """
    weights, config_path = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    shapes = state_shapes(model, name)
    expected = (
        f"a PEFT folder with {CONFIG_FILE} and {WEIGHTS_FILE}; a {name} adapter is never silently "
        "restarted."
    )
    content, config = (
        _read_adapter_file(path, limit, within or folder, expected)
        for path, limit in ((weights, _largest_file(shapes)), (config_path, MAX_CONFIG_BYTES))
    )
    _require_hash(weights, content, sha256)
    stored = _parse_object(config, config_path)
    stored_base = stored.get("base_model_name_or_path")
    role, state = _parse_weights(content, weights)
    if role != name:
        found_role = str(role)[:MAX_SHOWN_CHARS]
        raise AdapterError(f"{folder} holds the adapter of role {found_role!r}, expected {name!r}.")
    if stored_base != base_name:
        raise AdapterError(
            f"{folder} was trained on the base model {str(stored_base)[:MAX_SHOWN_CHARS]!r}, and "
            f"this run uses {base_name!r}."
        )
    _require_fp32(state, str(folder))
    check_state(state, shapes, str(folder))
    _require_config(stored, file_config(model, name), shapes, config_path)
    return state


def save_tensors(path: Path, state: AdapterState) -> str:
    """Write some of an adapter's tensors to a safetensors file atomically; return its sha256."""
    content = save({key: state[key].contiguous().clone() for key in sorted(state)})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(
    path: Path,
    shapes: dict[str, torch.Size] | None,
    *,
    within: Path,
    sha256: str,
    expected: str,
) -> AdapterState:
    """Read what ``save_tensors`` has written.

    Args:
        shapes: of all of the adapter's tensors, any of which may be in the file; None for tensors
            that are not an adapter's, of which the hash alone tells what they are.
        within: the run directory that a link may not lead out of.
        expected: what the file should hold, and what follows where it is not there.

    Raises:
        AdapterError: the file is missing, damaged or belongs to something else.
    """
    if shapes is not None:
        largest = _largest_file(shapes)
    else:  # what is not there is said below
        largest = path.stat().st_size if path.is_file() else 0
    content = _read_adapter_file(path, largest, within, expected)
    _require_hash(path, content, sha256)
    _, state = _parse_weights(content, path)
    if shapes is None:
        return state
    _require_fp32(state, str(path))
    check_state(state, {key: shapes[key] for key in state if key in shapes}, str(path))
    return state


def require_file(path: Path, sha256: str) -> None:
    """Raise ``AdapterError`` unless a file that a run resumes with is there and as it was written.

    Args:
        sha256: its hash as the server knows it, empty where it does not.
    """
    if not path.is_file():
        raise AdapterError(
            f"{path} does not exist, and the run is to resume with it. Restore it, or resume from "
            "an earlier round."
        )
    if sha256 and hash_file(path) != sha256:
        raise AdapterError(
            f"{path} is damaged: its sha256 is not that of the file that the run wrote. Restore "
            "it, or resume from an earlier round."
        )


def _largest_file(shapes: dict[str, torch.Size]) -> int:
    return MAX_HEADER_BYTES + sum(FP32_BYTES * shape.numel() for shape in shapes.values())


def _require_hash(path: Path, content: bytes, sha256: str | None) -> None:
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise AdapterError(
            f"{path} is not the file that was written: its sha256 begins with {found[:12]}, "
            f"expected {sha256[:12]}. Restore it."
        )


def _require_config(
    stored: dict[str, Any], ours: dict[str, Any], shapes: dict[str, torch.Size], path: Path
) -> None:
    """Raise unless a file describes the adapter as which its tensors are used here."""

    def refuse(key: str, expected: object) -> None:
        raise AdapterError(
            f"{path} has {key} {str(stored.get(key))[:MAX_SHOWN_CHARS]!r}, expected {expected!r}. "
            "It is not the file that was written with these weights. Restore it."
        )

    ours = json.loads(json.dumps(ours, default=_jsonable))
    for key in COMPARED:
        if key in stored and stored[key] != ours[key]:
            refuse(key, ours[key])
    targets = stored.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        refuse("target_modules", sorted(ours["target_modules"]))
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in shapes}
    meant = [{name for name in names if f".{name}".endswith(f".{end}")} for end in targets]
    if not all(meant) or set().union(*meant) != names:
        refuse("target_modules", sorted(ours["target_modules"]))


def _require_fp32(state: AdapterState, what: str) -> None:
    for key, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise AdapterError(f"{what}: {key} holds {tensor.dtype}, expected torch.float32.")


def _read_adapter_file(path: Path, largest: int, within: Path, expected: str) -> bytes:
    """Return the content of a regular file that lies, links followed, inside ``within``."""
    try:
        if path.exists() and not path.resolve().is_relative_to(within.resolve()):
            raise AdapterError(f"{path} is a link that leads out of {within}. Put a copy there.")
        if not path.is_file():
            raise AdapterError(
                f"{path} does not exist or is not a regular file. Expected {expected}"
            )
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to themselves
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if len(content) > largest:
        raise AdapterError(
            f"{path} has more than {largest} bytes, which it cannot have with this rank and base "
            "model. It is damaged, or another adapter's."
        )
    return content


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} is damaged: it does not hold an object.")
    return value


def _parse_weights(content: bytes, path: Path) -> tuple[str | None, AdapterState]:
    """Return the role that a safetensors file names, and its tensors sorted by key."""
    try:
        state = load(content)
        size = int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
        header = json.loads(content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + size])
        role = (header.get("__metadata__") or {}).get(ROLE_KEY)
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    return role, dict(sorted(state.items()))


def _write_peft_files(
    folder: Path,
    config: dict[str, Any],
    state: AdapterState,
    base_name: str,
    metadata: dict[str, str],
) -> None:
    """Write configuration and weights, the same bytes for the same values.

    Args:
        metadata: one entry only, because safetensors orders several at random.
    """
    content = config | {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    (folder / CONFIG_FILE).write_text(
        json.dumps(content, indent=2, sort_keys=True, default=_jsonable) + "\n", encoding="utf-8"
    )
    tensors = {key: state[key].contiguous() for key in sorted(state)}
    owners = {tensor.data_ptr(): key for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if owners[tensor.data_ptr()] != key:  # Flower sends equal arrays once, as one memory
            tensors[key] = tensor.clone()
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(errno.EIO, str(error), str(folder / WEIGHTS_FILE)) from error


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)
