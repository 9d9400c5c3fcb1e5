"""The two LoRA adapters: attached to the base, filled, switched, read and written.

The only module that imports PEFT. ``y = W0 x + s_G B_G A_G x + s_L B_L A_L x``, where the
global pair (A_G, B_G) is averaged by the server and the local pair never leaves its client.
LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.

An adapter's *state* is a dictionary of fp32 CPU tensors under PEFT's file keys, which do
not name the adapter; so a state always travels and is stored together with its role.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch.nn import functional
from transformers import PreTrainedModel

from fedlora_app.config import GLOBAL, LOCAL, AdapterConfig, AdaptersConfig
from fedlora_app.errors import MendableError
from fedlora_app.model import LoadedModel
from fedlora_app.seeds import derive_seed
from fedlora_app.storage import WEIGHTS_FILE, hash_file, replace_folder

CONFIG_FILE = "adapter_config.json"
ROLE_KEY = "fedlora_role"
FP32_BYTES = 4
HEADER_LENGTH_BYTES = 8
"""What a safetensors file begins with: the length of its table of contents."""
MAX_HEADER_BYTES = 8 << 20
"""Room for a table of some 50,000 tensors, beside their values."""
MAX_CONFIG_BYTES = 1 << 20
MAX_SHOWN_CHARS = 200
FUSED_FORWARDS = "_fedlora_fused_forwards"
PLAIN = "default"
"""PEFT's own name for an only adapter."""

AdapterState = dict[str, torch.Tensor]
AdaptedModel = PeftModel
"""The base model with its adapters attached, for annotations elsewhere."""


class AdapterError(MendableError):
    """An adapter does not fit: other names, shapes, rank or base, or a damaged file."""


@dataclass(frozen=True)
class PlainAdapter:
    """One adapter of scaling 1 with the same rank at every module."""

    state: AdapterState
    rank: int
    target_modules: list[str]
    base_revision: str | None = None

    @property
    def peft_config(self) -> LoraConfig:
        """Return what PEFT and multi-LoRA servers are told about it."""
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=self.target_modules,
            bias="none",
            revision=self.base_revision,
        )


def attach_adapters(base: PreTrainedModel, config: AdaptersConfig) -> AdaptedModel:
    """Put both adapters on the base model and freeze everything.

    The modules exist once per process; their weights are set for every message.

    Raises:
        AdapterError: a target module is not there or is not linear.
    """
    detach_adapters(base)
    _check_targets(base, config)
    model = get_peft_model(base, _lora_config(config.global_), adapter_name=GLOBAL)
    model.add_adapter(LOCAL, _lora_config(config.local))
    model.requires_grad_(False)
    return model


def attach_once(loaded: LoadedModel, config: AdaptersConfig) -> AdaptedModel:
    """Return a resident base with its adapters' modules, made once per process and shape."""
    if loaded.adapted is None or loaded.adapted[0] != config:
        loaded.adapted = (config, attach_adapters(loaded.model, config))
    return loaded.adapted[1]


def detach_adapters(base: PreTrainedModel) -> None:
    """Take adapters that an earlier run in this process left off the base model."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def build_initial_state(model: AdaptedModel, name: str, seed: int) -> AdapterState:
    """Return a fresh adapter: A uniform in +-1/sqrt(in), B zero, from ``seed`` alone.

    Each tensor's values derive from the seed and its own name, so neither the order of the
    layers nor the device (the meta device included) changes them.
    """
    state = {}
    for key, shape in state_shapes(model, name).items():
        if ".lora_B." in key:
            state[key] = torch.zeros(shape)
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, name, key))
        bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5), as PEFT
        state[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return state


def state_shapes(model: AdaptedModel, name: str) -> dict[str, torch.Size]:
    """Return the shape of every tensor of an adapter, sorted by key."""
    return {key: tensor.shape for key, tensor in sorted(_parameters(model, name).items())}


def get_state(model: AdaptedModel, name: str) -> AdapterState:
    """Return a copy of an adapter's weights, fp32 on the CPU, sorted by key."""
    return {
        key: tensor.detach().to("cpu", torch.float32, copy=True)
        for key, tensor in sorted(_parameters(model, name).items())
    }


def set_state(model: AdaptedModel, name: str, state: AdapterState) -> None:
    """Overwrite every weight of an adapter.

    Raises:
        AdapterError: the state's names or shapes are not the adapter's.
    """
    check_state(state, state_shapes(model, name), f'the state for adapter "{name}"')
    set_peft_model_state_dict(model, state, adapter_name=name)


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


def check_names(names: Iterable[str], shapes: dict[str, torch.Size], what: str) -> None:
    """Raise ``AdapterError`` unless the tensors' names are those of the adapter."""
    names = set(names)
    missing, extra = sorted(set(shapes) - names), sorted(names - set(shapes))
    if missing or extra:
        raise AdapterError(
            f"{what}: {len(missing)} tensors are missing{_first(missing)} and {len(extra)} are "
            f"unknown{_first(extra)}. Expected an adapter of the same base and target_modules."
        )


