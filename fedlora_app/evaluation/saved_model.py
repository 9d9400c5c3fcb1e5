"""A saved round's adapters on the base model, to be asked: whose answer, and at which scale.

Input: a run directory and a choice of its adapters. Output: the model that answers with them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace

from fedlora_app.config.combination import GATE, INSTANCE, MIXER, SCALE, SEARCH, Combination
from fedlora_app.config.schema import GLOBAL, LOCAL, OWN_GLOBAL
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.data.client_files import load_client_files
from fedlora_app.data.dialogue import pin_date
from fedlora_app.evaluation.answering import Answering, SavedAdapters
from fedlora_app.evaluation.combiner import Combiner
from fedlora_app.evaluation.fitted import (
    FittedCombiner,
    FittingTask,
    describe_fit,
    load_combiner,
    save_combiner,
)
from fedlora_app.evaluation.gate import Gate
from fedlora_app.evaluation.gate_files import describe_origin, find_gate, load_gate
from fedlora_app.evaluation.instance import InstanceWeights
from fedlora_app.evaluation.search import SearchedWeights
from fedlora_app.evaluation.token_mixer import TokenMixer
from fedlora_app.model.adapter_files import load_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import (
    AdaptedModel,
    attach_once,
    only_adapters,
    scaled_local,
    set_state,
)
from fedlora_app.model.base import LoadedModel, ModelError, load_base_model
from fedlora_app.model.fingerprint import explain_fingerprint
from fedlora_app.model.ranks import fit_client, widen_from_client

FITTED: dict[Combination, type[FittedCombiner]] = {
    INSTANCE: InstanceWeights,
    SEARCH: SearchedWeights,
    MIXER: TokenMixer,
}
"""What is fitted on a round's adapters."""


