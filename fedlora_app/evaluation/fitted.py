"""Combiners that a client fits to its own data once a run has adapters, and keeps.

Input: a round's adapters and the client's training and validation records. What is kept is used as
long as the base model, the adapters, the data and the settings are those that it was fitted to.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.combination import Combination
from fedlora_app.config.schema import ClientConfig, Config
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.evaluation.combiner import Combiner
from fedlora_app.evaluation.fitted_files import (
    UNREADABLE,
    About,
    Tensors,
    load_fitted,
    save_fitted,
)
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import make_private_dir, replace_folder
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapters import AdaptedModel

TRAIN_FILES = ("local_train", "universal_train")
VALIDATION_FILES = ("local_validation", "universal_validation", "conflict_validation")


class FitError(UserError):
    """A combiner cannot be fitted; the message says why."""


@dataclass(frozen=True)
class FittingTask:
    """What a client fits a combiner with; both of its adapters are set on the model, and active."""

    model: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    config: Config
    client: ClientConfig
    files: ClientFiles
    root: Path

    def seed(self, name: str) -> int:
        """Return the seed of whatever is drawn for a combiner."""
        return derive_seed(self.config.experiment.seed, name, self.client.id)


class FittedCombiner(Combiner):
    """A combiner that is fitted on a round's adapters, and kept."""

    NAME: ClassVar[Combination]
    FORMAT: ClassVar[int]
    """Of what is kept; another one is fitted again."""
    ADAPTERS: ClassVar[tuple[str, ...]]
    """Those that it depends on."""
    FILES: ClassVar[tuple[str, ...]]
    """The data files that it depends on, by their roles."""
    SETTINGS: ClassVar[tuple[str, ...]] = ()
    """The sections of the configuration that it depends on."""

    @classmethod
    @abstractmethod
    def fit(cls, task: FittingTask) -> Self:
        """Fit one to a client's data."""

    @abstractmethod
    def dump(self) -> tuple[Tensors, dict[str, Any]]:
        """Return what to keep: tensors, and what to say about them."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Tensors, content: Mapping[str, Any], system_prompt: str) -> Self:
        """Return what was dumped.

        Raises:
            any of ``UNREADABLE``: it is damaged.
        """


def describe_fit(
    kind: type[FittedCombiner],
    config: Config,
    client: ClientConfig,
    base_model: str,
    adapters: Mapping[str, str],
    data: Mapping[str, str | None],
) -> About:
    """Return what a combiner is fitted to, by hashes.

    Args:
        base_model: its fingerprint.
        adapters: sha256 by role.
        data: sha256 of the client's files, as ``ClientFiles.hashes`` and a manifest name them.
    """
    raw = config.dump()
    settings = [config.experiment.seed, *(raw[section] for section in kind.SETTINGS)]
    return {
        "base_model": base_model,
        "system_prompt": _hash(client.system_prompt),
        "settings": _hash(json.dumps(settings, sort_keys=True)),
        **{f"{role}_adapter": adapters[role] for role in kind.ADAPTERS},
        **{name: data.get(f"sha256/{name}") for name in kind.FILES},
    }


def save_combiner(folder: Path, combiner: FittedCombiner, about: About) -> None:
    """Keep a combiner in a client's folder, in the place of what was there."""
    tensors, content = combiner.dump()
    content = {"format": combiner.FORMAT, "fitted_to": dict(about), **content}
    make_private_dir(folder.parent)
    with replace_folder(folder) as partial:
        save_fitted(partial, combiner.NAME, tensors, content)


def load_combiner(
    kind: type[FittedCombiner], folder: Path, about: About, system_prompt: str
) -> FittedCombiner | None:
    """Return what was kept; None where there is none that was fitted to the same, or a damaged one.

    Args:
        system_prompt: the client's own, of which ``about`` has the hash.
    """
    try:
        found = load_fitted(folder, kind.NAME, kind.FORMAT, about)
        return None if found is None else kind.restore(*found, system_prompt)
    except UNREADABLE:
        return None  # it is fitted again


def require_shape(tensors: Tensors, name: str, *shape: int | None) -> Any:
    """Return a tensor of finite values.

    Args:
        shape: None where any size will do.

    Raises:
        ValueError, LookupError: it is not there, or another one.
    """
    tensor = tensors[name]
    sizes = zip(tensor.shape, shape, strict=True)
    if not all(wanted in (None, size) for size, wanted in sizes) or not tensor.isfinite().all():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} or values that are not finite.")
    return tensor


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
