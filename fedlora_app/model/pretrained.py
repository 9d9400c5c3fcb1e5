"""The base model's files: a local folder or the hub's cache, and no code of their own."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import constants, get_session
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from fedlora_app.config.schema import ModelConfig
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.nearest import describe_nearest

HUB_TIMEOUT_SECONDS = 10.0
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class ModelError(UserError):
    """The base model cannot be loaded; the message says what to download or to name."""


class ModelNotHereError(ModelError):
    """The base model is one of the hub's, and is not in the cache of this machine."""


def from_pretrained(factory: Any, config: ModelConfig, root: Path, **kwargs: Any) -> Any:
    """Call ``factory.from_pretrained`` on a folder or a hub id, with one clear error."""
    require_folder(config, root)
    folder = local_folder(config, root)
    _refuse_unsafe_folder(config, folder)
    only_local = folder is not None or not can_reach_hub()
    if hasattr(factory, "from_config"):  # a model: it asks for the files of an adapter too
        kwargs["adapter_kwargs"] = {"local_files_only": only_local}
    try:
        loaded = factory.from_pretrained(
            str(folder or config.name),
            revision=None if folder else config.revision,
            trust_remote_code=config.trust_remote_code,  # False, unlike None, never asks
            local_files_only=only_local,
            **kwargs,
        )
    except Exception as error:  # a damaged folder makes transformers raise almost anything
        _refuse_unsafe_folder(config, folder)
        text = _explain(config, root, folder, error)
        if folder is None and isinstance(error, OSError):  # of which the causes say nothing more
            is_here = _find_file(config, None, "config.json") is not None
            raise (ModelError if is_here else ModelNotHereError)(text) from None
        raise ModelError(text) from error
    if folder is None:
        _refuse_unsafe_folder(config, folder)  # its files may have come only now
    return loaded


def load_model_config(config: ModelConfig, root: Path) -> PretrainedConfig:
    """Return the base model's configuration, without any weights."""
    return from_pretrained(AutoConfig, config, root)


def read_context(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model reads at once; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def local_folder(config: ModelConfig, root: Path) -> Path | None:
    """Return the model's folder if ``model.name`` is one."""
    folder = root / config.name  # an absolute name stays absolute
    return folder if (folder / "config.json").exists() else None


def names_folder(config: ModelConfig, root: Path) -> bool:
    """Return whether ``model.name`` can only be a folder, be it there or not."""
    first, *rest = Path(config.name).parts
    is_hub_id = HUB_ID.fullmatch(config.name) and first not in (".", "..")
    return not is_hub_id or (root / config.name).is_dir() or bool(rest and (root / first).is_dir())


def require_folder(config: ModelConfig, root: Path) -> None:
    """Raise ``ModelError`` if ``model.name`` can only be a folder, and no model lies there."""
    if local_folder(config, root) is None and names_folder(config, root):
        raise ModelError(_describe_missing_folder(root / config.name))


def has_weights(config: ModelConfig, root: Path) -> bool:
    """Return whether the model's weights, or their index, are on this machine."""
    folder = local_folder(config, root)
    return any(_find_file(config, folder, name) is not None for name in WEIGHT_FILES)


@cache
def can_reach_hub() -> bool:
    """Return whether the model hub answers, asked once per process.

    Without an answer transformers would try five times for each file, and say so each time.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except (HTTPError, OSError):
        return False
    return True


def find_weights(config: ModelConfig, root: Path) -> Path:
    """Return the folder of the model's files, its own or in the hub's cache."""
    folder = local_folder(config, root)
    if folder is not None:
        return folder
    load_model_config(config, root)  # downloads what is missing, or says so
    found = cached_file(config.name, "config.json", revision=config.revision, local_files_only=True)
    return Path(found).parent


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


def _describe_missing_folder(folder: Path) -> str:
    if folder.is_dir():
        return f"model.name: {folder} holds no config.json, so it is no base model."
    if folder.exists():
        return f"model.name: {folder} is a file. Name the folder of a base model."
    return f"model.name: {folder} does not exist.{describe_nearest(folder)}"


def _explain(config: ModelConfig, root: Path, folder: Path | None, error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    reason = next(lines, type(error).__name__)
    if folder is not None:
        return f"The base model in {folder} cannot be loaded: {reason}"
    if not isinstance(error, OSError):
        return f'The base model "{config.name}" cannot be loaded: {reason}'
    if constants.HF_HUB_OFFLINE:
        hub = "the model hub is not asked (HF_HUB_OFFLINE is set)"
    elif not can_reach_hub():
        hub = f"{constants.ENDPOINT} cannot be reached"
    else:
        hub = f"the model hub gave: {reason}"
    return (
        f'The base model "{config.name}" was not found: {root / config.name} is not a folder with '
        f"a config.json, it is not in the hub's cache, and {hub}\n"
        f'With a network, run "hf download {config.name}" first; without one, set model.name '
        "to a local folder that holds the model."
    )
