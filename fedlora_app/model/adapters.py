"""The two LoRA adapters: attached to the base, filled, switched, merged.

The only module that imports PEFT. ``y = W0 x + s_G B_G A_G x + s_L B_L A_L x``, where the
global pair (A_G, B_G) is averaged by the server and the local pair never leaves its client.
LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.

Their weights as dictionaries of tensors are the matter of ``adapter_state``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from fedlora_app.config.schema import GLOBAL, LOCAL, AdapterConfig, AdaptersConfig
from fedlora_app.config.sharing import FACTORS, of_factors
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapter_state import AdapterError, AdapterState, check_state
from fedlora_app.model.base import LoadedModel, decoder_layers
from fedlora_app.model.ranks import join_ranks, resize_ranks, take_ranks
from fedlora_app.model.targets import (
    choose_modules,
    describe_experts,
    find_linear,
    find_target_faults,
)

FROZEN = "frozen"
"""The part of the global adapter that no client trains, beside the part that is called GLOBAL here.
Outside this module a global adapter is both: its state joins them, the learning ranks first."""
PLAIN = "default"
"""PEFT's own name for an only adapter."""

AdaptedModel = PeftModel
AdaptedLayer = LoraLayer
"""The base model with its adapters attached and one module of it, for annotations elsewhere."""

Parameters = dict[str, torch.nn.Parameter]

_parameters: WeakKeyDictionary[AdaptedModel, dict[str, Parameters]] = WeakKeyDictionary()
_layers: WeakKeyDictionary[AdaptedModel, list[LoraLayer]] = WeakKeyDictionary()
"""What is found by walking through all modules of a model once its adapters are attached."""


@dataclass(frozen=True)
class PlainAdapter:
    """One adapter of scaling 1 with the same rank at every module."""

    state: AdapterState
    rank: int
    target_modules: list[str]
    base_revision: str | None = None

    @property
    def peft_config(self) -> LoraConfig:
        """Return its configuration for PEFT and multi-LoRA servers."""
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=self.target_modules,
            bias="none",
            revision=self.base_revision,
        )


def attach_adapters(base: PreTrainedModel, config: AdaptersConfig) -> AdaptedModel:
    """Attach both adapters to the base model and freeze everything.

    The modules exist once per process; their weights are set for every message.

    Raises:
        AdapterError: a target module is not there or is not linear, or there are fewer layers
            than are to be left out.
    """
    detach_adapters(base)
    taken = _find_taken(base)
    if faults := find_target_faults(base, config, taken):
        raise AdapterError("\n".join(faults))
    # All before the first adapter renames the linear layers.
    adapters = {
        name: _lora_config(adapter, choose_modules(base, adapter, taken))
        for name, adapter in _list_parts(config).items()
    }
    try:
        model = get_peft_model(base, adapters.pop(GLOBAL), adapter_name=GLOBAL)
        for name, adapter in adapters.items():
            model.add_adapter(name, adapter)
    except ValueError as error:  # which layers of a family PEFT does not serve, only PEFT knows
        detach_adapters(base)
        raise AdapterError(
            f"PEFT has no adapters for this base model: {error} Choose others by "
            "adapters.global.target_modules and adapters.local.target_modules, or use another "
            "base model."
        ) from error
    model.requires_grad_(False)
    return model


def attach_once(loaded: LoadedModel, config: AdaptersConfig) -> AdaptedModel:
    """Return a resident base with its adapters' modules, made once per process and shape."""
    if loaded.adapted is None or loaded.adapted[0] != config:
        loaded.adapted = (config, attach_adapters(loaded.model, config))
    return loaded.adapted[1]


def detach_adapters(base: PreTrainedModel) -> None:
    """Remove adapters that an earlier run in this process left on the base model."""
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
    shapes = {key: tensor.shape for key, tensor in sorted(named_parameters(model, name).items())}
    return resize_ranks(shapes, sum(_ranks(model, name))) if _is_joint(model, name) else shapes


def get_state(model: AdaptedModel, name: str) -> AdapterState:
    """Return a copy of an adapter's weights, fp32 on the CPU, sorted by key."""
    state = {
        key: tensor.detach().to("cpu", torch.float32, copy=True)
        for key, tensor in sorted(named_parameters(model, name).items())
    }
    return join_ranks(state, get_state(model, FROZEN)) if _is_joint(model, name) else state