def activate(model: AdaptedModel, active: Iterable[str], trainable: Iterable[str] = ()) -> None:
    """Make exactly these adapters contribute, and exactly these of them trainable.

    PEFT turns gradients on for whatever it activates, hence the explicit second step.
    """
    active, trainable = list(active), list(trainable)
    assert set(trainable) <= set(active), "an inactive adapter cannot be trained"
    if not active:
        raise ValueError("activate() needs an adapter; use base_only() for none.")
    model.base_model.set_adapter(active)
    model.requires_grad_(False)
    for name in trainable:
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)


@contextmanager
def scaled_local(model: AdaptedModel, factor: float | torch.Tensor) -> Iterator[None]:
    """Multiply what the local adapter adds by ``factor`` (lambda) while the block runs.

    Args:
        factor: a number, or one for each row of the batch as (B, 1, 1).
    """
    layers = _lora_layers(model, LOCAL)
    before = [layer.scaling[LOCAL] for layer in layers]
    for layer, scaling in zip(layers, before, strict=True):
        layer.scaling[LOCAL] = factor * scaling
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[LOCAL] = scaling


def can_fuse_adapters(model: AdaptedModel, active: Iterable[str]) -> bool:
    """Tell whether ``fused_adapters`` computes the same: without dropout it does."""
    layers = _lora_layers(model)
    dropouts = [layer.lora_dropout[n] for layer in layers for n in active if n in layer.lora_A]
    return all(isinstance(dropout, torch.nn.Identity) for dropout in dropouts)


@contextmanager
def fused_adapters(model: AdaptedModel, active: Sequence[str]) -> Iterator[None]:
    """Compute what several adapters add as one adapter of their joint rank, in the block.

    s_G B_G A_G x + s_L B_L A_L x = [s_G B_G, s_L B_L] [A_G; A_L] x: two matrix products in the
    input's dtype instead of four in the adapters'. The adapters' own parameters are what learns.

    Raises:
        AdapterError: an adapter has dropout, which would be one for both.
    """
    if not can_fuse_adapters(model, active):
        raise AdapterError(
            "Adapters with dropout cannot be fused. Set their dropout to 0, or "
            "training.fused_adapters to false."
        )
    layers = _lora_layers(model)
    for layer in layers:
        names = tuple(name for name in active if name in layer.lora_A)
        kept = layer.__dict__.setdefault(FUSED_FORWARDS, {})  # the same ones for torch.compile
        layer.forward = kept.setdefault(names, partial(_forward_fused, layer, names))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_fused(layer: LoraLayer, names: Sequence[str], inputs: torch.Tensor) -> torch.Tensor:
    """Return W0 x + B A x with the joint A (r, in) and B (out, r) of several adapters."""
    outputs = layer.base_layer(inputs)
    if not names:
        return outputs
    scaled = [layer.scaling[name] * layer.lora_B[name].weight for name in names]
    joint_b = torch.cat(scaled, dim=1).to(inputs.dtype)
    joint_a = torch.cat([layer.lora_A[name].weight for name in names]).to(inputs.dtype)
    inner = functional.linear(inputs, joint_a).flatten(0, -2)
    return torch.addmm(outputs.flatten(0, -2), inner, joint_b.T).view(outputs.shape)


def compute_overlap(model: AdaptedModel) -> torch.Tensor:
    """Return how much the adapters' input subspaces overlap, a differentiable scalar.

    The mean over modules of ||A_G A_L^T||^2 / (||A_G||^2 ||A_L||^2), all Frobenius: 0 when they
    are orthogonal, at most 1. After O-LoRA (Wang et al. 2023, https://arxiv.org/abs/2310.14152,
    equation 7), made scale-free so that a smaller adapter alone does not lower it.
    """
    overlaps = []
    for layer in _lora_layers(model, GLOBAL, LOCAL):
        a_global = layer.lora_A[GLOBAL].weight.detach().float()  # (r_G, in)
        a_local = layer.lora_A[LOCAL].weight.float()  # (r_L, in)
        sizes = a_global.square().sum() * a_local.square().sum()
        overlaps.append((a_global @ a_local.T).square().sum() / sizes)
    return torch.stack(overlaps).mean() if overlaps else torch.zeros((), device=model.device)


def base_only(model: AdaptedModel):
    """Return a context in which the base model answers alone."""
    return model.disable_adapter()


def adapter_parameters(model: AdaptedModel, name: str) -> list[torch.nn.Parameter]:
    """Return the live parameters of one adapter."""
    marks = (f".lora_A.{name}.", f".lora_B.{name}.")
    return [p for key, p in model.named_parameters() if any(mark in key for mark in marks)]


def save_adapter(
    folder: Path, model: AdaptedModel, name: str, state: AdapterState, base_name: str
) -> str:
    """Write a PEFT folder atomically and return its weights' sha256.

    The folder loads with ``PeftModel.from_pretrained(base, folder)``.
    """
    check_state(state, state_shapes(model, name), f"{folder}")
    with replace_folder(folder) as partial:
        _write_peft_files(partial, model.peft_config[name], state, base_name, {ROLE_KEY: name})
    return hash_file(folder / WEIGHTS_FILE)