@dataclass(frozen=True)
class SavedModel(SavedAdapters):
    """The base model with the adapters of one round; loaded at the first need."""

    _states: dict[str, AdapterState] = field(default_factory=dict)
    _combiners: dict[tuple[str, Combination], Combiner | None] = field(default_factory=dict)

    def load(self) -> tuple[LoadedModel, AdaptedModel]:
        """Return the base model, and with its adapters' modules on it.

        Raises:
            ModelError: it is not there, or not the one that the run was trained on.
        """
        loaded = load_base_model(self.run.config.model, self.root)
        self.check_base(loaded.fingerprint)
        pin_date(loaded.tokenizer, self.run.date)
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
    def answering(self, who: Answering) -> Iterator[tuple[AdaptedModel, Combiner | None]]:
        """Have exactly these adapters answer while the block runs.

        Yields:
            The model, and what combines its adapters, if anything but their scales does.
        """
        loaded, model = self.load()
        if who.with_global:
            set_state(model, GLOBAL, self._global_state(who))
        if who.local is not None:
            set_state(model, LOCAL, self.state(who.local))
        combiner = self.find_combiner(who, loaded.fingerprint)
        with only_adapters(model, who.adapters), scaled_local(model, who.scale):
            yield model, combiner

    def state(self, client: str | None) -> AdapterState:
        """Return a client's local adapter, or the global one with None; read and checked once."""
        key = client or ""
        if key not in self._states:
            if client is not None:  # one local adapter at a time; there may be many clients
                for other in self._states.keys() - {""}:
                    del self._states[other]
            _, model = self.load()
            self._states[key] = self.read_state(client, model)
        return self._states[key]

    def _global_state(self, who: Answering) -> AdapterState:
        """Return the global adapter as it answers there, with the ranks of all clients."""
        if who.global_of is None:
            return self.state(None)
        return self.read_global(who.global_of, self.load()[1])

    def read_global(self, owner: str | None, model: AdaptedModel) -> AdapterState:
        """Read the global adapter as a client has it, with the ranks of all clients.

        Args:
            owner: None where clients do not differ in it.
        """
        config, name = self.run.config, self.run.config.model.name
        if owner is None:
            return self.read_state(None, model)
        if config.federated.rule not in PERSONAL:
            received = fit_client(config, owner, self.read_state(None, model))
            return widen_from_client(config, owner, received)
        sha256 = self.run.adapter_sha256(self.server_round, owner, OWN_GLOBAL)
        folder = self.run.adapter_folder(self.server_round, owner, OWN_GLOBAL)
        return load_adapter(folder, model, GLOBAL, name, within=self.run.path, sha256=sha256)

    def global_sha256(self, owner: str | None) -> str:
        """Return the hash of the global adapter's file that a client answers with."""
        if owner is None or self.run.config.federated.rule not in PERSONAL:
            return self.run.adapter_sha256(self.server_round)
        return self.run.adapter_sha256(self.server_round, owner, OWN_GLOBAL)

    def read_state(self, client: str | None, model: AdaptedModel) -> AdapterState:
        """Read an adapter and check its file and its shapes; ``model`` may have no weights."""
        sha256 = self.run.adapter_sha256(self.server_round, client)
        folder = self.run.adapter_folder(self.server_round, client)
        role, name = GLOBAL if client is None else LOCAL, self.run.config.model.name
        return load_adapter(folder, model, role, name, within=self.run.path, sha256=sha256)

    def find_combiner(self, who: Answering, fingerprint: str) -> Combiner | None:
        """Return what combines a pair: what the local adapter's owner has kept, or a new one.

        It is the owner's, fitted beside the global adapter that the owner has, whoever's global
        one answers. The base model is loaded only to fit one; ``fingerprint`` says which it is.

        Raises:
            DataError: there is none yet, and the client's data are not there.
        """
        name = who.combination(self.run.config.adapters)
        if name == SCALE:
            return None
        key = who.local, name
        if key not in self._combiners:
            self._combiners.clear()  # one at a time, as of local adapters
            find = self._find_gate if name == GATE else self._find_fitted
            self._combiners[key] = find(who, fingerprint)
        return self._combiners[key]

    def _find_gate(self, who: Answering, fingerprint: str) -> Gate | None:
        config, owner = self.run.config, who.local
        client = config.client(owner)
        folder = self.run.paths.gate(owner)
        # Fitted to the data of the run, which may have changed since or be elsewhere.
        about = describe_origin(fingerprint, client, self._recorded_hashes(owner))
        gate = load_gate(folder, about, client.system_prompt)
        if gate is None:
            files = load_client_files(config, client, self.root)
            loaded, model = self.load()
            gate = find_gate(folder, model, loaded, client, files)
        return gate

    def _find_fitted(self, who: Answering, fingerprint: str) -> FittedCombiner:
        config, owner = self.run.config, who.local
        who = replace(who, global_of=self._owner_of_global(owner))
        kind = FITTED[who.combination(config.adapters)]
        client, folder = config.client(owner), self.run.paths.combiner(owner, kind.NAME)
        own_global = {"global_of": owner} if self.has_own_globals else {}
        sha256 = {
            GLOBAL: self.global_sha256(who.global_of),
            LOCAL: self.run.adapter_sha256(self.server_round, owner),
        }
        of_run = self._recorded_hashes(owner)
        about = describe_fit(kind, config, client, fingerprint, sha256, of_run) | own_global
        if (kept := load_combiner(kind, folder, about, client.system_prompt)) is not None:
            return kept
        files = load_client_files(config, client, self.root)
        about = describe_fit(kind, config, client, fingerprint, sha256, files.hashes) | own_global
        if (kept := load_combiner(kind, folder, about, client.system_prompt)) is not None:
            return kept  # to data that have changed since the run
        loaded, model = self.load()
        set_state(model, GLOBAL, self._global_state(who))
        set_state(model, LOCAL, self.state(owner))
        task = FittingTask(model, loaded.tokenizer, config, client, files, self.root)
        # A command's answer is on the other stream.
        with only_adapters(model, who.adapters), redirect_stdout(sys.stderr):
            fitted = kind.fit(task)
        with suppress(OSError):  # who can only read a run may ask it, and fits again
            save_combiner(folder, fitted, about)
        return fitted

    def _recorded_hashes(self, client: str) -> dict[str, str]:
        """Return the hashes of the data that a client had in the run."""
        return self.run.manifest["clients"].get(client, {})
