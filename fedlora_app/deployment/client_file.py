"""A client's own file: what only its machine knows, laid over the experiment that the server sends.

``--node-config 'client-file="/path/client.yaml"'`` names it. Prompt, data, store and model stand in
it, so that neither the server nor another client learns them, and how much memory this machine has.
What all clients must have in common (adapters, steps, learning rate) is the experiment's alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedlora_app.config.faults import describe_faults, list_faults
from fedlora_app.config.loading import parse_config, read_yaml
from fedlora_app.config.private import PRIVATE
from fedlora_app.config.schema import SAFE_NAME, Config, ConfigError, Section
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.foundation.errors import UserError

NODE_KEY = "client-file"
REPLACED_KEYS = ("project-dir", "output-dir")
"""Of a node's configuration: what the file says in their place."""


class ConfidentialError(UserError):
    """An error whose text stays at the client.

    Args:
        told: what the server is told instead.
    """

    def __init__(self, text: str, told: str) -> None:
        super().__init__(text)
        self.told = told


class OwnDataConfig(Section):
    """Files that other clients may have too, here as they lie on this machine."""

    universal_train: str | None = Field(None, min_length=1)
    universal_test: str | None = Field(None, min_length=1)
    conflict_test: str | None = Field(None, min_length=1)
    universal_validation: str | None = Field(None, min_length=1)
    conflict_validation: str | None = Field(None, min_length=1)
    public: str | None = Field(None, min_length=1)


class OwnModelConfig(Section):
    """The base model on this machine. What is left out is as the experiment says."""

    name: str | None = Field(None, min_length=1)
    """A folder, or a hub id."""
    revision: str | None = None
    quantization: Literal["auto", "4bit", "none"] | None = None
    dtype: Literal["auto", "bfloat16", "float32"] | None = None
    embedding_device: Literal["auto", "cpu"] | None = None
    trust_remote_code: bool = False
    """Run code that comes with the model. No experiment decides that for a machine that has a file
    of its own."""


class OwnTrainingConfig(Section):
    """How a step is computed on this machine; how many examples it has is the experiment's."""

    batch_size: int | None = Field(None, ge=1)
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Left out, as many as make up the experiment's examples per step."""
    gradient_checkpointing: Literal["auto", True, False] | None = None


class OwnEvaluationConfig(Section):
    """How questions are scored on this machine."""

    batch_size: int | None = Field(None, ge=1)


class ClientFile(Section):
    """What the file may say. Paths are relative to its folder."""

    id: str = Field(pattern=SAFE_NAME)
    store: str = Field("store", min_length=1)
    """Where run directories go, and in them this client's local adapter."""
    policy: str | None = Field(None, min_length=1)
    """What this client permits; null: policy.yaml beside this file, if there is one."""
    system_prompt: str
    local_train: str = Field(min_length=1)
    local_test: str | None = Field(None, min_length=1)
    local_validation: str | None = Field(None, min_length=1)
    universal_train: str | None = Field(None, min_length=1)
    data: OwnDataConfig = Field(default_factory=OwnDataConfig)
    model: OwnModelConfig = Field(default_factory=OwnModelConfig)
    training: OwnTrainingConfig = Field(default_factory=OwnTrainingConfig)
    evaluation: OwnEvaluationConfig = Field(default_factory=OwnEvaluationConfig)


