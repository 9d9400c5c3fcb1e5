"""A saved round's adapters on the base model, to be asked: whose answer, and at which scale.

Input: a run directory and a choice of its adapters. Output: the model that answers with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedlora_app.config.schema import GLOBAL, LOCAL, ConfigError
from fedlora_app.data.client_files import load_client_files
from fedlora_app.evaluation.gate import Gate, fit_gate
from fedlora_app.model.adapter_files import load_adapter
from fedlora_app.model.adapters import (
    AdaptedModel,
    AdapterState,
    activate,
    attach_once,
    base_only,
    scaled_local,
    set_state,
)
from fedlora_app.model.base import LoadedModel, ModelError, load_base_model
from fedlora_app.model.fingerprint import explain_fingerprint
from fedlora_app.runs.reading import SavedRun


@dataclass(frozen=True)
class Answering:
    """Which adapters answer: the global one or not, and whose local one, at which scale."""

    with_global: bool = False
    local: str | None = None
    scale: float = 1.0

    @property
    def label(self) -> str:
        """``base``, ``global``, ``local:<id>`` or ``global+local:<id>``."""
        parts = [GLOBAL] if self.with_global else []
        parts += [f"{LOCAL}:{self.local}"] if self.local else []
        return "+".join(parts) or "base"


@dataclass
class SavedModel:
    """The base model with the adapters of one round; loaded at the first need."""

    run: SavedRun
    server_round: int
    root: Path
    _states: dict[str, AdapterState] = field(default_factory=dict)
    _gates: dict[str, Gate] = field(default_factory=dict)

    def own(self, client: str, scale: float = 1.0) -> Answering:
        """Return what that client answers with.

        Raises:
            ConfigError: there is no such client, or the scale is impossible or has no effect.
        """
        active = self.run.active
        self.run.config.client(client)
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"The scale (lambda) is {scale}; expected a number from 0 up.")
        if LOCAL not in active and scale != 1.0:
            mode = self.run.config.federated.mode
            raise ConfigError(
                f"The scale (lambda) {scale:g} has no effect: in mode {mode} there is no local "
                "adapter. Leave it out."
            )
        return Answering(GLOBAL in active, client if LOCAL in active else None, scale)

    def load(self) -> tuple[LoadedModel, AdaptedModel]:
        """Return the base model, and with its adapters' modules on it.

        Raises:
            ModelError: it is not there, or not the one that the run was trained on.
        """
        loaded = load_base_model(self.run.config.model, self.root)
        self.check_base(loaded.fingerprint)
        return loaded, attach_once(loaded, self.run.config.adapters)

    def check_base(self, fingerprint: str) -> None:
        """Raise ``ModelError`` unless a base model is the one that the run was trained on."""
        about = self.run.manifest["base_model"]
        recorded = about.get("fingerprint", fingerprint)
        if fingerprint != recorded:
            raise ModelError(
                f"The base model {self.run.config.model.name} is not the one that the run was "
                f"trained on: its fingerprint is {fingerprint[:12]}, in manifest.json "
                f"{recorded[:12]}. Restore its weights, config.json, tokenizer and chat template, "
                f"or set model.revision.{explain_fingerprint(about)}"
            )

    @contextmanager
    def answering(self, who: Answering) -> Iterator[tuple[AdaptedModel, Gate | None]]:
        """Have exactly these adapters answer while the block runs.

        Yields:
            The model, and the gate that its local adapter is to be weighed by, if there is one.
        """
        loaded, model = self.load()
        names = []
        if who.with_global:
            names.append(GLOBAL)
            set_state(model, GLOBAL, self.state(None))
        if who.local is not None:
            names.append(LOCAL)
            set_state(model, LOCAL, self.state(who.local))
        with ExitStack() as stack:
            if names:
                activate(model, names)
            else:
                stack.enter_context(base_only(model))
            if who.local is not None:
                stack.enter_context(scaled_local(model, who.scale))
            yield model, self._gate(loaded, model, who)

    def state(self, client: str | None) -> AdapterState:
        """Return a client's local adapter, or the global one with None; read and checked once."""
        key = client or ""
        if key not in self._states:
            if client is not None:  # one local adapter at a time; there may be many clients
                self._states = {k: v for k, v in self._states.items() if k == ""}
            _, model = self.load()
            self._states[key] = self.read_state(client, model)
        return self._states[key]

    def read_state(self, client: str | None, model: AdaptedModel) -> AdapterState:
        """Read an adapter and check its file and its shapes; ``model`` may have no weights."""
        sha256 = self.run.adapter_sha256(self.server_round, client)
        folder = self.run.adapter_folder(self.server_round, client)
        role, name = GLOBAL if client is None else LOCAL, self.run.config.model.name
        return load_adapter(folder, model, role, name, within=self.run.path, sha256=sha256)

    def _gate(self, loaded: LoadedModel, model: AdaptedModel, who: Answering) -> Gate | None:
        """Return the gate of the local adapter's owner, fitted to its own prompts once."""
        config, owner = self.run.config, who.local
        if config.adapters.gate == "none" or owner is None or not who.with_global:
            return None
        if owner not in self._gates:
            client = config.client(owner)
            files = load_client_files(config, client, self.root)
            records = (files.local.records, files.universal.records)
            self._gates[owner] = fit_gate(model, loaded.tokenizer, client.system_prompt, *records)
        return self._gates[owner]
