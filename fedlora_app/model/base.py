"""The frozen base model: loaded once per process, on whichever device there is.

The server needs only the adapter's shapes and gets them from ``build_empty_model``, which
reads the model's configuration and allocates no weights.
"""

from __future__ import annotations

import gc
import hashlib
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedlora_app.config.schema import ModelConfig, TrainingConfig
from fedlora_app.model.cards import claim_card, list_neighbours, release_card
from fedlora_app.model.device import is_out_of_memory
from fedlora_app.model.fingerprint import fingerprint_model, fingerprint_weights
from fedlora_app.model.host_embedding import SHARED_WEIGHTS, move_embedding_to_host
from fedlora_app.model.pretrained import (
    ModelError,
    find_weights,
    from_pretrained,
    load_model_config,
    local_folder,
)
from fedlora_app.model.quantised_cache import QuantisedCopy
from fedlora_app.model.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class LoadedModel:
    """A resident base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    adapted: Any = None
    """The model with its adapters and their configuration, kept here so that both go together."""
    smaller_batches: dict[Any, TrainingConfig] = field(default_factory=dict)
    """The settings with which a kind of phase fitted into memory, after it once had not."""


_resident: dict[str, LoadedModel] = {}
_lingers = False
"""Whether a model may be in memory that is not resident: one of whoever asked for an unquantised
one, or what a load that failed has left."""
num_loads = 0


def load_base_model(config: ModelConfig, root: Path) -> LoadedModel:
    """Return the process's one base model, loading it the first time it is asked for.

    Raises:
        ModelError: it is neither a local folder nor in the cache nor downloadable, or its
            quantisation is impossible here, or its embedding cannot lie elsewhere.
    """
    global num_loads, _lingers
    key = config.model_dump_json() + str(root)
    if key not in _resident:
        _let_go()
        _lingers = True
        tokenizer = load_tokenizer(config, root)
        model = _load(config, root)
        num_loads += 1
        _resident[key] = LoadedModel(
            model=model,
            tokenizer=tokenizer,
            fingerprint=compute_fingerprint(config, root),
        )
        _lingers = False
    return _resident[key]


def release_base_model() -> None:
    """Free the process's base model and its card, for another process's."""
    _let_go()
    release_card()


def _let_go() -> None:
    """Free the last model, which refers to itself, so that there are never two in memory."""
    global _lingers
    if not (_resident or _lingers):
        return
    _resident.clear()
    gc.collect()
    _lingers = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_unquantised_model(config: ModelConfig, root: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model on the CPU, a separate copy that may be changed.

    The quantisation and dtype of the configuration are ignored.

    Raises:
        ModelError: it is not there.
    """
    global _lingers
    _let_go()
    _lingers = True
    kwargs = {"dtype": dtype, "device_map": {"": "cpu"}, "use_safetensors": True}
    model = from_pretrained(AutoModelForCausalLM, config, root, **kwargs).eval()
    _require_ends(model)
    return model


def build_empty_model(config: ModelConfig, root: Path) -> PreTrainedModel:
    """Return the base model on the meta device: every shape and not one weight."""
    model_config = load_model_config(config, root)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )


def find_decoder(base: PreTrainedModel) -> torch.nn.Module:
    """Return the part of a model that makes hidden states of tokens.

    That is all but its output layer, and all but what sees images where it can.

    Raises:
        ModelError: the model has no such part of its own.
    """
    inner = base.get_decoder()
    if inner is base:  # Llama 4 calls it otherwise than it says
        inner = next((part for part in base.children() if isinstance(part, PreTrainedModel)), None)
    if inner is None:
        raise ModelError(
            f"The base model, {type(base).__name__}, has no decoder apart from its output layer, "
            "whose hidden states losses and scores are made of. Use another base model."
        )
    return inner


def decoder_layers(base: PreTrainedModel) -> list[torch.nn.Module]:
    """Return a model's decoder layers from the lowest up; none where it has no such list."""
    count = base.config.get_text_config().num_hidden_layers
    lists = (m for m in find_decoder(base).modules() if isinstance(m, torch.nn.ModuleList))
    return list(next((found for found in lists if len(found) == count), ()))  # outer ones first


def choose_device(run: str = "", *, may_share: bool = False) -> torch.device:
    """Return this process's GPU if it sees any, else the CPU.

    Args:
        run: the run that trains here, and takes a card that no other run has.
        may_share: it may also be one that another run has.

    Raises:
        CardError: another run trains on every card.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    cards = [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
    device = torch.device("cuda", claim_card(cards, run, may_share=may_share))
    torch.cuda.set_device(device)
    return device


def describe_device() -> str:
    """Return one line for the log: which device, how much memory or how many threads."""
    if not torch.cuda.is_available():
        visible = os.getenv("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return f"CPU, {torch.get_num_threads()} threads{hint}"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"


def uses_4bit(config: ModelConfig) -> bool:
    """Return whether the base will be quantised on this machine."""
    if config.quantization == "auto":
        return torch.cuda.is_available()
    return config.quantization == "4bit"


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Return the dtype of unquantised weights and of the computation."""
    if config.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[config.dtype]