def save_plain_adapter(folder: Path, adapter: PlainAdapter, base_name: str) -> None:
    """Write the two files of a PEFT folder, as PEFT itself would, into an existing folder."""
    _write_peft_files(folder, adapter.peft_config, adapter.state, base_name, {"format": "pt"})


def merge_into_base(base: PreTrainedModel, adapter: PlainAdapter) -> None:
    """Add what an adapter adds to the base model's weights, and leave nothing else on it.

    One module after the other, each sum in fp32 and cast once.

    Raises:
        AdapterError: a module's weights are also the input embedding's.
    """
    detach_adapters(base)
    model = get_peft_model(base, adapter.peft_config, adapter_name=PLAIN)
    shapes = state_shapes(model, PLAIN)
    check_state(adapter.state, shapes, "the adapter to merge")
    set_peft_model_state_dict(model, adapter.state, adapter_name=PLAIN)
    embedding = base.get_input_embeddings().weight
    for layer in _lora_layers(model, PLAIN):
        weight = layer.get_base_layer().weight
        if weight is embedding:
            raise AdapterError(
                "The adapter changes the output layer, whose weights are also the input "
                "embedding's, so they cannot be merged. Export the adapter instead."
            )
        merged = weight.data.float() + layer.get_delta_weight(PLAIN).detach().float()
        weight.data.copy_(merged)
    detach_adapters(base)


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
    largest = MAX_HEADER_BYTES + sum(FP32_BYTES * shape.numel() for shape in shapes.values())
    content, config = (
        _read_adapter_file(path, limit, within or folder, name)
        for path, limit in ((weights, largest), (config_path, MAX_CONFIG_BYTES))
    )
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise AdapterError(
            f"{weights} is not the file that was written: its sha256 begins with {found[:12]}, "
            f"expected {sha256[:12]}. Restore it."
        )
    stored_base = _parse_object(config, config_path).get("base_model_name_or_path")
    role, state = _parse_weights(content, weights)
    if role != name:
        found_role = str(role)[:MAX_SHOWN_CHARS]
        raise AdapterError(f"{folder} holds the adapter of role {found_role!r}, expected {name!r}.")
    if stored_base != base_name:
        raise AdapterError(
            f"{folder} was trained on the base model {str(stored_base)[:MAX_SHOWN_CHARS]!r}, and "
            f"this run uses {base_name!r}."
        )
    for key, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise AdapterError(f"{folder}: {key} holds {tensor.dtype}, expected torch.float32.")
    check_state(state, shapes, str(folder))
    return state


def _read_adapter_file(path: Path, largest: int, within: Path, name: str) -> bytes:
    """Return the content of a regular file that lies, links followed, inside ``within``."""
    try:
        if path.exists() and not path.resolve().is_relative_to(within.resolve()):
            raise AdapterError(f"{path} is a link that leads out of {within}. Put a copy there.")
        if not path.is_file():
            raise AdapterError(
                f"{path} does not exist or is no regular file. Expected a PEFT folder with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}; a {name} adapter is never silently started "
                "anew."
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
        raise AdapterError(f"{path} is damaged: it holds no object.")
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
    config: LoraConfig,
    state: AdapterState,
    base_name: str,
    metadata: dict[str, str],
) -> None:
    """Write configuration and weights, the same bytes for the same values.

    Args:
        metadata: one entry only, because safetensors orders several at random.
    """
    content = config.to_dict() | {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(config.target_modules),
    }
    (folder / CONFIG_FILE).write_text(
        json.dumps(content, indent=2, sort_keys=True, default=_jsonable) + "\n", encoding="utf-8"
    )
    tensors = {key: state[key].contiguous() for key in sorted(state)}
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(errno.EIO, str(error), str(folder / WEIGHTS_FILE)) from error


def _check_targets(base: PreTrainedModel, config: AdaptersConfig) -> None:
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for section, adapter in ((GLOBAL, config.global_), (LOCAL, config.local)):
        if adapter.target_modules == "all-linear":
            continue
        unknown = sorted(set(adapter.target_modules) - linear)
        if unknown or not adapter.target_modules:
            raise AdapterError(
                f"adapters.{section}.target_modules: {unknown or 'an empty list'} names no linear "
                f"module of the base model. It has: {', '.join(sorted(linear))}."
            )


def _lora_config(config: AdapterConfig) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        bias="none",
    )


def _lora_layers(model: AdaptedModel, *names: str) -> list[LoraLayer]:
    """Return the modules that hold all of these adapters."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [layer for layer in layers if set(names) <= set(layer.scaling)]


def _parameters(model: AdaptedModel, name: str) -> AdapterState:
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _first(names: list[str]) -> str:
    if not names:
        return ""
    first = names[0] if names[0].isprintable() else ascii(names[0])
    return f" ({first[:MAX_SHOWN_CHARS]}{', ...' if len(names) > 1 else ''})"


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)