@dataclass(frozen=True)
class OwnSettings:
    """A client's own file, read and checked."""

    path: Path
    file: ClientFile

    @property
    def client_id(self) -> str:
        """Which client this is."""
        return self.file.id

    @property
    def folder(self) -> Path:
        """What relative paths are relative to, as a project is elsewhere."""
        return self.path.parent

    @property
    def store(self) -> Path:
        """Where this client's run directories go."""
        return self.folder / self.file.store

    @property
    def policy_path(self) -> Path | None:
        """The file that says what this client permits; None where it permits all."""
        if self.file.policy is not None:
            return self.folder / self.file.policy
        beside = SiteFolder(self.folder).policy
        return beside if beside.exists() else None

    def merge(self, config: Config) -> Config:
        """Return the experiment with this file in the place of all that is this client's own.

        Of other clients no own settings are left, whatever came.

        Raises:
            ConfidentialError: the two do not go together.
        """
        config.entry(self.client_id)  # raises where the experiment has none of that id
        raw, faults = config.dump(), []
        file = self.file.model_dump()
        for client in raw["federated"]["clients"]:
            own = client["id"] == self.client_id
            client |= {key: file[key] if own else None for key in PRIVATE}
        raw["data"] |= file["data"]
        raw["model"] |= _given(file["model"])
        raw["evaluation"] |= _given(file["evaluation"])
        training = raw["training"]
        per_step = training["batch_size"] * training["gradient_accumulation_steps"]
        given = _given(file["training"])
        if "batch_size" in given:
            given.setdefault("gradient_accumulation_steps", per_step // given["batch_size"])
        training |= given
        sizes = training["batch_size"], training["gradient_accumulation_steps"]
        if sizes[0] * sizes[1] != per_step:
            faults.append(
                f"training.batch_size: {sizes[0]} x {sizes[1]} (gradient_accumulation_steps) are "
                f"{sizes[0] * sizes[1]} examples in a step, and the experiment has {per_step}. "
                "Their product must be the same at all clients."
            )
        try:
            return parse_config(raw, source=f"{self.path} with the experiment", known_faults=faults)
        except ConfigError as error:
            raise ConfidentialError(
                str(error), "its own file and the experiment do not go together; its log says why"
            ) from None

    def hide(self, text: str) -> str:
        """Return a text without what this file names: each is replaced by its key."""
        pattern, keys = self._names
        return pattern.sub(lambda found: f"<{keys[found[0]]}>", text)

    @cached_property
    def _names(self) -> tuple[re.Pattern[str], dict[str, str]]:
        """What finds everything that stays here, and the key of each."""
        file = self.file
        paths = {"": file.model_dump(include={*PRIVATE[1:], "store", "policy"})}
        paths |= {"data.": file.data.model_dump(), "model.": {"name": file.model.name}}
        plain = {
            f"{section}{key}": path
            for section, named in paths.items()
            for key, path in named.items()
            if path is not None
        }
        whole = {str(self.path): NODE_KEY, str(self.folder): "folder"}
        for key, path in plain.items():
            for place in (self.folder / path, (self.folder / path).resolve()):
                whole.setdefault(str(place), key)
        words: dict[str, str] = {}
        for key, path in plain.items():
            if path not in whole:
                words.setdefault(path, key)
        if file.system_prompt.strip():
            words[file.system_prompt] = PRIVATE[0]
        # A short name may be a part of another word, or of a setting's dotted path.
        parts = {text: re.escape(text) for text in whole}
        parts |= {w: rf"(?<![\w./-]){re.escape(w)}(?![\w/-]|\.\w)" for w in words}
        longest_first = sorted(parts, key=len, reverse=True)
        return re.compile("|".join(parts[text] for text in longest_first)), whole | words


def find_own_settings(node_config: Mapping[str, Any]) -> OwnSettings | None:
    """Return the settings in the file that a node's configuration names; None where it names none.

    Raises:
        ConfidentialError: the file cannot be used, or contradicts the node's configuration.
    """
    if NODE_KEY not in node_config:
        return None
    path = Path(str(node_config[NODE_KEY])).expanduser()
    try:
        own = load_own_settings(path)
        _refuse_contradictions(own, node_config)
    except ConfigError as error:
        raise ConfidentialError(
            str(error), "this client's own file (client-file) cannot be used; its log says why"
        ) from None
    return own


def load_own_settings(path: Path) -> OwnSettings:
    """Read a client's own file.

    Raises:
        ConfigError: with every fault, each under its dotted path.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no keys. Expected id, system_prompt, local_train, ...")
    faults, num_more = [], 0
    try:
        file = ClientFile.model_validate(raw)
    except ValidationError as error:
        faults, num_more = describe_faults(error, ClientFile)
    faults += _cross_faults(raw)
    if faults:
        raise ConfigError(list_faults(str(path), faults, num_more))
    return OwnSettings(path.resolve(), file)


def _cross_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    data = raw.get("data")
    shared = data.get("universal_train") if isinstance(data, Mapping) else None
    if raw.get("universal_train") is None and shared is None:
        yield "universal_train: missing, and data.universal_train too. Name one of them."


def _refuse_contradictions(own: OwnSettings, node_config: Mapping[str, Any]) -> None:
    """Raise where the node's configuration says something else than the file, or nothing new."""
    named = node_config.get("client-id", own.client_id)
    if named != own.client_id:
        raise ConfigError(
            f"The node's configuration says client-id {named!r}, and {own.path} says "
            f"{own.client_id!r}. Leave out client-id."
        )
    if unused := [key for key in REPLACED_KEYS if key in node_config]:
        raise ConfigError(
            f"{' and '.join(unused)} of the node's configuration have no effect with a "
            "client-file. Leave them out: paths are relative to the file's folder, and run "
            "directories go to its store."
        )


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}