def set_state(model: AdaptedModel, name: str, state: AdapterState) -> None:
    """Overwrite every weight of an adapter.

    Raises:
        AdapterError: the state's names or shapes are not the adapter's.
    """
    check_state(state, state_shapes(model, name), f'the state for adapter "{name}"')
    if _is_joint(model, name):
        learning, frozen = _ranks(model, name)
        set_state(model, FROZEN, take_ranks(state, learning, learning + frozen))
        state = take_ranks(state, 0, learning)
    with torch.no_grad():
        for key, parameter in named_parameters(model, name).items():
            parameter.copy_(state[key])


def learning_part(model: AdaptedModel, state: AdapterState) -> AdapterState:
    """Return what of a global adapter clients train, without the frozen part."""
    return take_ranks(state, 0, _ranks(model, GLOBAL)[0]) if _is_joint(model, GLOBAL) else state


def file_config(model: AdaptedModel, name: str) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter, all its parts included."""
    config = model.peft_config[name].to_dict()
    if _is_joint(model, name):
        joint = sum(_ranks(model, name))
        config |= {"lora_alpha": config["lora_alpha"] / config["r"] * joint, "r": joint}
    return config


def activate(
    model: AdaptedModel,
    active: Iterable[str],
    trainable: Iterable[str] = (),
    factors: Iterable[str] = FACTORS,
) -> None:
    """Make exactly these adapters contribute, and exactly these of them trainable.

    PEFT turns gradients on for whatever it activates, hence the explicit second step.

    Args:
        factors: of the global adapter, where it is trainable.
    """
    active, trainable = list(active), list(trainable)
    assert set(trainable) <= set(active), "an inactive adapter cannot be trained"
    if not active:
        raise ValueError("activate() needs an adapter; use base_only() for none.")
    model.base_model.set_adapter(with_frozen(model, active))
    for name in model.peft_config:
        learning = of_factors(named_parameters(model, name), factors if name == GLOBAL else FACTORS)
        for key, parameter in named_parameters(model, name).items():
            parameter.requires_grad_(name in trainable and key in learning)


def with_frozen(model: AdaptedModel, active: Iterable[str]) -> list[str]:
    """Return adapters with the part that answers beside the global one, if there is one."""
    active = list(active)
    return [*active, FROZEN] if GLOBAL in active and FROZEN in model.peft_config else active


@contextmanager
def only_adapters(model: AdaptedModel, names: Iterable[str]) -> Iterator[None]:
    """Have exactly these adapters answer while the block runs; none: the base model alone."""
    if names := list(names):
        activate(model, names)
        yield
    else:
        with base_only(model):
            yield


@contextmanager
def scaled_adapters(model: AdaptedModel, factors: Mapping[str, float]) -> Iterator[None]:
    """Multiply what each of these adapters adds by its factor while the block runs."""
    factors = {part: factors[name] for name in factors for part in with_frozen(model, [name])}
    before = [
        (layer, name, layer.scaling[name]) for name in factors for layer in lora_layers(model, name)
    ]
    for layer, name, scaling in before:
        layer.scaling[name] = factors[name] * scaling
    try:
        yield
    finally:
        for layer, name, scaling in before:
            layer.scaling[name] = scaling


@contextmanager
def scaled_local(model: AdaptedModel, factor: float) -> Iterator[None]:
    """Multiply what the local adapter adds by ``factor`` (lambda) while the block runs."""
    with scaled_adapters(model, {LOCAL: factor}):
        yield


@contextmanager
def alone_at_full_scale(model: AdaptedModel, name: str) -> Iterator[None]:
    """Have one of the active adapters add what it was trained to, and the others nothing.

    Whatever they are scaled by outside of the block, in which adapters may be fused.
    """
    before = [(layer, dict(layer.scaling)) for layer in lora_layers(model)]
    for layer, scaling in before:
        for other in scaling:
            is_it = other == name
            layer.scaling[other] = layer.lora_alpha[name] / layer.r[name] if is_it else 0.0
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


def compute_overlap(model: AdaptedModel) -> torch.Tensor:
    """Return how much the adapters' input subspaces overlap, a differentiable scalar.

    The mean over modules of ||A_G A_L^T||^2 / (||A_G||^2 ||A_L||^2), all Frobenius: 0 when they
    are orthogonal, at most 1. After O-LoRA (Wang et al. 2023, https://arxiv.org/abs/2310.14152,
    equation 7), made scale-free so that a smaller adapter alone does not lower it.
    """
    overlaps = []
    for layer in lora_layers(model, GLOBAL, LOCAL):
        a_global = layer.lora_A[GLOBAL].weight.detach().float()  # (r_G, in)
        a_local = layer.lora_A[LOCAL].weight.float()  # (r_L, in)
        sizes = a_global.square().sum() * a_local.square().sum()
        overlaps.append((a_global @ a_local.T).square().sum() / sizes)
    return torch.stack(overlaps).mean() if overlaps else torch.zeros((), device=model.device)


def base_only(model: AdaptedModel):
    """Return a context in which no adapter is active."""
    return model.disable_adapter()


def adapter_parameters(model: AdaptedModel, name: str) -> list[torch.nn.Parameter]:
    """Return the live parameters of one adapter."""
    return list(named_parameters(model, name).values())


def lora_layers(model: AdaptedModel, *names: str) -> list[LoraLayer]:
    """Return the modules that hold all of these adapters."""
    if model not in _layers:
        _layers[model] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in _layers[model] if set(names) <= set(layer.scaling)]


def find_first_layer(model: AdaptedModel, names: Iterable[str]) -> int:
    """Return the lowest decoder layer that has one of these adapters; 0 where one lies outside.

    The output head is above all layers and does not count.
    """
    base, names = model.get_base_model(), set(names)
    layers = decoder_layers(base)
    inside: dict[LoraLayer, int] = {}
    for index, layer in enumerate(layers):
        inside |= {m: index for m in layer.modules() if isinstance(m, LoraLayer)}
    head = base.get_output_embeddings()
    those = [m for m in lora_layers(model) if names & set(m.scaling) and m is not head]
    return min((inside.get(module, 0) for module in those), default=len(layers))


def describe_adapted(model: AdaptedModel) -> str | None:
    """Return where adapters are and where not, None unless the base is a mixture of experts."""
    base = model.get_base_model()
    names = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    return describe_experts(base, names)


def merge_into_base(base: PreTrainedModel, adapter: PlainAdapter) -> None:
    """Add what an adapter adds to the base model's weights, and leave nothing else on it.

    One module after the other, each sum in fp32 and cast once.

    Raises:
        AdapterError: a module's weights are also the input embedding's.
    """
    detach_adapters(base)
    model = get_peft_model(base, adapter.peft_config, adapter_name=PLAIN)
    set_state(model, PLAIN, adapter.state)
    embedding = base.get_input_embeddings().weight
    for layer in lora_layers(model, PLAIN):
        weight = layer.get_base_layer().weight
        if weight is embedding:
            raise AdapterError(
                "The adapter changes the output layer, whose weights are also the input "
                "embedding's, so they cannot be merged. Export the adapter instead."
            )
        merged = weight.data.float() + layer.get_delta_weight(PLAIN).detach().float()
        weight.data.copy_(merged)
    detach_adapters(base)


def _find_taken(base: PreTrainedModel) -> set[str]:
    """Return the modules whose names PEFT takes for a mixture's experts.

    These were modules of such names in earlier versions of transformers, so that no adapter on
    dense or shared layers called the same could be loaded by PEFT.
    """
    names = find_linear(base)
    config = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:  # it misses some of the experts' names
        families = {".gate_proj", ".up_proj", ".down_proj", ".w1", ".w2", ".w3"}
        return {name for name in names if any(map(name.endswith, families))}
    return set(names) - set(config.target_modules)


def _list_parts(config: AdaptersConfig) -> dict[str, AdapterConfig]:
    """Return what PEFT is to know as one adapter each."""
    parts, ours = {GLOBAL: config.global_, LOCAL: config.local}, config.global_
    if ours.frozen_rank:
        alpha = ours.alpha / ours.rank * ours.frozen_rank
        changes = {"rank": ours.frozen_rank, "alpha": alpha, "dropout": 0.0}
        parts[FROZEN] = ours.model_copy(update=changes)
    return parts


def _lora_config(config: AdapterConfig, names: list[str]) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        bias="none",
    )


def _is_joint(model: AdaptedModel, name: str) -> bool:
    return name == GLOBAL and FROZEN in model.peft_config


def _ranks(model: AdaptedModel, name: str) -> tuple[int, int]:
    """Return the rank that learns and the frozen one."""
    return model.peft_config[name].r, model.peft_config[FROZEN].r


def named_parameters(model: AdaptedModel, name: str) -> Parameters:
    """Return an adapter's parameters by PEFT's file keys, in the order of the modules."""
    known = _parameters.setdefault(model, {})
    if name not in known:
        marks = {f".{part}.{name}.": f".{part}." for part in ("lora_A", "lora_B")}
        known[name] = {
            key.replace(mark, part): parameter
            for key, parameter in model.named_parameters()
            for mark, part in marks.items()
            if mark in key
        }
    return known[name]