def compute_fingerprint(config: ModelConfig, root: Path) -> str:
    """Return a hash by which two clients see whether they hold the same base model.

    It covers its weights, configuration, tokenizer and chat template.

    Raises:
        ModelError: a file cannot be read.
    """
    folder = find_weights(config, root)
    try:
        return fingerprint_model(folder)
    except OSError as error:
        raise ModelError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None


def find_embedding_fault(config: ModelConfig, root: Path) -> str | None:
    """Return why the input embedding cannot be in host memory, as far as no weights say it."""
    if config.embedding_device != "cpu":
        return None
    tied = getattr(load_model_config(config, root), "tie_word_embeddings", False)
    return _explain_embedding(config, SHARED_WEIGHTS) if tied else None


def _explain_embedding(config: ModelConfig, reason: str) -> str:
    return (
        f"model.embedding_device: cpu is impossible with {config.name}: {reason}. Expected a model "
        "whose input embedding is of its own, such as Qwen/Qwen2.5-7B-Instruct. Set it to auto."
    )


def _load(config: ModelConfig, root: Path) -> PreTrainedModel:
    device = choose_device()
    kwargs: dict[str, Any] = {"dtype": compute_dtype(config), "device_map": {"": device}}
    try:
        if uses_4bit(config):
            model = _load_quantised(config, root, kwargs)
        else:
            kwargs["use_safetensors"] = True
            model = from_pretrained(AutoModelForCausalLM, config, root, **kwargs)
    except ModelError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(_explain_size(config)) from None
    return settle_base(model, config, device)


def settle_base(
    model: PreTrainedModel, config: ModelConfig, device: torch.device
) -> PreTrainedModel:
    """Freeze a base model that has its weights, and make it answer greedily.

    Raises:
        ModelError: its embedding cannot lie elsewhere, or what ends its answers is no token.
    """
    model.requires_grad_(False)
    model.eval()
    _require_ends(model)
    # generate() fills what a caller leaves open from here, and instruct models ship sampling
    # settings and repetition penalties, with which "greedy" would not be greedy. What ends an
    # answer stays: Phi's <|end|>, for one, is in no other file.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs bitsandbytes repacks 4-bit weights for good at the first evaluation,
            # and the repacked ones pass no gradient on.
            module.support_avx512bf16_for_cpu = False
    if config.embedding_device == "cpu":
        try:
            move_embedding_to_host(model, device)
        except ValueError as error:
            raise ModelError(_explain_embedding(config, str(error))) from None
    return model


def _require_ends(model: PreTrainedModel) -> None:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise ModelError(
            f"The base model's generation_config.json has eos_token_id {ends!r:.100}. Expected the "
            "number of the token that ends an answer, or a list of such."
        )


def _explain_size(config: ModelConfig) -> str:
    neighbours = " and ".join(list_neighbours())
    mend = "Choose" if uses_4bit(config) else "Set model.quantization: 4bit, or choose"
    return (
        f"{config.name} does not fit into the memory of {describe_device()}"
        f"{', which it shares with ' + neighbours if neighbours else ''}. A base model lies on one "
        f"card as a whole. {mend} a smaller model; fedlora plan CONFIG says what it needs."
    )


def _load_quantised(config: ModelConfig, root: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Return the base in 4-bit, from an earlier start's copy where there is one."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(config),
    )
    copy = _find_copy(config, root, quantisation)
    model = copy.load(**kwargs) if copy is not None else None
    if model is not None:
        model.name_or_path = str(local_folder(config, root) or config.name)
        model.config.name_or_path = model.name_or_path
        return model
    kwargs = kwargs | {"use_safetensors": True, "quantization_config": quantisation}
    model = from_pretrained(AutoModelForCausalLM, config, root, **kwargs)
    copy = _find_copy(config, root, quantisation)  # the weights may have come only now
    if copy is not None:
        copy.save(model)
    return model


def _find_copy(
    config: ModelConfig, root: Path, quantisation: BitsAndBytesConfig
) -> QuantisedCopy | None:
    """Return where this base's quantised copy is or would be, None if none is to be kept.

    Everything that the bits depend on is in the key: weights, configuration, how and by what
    they were quantised, and on which kind of device.
    """
    if not config.cache_quantized or config.trust_remote_code:
        return None
    folder = find_weights(config, root)
    content = (folder / "config.json").read_bytes()
    if not any(folder.glob("*.safetensors")) or b'"quantization_config"' in content:
        return None  # nothing there yet, or nothing left to quantise
    return QuantisedCopy.of(
        {
            "weights": fingerprint_weights(folder),
            "config": hashlib.sha256(content).hexdigest(),
            "dtype": str(compute_dtype(config)),
            "quantisation": quantisation.to_dict(),
            "device": choose_device().type,
            "versions": [version(name) for name in ("transformers", "bitsandbytes", "torch")],
        }
    )
