"""The frozen base model: loaded once per process, on whichever device there is.

The server needs only the adapter's shapes and gets them from ``build_empty_model``, which
reads the model's configuration and allocates no weights.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from fedlora_app.config.schema import ModelConfig, TrainingConfig
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.chat_template import find_template_fault
from fedlora_app.model.fingerprint import fingerprint_model, fingerprint_weights
from fedlora_app.model.host_embedding import SHARED_WEIGHTS, move_embedding_to_host
from fedlora_app.model.quantised_cache import QuantisedCopy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelError(UserError):
    """The base model cannot be loaded; the message says what to download or to name."""


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
num_loads = 0


def load_base_model(config: ModelConfig, root: Path) -> LoadedModel:
    """Return the process's one base model, loading it the first time it is asked for.

    Raises:
        ModelError: it is neither a local folder nor in the cache nor downloadable, or its
            quantisation is impossible here, or its embedding cannot lie elsewhere.
    """
    global num_loads
    key = config.model_dump_json() + str(root)
    if key not in _resident:
        _let_go()
        tokenizer = load_tokenizer(config, root)
        model = _load(config, root)
        num_loads += 1
        _resident[key] = LoadedModel(
            model=model,
            tokenizer=tokenizer,
            fingerprint=compute_fingerprint(config, root),
        )
    return _resident[key]


def _let_go() -> None:
    """Free the resident model, which refers to itself, so that there are never two in memory."""
    _resident.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_unquantised_model(config: ModelConfig, root: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model on the CPU, a copy of its own that may be changed.

    Whatever the configuration says of its quantisation and dtype.

    Raises:
        ModelError: it is not there.
    """
    _let_go()
    kwargs = {"dtype": dtype, "device_map": {"": "cpu"}, "use_safetensors": True}
    return _from_pretrained(AutoModelForCausalLM, config, root, **kwargs).eval()


def load_tokenizer(config: ModelConfig, root: Path) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, which must bring a chat template."""
    tokenizer = _from_pretrained(AutoTokenizer, config, root)
    templates = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, dict) else templates
    if not template:
        raise ModelError(
            f"{config.name} has no chat template. Expected an instruct model, such as "
            "Qwen/Qwen2.5-7B-Instruct."
        )
    fault = find_template_fault(template, tokenizer.special_tokens_map)
    if fault is not None:
        raise ModelError(
            f"The chat template of {config.name} {fault}. Use another model, or fix the template "
            "in a copy of its folder."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(config: ModelConfig, root: Path) -> PretrainedConfig:
    """Return the base model's configuration, without any weights."""
    return _from_pretrained(AutoConfig, config, root)


def build_empty_model(config: ModelConfig, root: Path) -> PreTrainedModel:
    """Return the base model on the meta device: every shape and not one weight."""
    model_config = load_model_config(config, root)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )


def choose_device() -> torch.device:
    """Return the GPU if this process sees one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_device() -> str:
    """Return one line for the log: which device, how much memory or how many threads."""
    if not torch.cuda.is_available():
        visible = os.getenv("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return f"CPU, {torch.get_num_threads()} threads{hint}"
    properties = torch.cuda.get_device_properties(0)
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
    folder = _weights_folder(config, root)
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
    if uses_4bit(config):
        model = _load_quantised(config, root, kwargs)
    else:
        model = _from_pretrained(AutoModelForCausalLM, config, root, use_safetensors=True, **kwargs)
    model.requires_grad_(False)
    model.eval()
    # generate() fills what a caller leaves open from here, and instruct models ship sampling
    # settings and repetition penalties, with which "greedy" would not be greedy.
    model.generation_config = GenerationConfig()
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
    model = _from_pretrained(AutoModelForCausalLM, config, root, **kwargs)
    copy = _find_copy(config, root, quantisation)  # the weights may have come only now
    if copy is not None:
        copy.save(model)
    return model


def _find_copy(
    config: ModelConfig, root: Path, quantisation: BitsAndBytesConfig
) -> QuantisedCopy | None:
    """Return where this base's quantised copy is or would be, None if there shall be none.

    Everything that the bits depend on is in the key: weights, configuration, how and by what
    they were quantised, and on which kind of device.
    """
    if not config.cache_quantized or config.trust_remote_code:
        return None
    folder = _weights_folder(config, root)
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


def _from_pretrained(factory: Any, config: ModelConfig, root: Path, **kwargs: Any) -> Any:
    """Call ``factory.from_pretrained`` on a folder or a hub id, with one clear error."""
    folder = local_folder(config, root)
    _refuse_unsafe_folder(config, folder)
    try:
        loaded = factory.from_pretrained(
            str(folder or config.name),
            revision=None if folder else config.revision,
            trust_remote_code=config.trust_remote_code,  # False, unlike None, never asks
            local_files_only=folder is not None,
            **kwargs,
        )
    except Exception as error:  # a damaged folder makes transformers raise almost anything
        _refuse_unsafe_folder(config, folder)
        raise ModelError(_explain(config, root, folder, error)) from error
    if folder is None:
        _refuse_unsafe_folder(config, folder)  # its files may have come only now
    return loaded


def _refuse_unsafe_folder(config: ModelConfig, folder: Path | None) -> None:
    """Raise ``ModelError`` if the base would bring code or an adapter of its own."""
    for name in () if config.trust_remote_code else ("config.json", "tokenizer_config.json"):
        path = _find_file(config, folder, name)
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} cannot be read: {error}.") from None
        if isinstance(content, dict) and "auto_map" in content:
            raise ModelError(
                f'{path} names code that comes with the model ("auto_map"), which is not run. Use '
                "a model that transformers knows by itself; or, if you have read that code and "
                "trust it, set model.trust_remote_code: true."
            )
    path = _find_file(config, folder, "adapter_config.json")
    if path is not None:
        raise ModelError(
            f"{path} makes an adapter of the base model in model.name. Expected a base model alone."
        )


def _find_file(config: ModelConfig, folder: Path | None, name: str) -> Path | None:
    """Return a file of the model's folder, or of the hub's cache, if it is there."""
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    try:
        found = cached_file(config.name, name, revision=config.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def local_folder(config: ModelConfig, root: Path) -> Path | None:
    """Return the model's folder if ``model.name`` is one."""
    folder = root / config.name  # an absolute name stays absolute
    return folder if (folder / "config.json").exists() else None


def _weights_folder(config: ModelConfig, root: Path) -> Path:
    folder = local_folder(config, root)
    if folder is not None:
        return folder
    load_model_config(config, root)  # downloads what is missing, or says so
    found = cached_file(config.name, "config.json", revision=config.revision, local_files_only=True)
    return Path(found).parent


def _explain(config: ModelConfig, root: Path, folder: Path | None, error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    reason = next(lines, type(error).__name__)
    if folder is not None:
        return f"The base model in {folder} cannot be loaded: {reason}"
    if not isinstance(error, OSError):
        return f'The base model "{config.name}" cannot be loaded: {reason}'
    offline = " (HF_HUB_OFFLINE is set)" if os.getenv("HF_HUB_OFFLINE") == "1" else ""
    return (
        f'The base model "{config.name}" was not found: {root / config.name} is not a folder with '
        f"a config.json, and the model hub gave{offline}: {reason}\n"
        f'With a network, run "hf download {config.name}" first; without one, set model.name '
        "to a local folder that holds the model."
    )
