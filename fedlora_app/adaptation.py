"""New clients of a finished run: each fits a local adapter to the run's global one, on its own.

Input: a run, of which the final global adapter, ``config.json`` and ``manifest.json`` are read and
nothing is written, and the new clients' configuration (``config.adapted``). Output: a run directory
of mode *adapted*, which every command reads as it reads others. Its rounds are a client's local
phases in mode dual: the same seeds, steps, replay and learning-rate schedule, but beside a global
adapter that stands still. No server takes part and nothing leaves this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora_app.client import Client
from fedlora_app.config.schema import GLOBAL, LOCAL, Config, ConfigError
from fedlora_app.config.sharing import STAY
from fedlora_app.evaluation.reported import describe_round, split_evaluation
from fedlora_app.federation.messages import Kept
from fedlora_app.federation.registration import read_report
from fedlora_app.federation.replies import require_same_base
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import WEIGHTS_FILE, hash_file
from fedlora_app.foundation.terminal import shell
from fedlora_app.model.adapter_files import load_adapter, save_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, state_shapes
from fedlora_app.model.base import compute_fingerprint
from fedlora_app.model.fingerprint import explain_fingerprint
from fedlora_app.rescaling import RescalingClient, require_local
from fedlora_app.runs.console import describe_start
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.manifest import complete_rounds
from fedlora_app.runs.paths import RunDirectoryError, RunPaths
from fedlora_app.runs.reading import SavedRun, load_run
from fedlora_app.runs.resuming import (
    DATA_HASH,
    FRESH,
    Resumption,
    describe_changed_data,
    describe_other_software,
    find_changed_data,
    require_same_data,
    require_same_settings,
)
from fedlora_app.runs.round_record import RoundRecord
from fedlora_app.runs.tracking import build_trackers, require_trackers
from fedlora_app.training.phase import TrainingError
from fedlora_app.training.shapes import build_shapes

ADAPTED_FROM = "adapted_from"
"""Where the manifest says which run the global adapter is of."""

Say = Callable[[str], None]


class AdaptationError(UserError):
    """New clients cannot work with a run's global adapter, or could not be trained."""


@dataclass(frozen=True)
class Origin:
    """A finished run whose global adapter is given to new clients."""

    run: SavedRun
    sha256: str
    """Of the weights of the global adapter."""

    def describe(self) -> dict[str, Any]:
        """Return what the manifest of an adapted run says of it."""
        return {
            "run": self.run.name,
            "mode": self.run.config.federated.mode,
            "schedule": self.run.config.training.schedule,
            "round": self.run.final_round,
            "global_adapter": self.sha256,
        }

    def load(self, model: AdaptedModel) -> AdapterState:
        """Read the global adapter; ``model`` may have no weights.

        Raises:
            AdapterError: it is damaged, or of other shapes than the model's.
        """
        folder, name = self.run.paths.final_global, self.run.config.model.name
        return load_adapter(folder, model, GLOBAL, name, within=self.run.path, sha256=self.sha256)


def find_origin(path: Path) -> Origin:
    """Return a run whose global adapter new clients can work with.

    Raises:
        RunDirectoryError: it has not finished, shares nothing, or its adapter is damaged.
    """
    run = load_run(path)
    if run.config.federated.mode == "local-only":
        raise RunDirectoryError(
            f"{run.path} is of mode local-only: its clients share nothing, so there is no global "
            "adapter for a new one. A client on its own is a run of that mode: fedlora train."
        )
    if run.manifest.get("finished") is None:
        raise RunDirectoryError(
            f"{run.path} has not finished, so that its global adapter is not the final one. "
            f"Finish it first: fedlora train --resume {shell(run.path)}"
        )
    if (rule := run.config.federated.rule) in STAY:
        raise RunDirectoryError(
            f"{run.path} is of the aggregation rule {rule}: its clients keep a factor of the "
            "global adapter for themselves, and what they share does nothing by itself."
        )
    entry = next(e for e in run.manifest["rounds"] if e["round"] == run.final_round)
    weights, recorded = run.paths.final_global / WEIGHTS_FILE, entry["adapters"].get(GLOBAL)
    if not weights.is_file():
        raise RunDirectoryError(f"{weights} does not exist or is not a regular file. Restore it.")
    if hash_file(weights) != recorded:
        raise RunDirectoryError(
            f"{weights} is not the file that the run wrote: its sha256 differs from that of round "
            f"{run.final_round} in manifest.json. Restore it."
        )
    return Origin(run, recorded)


def find_stopped(run_dir: Path, config: Config, provenance: Mapping[str, Any]) -> Resumption | None:
    """Return where an adaptation of the same kind stopped in this folder; None if there is none.

    Args:
        provenance: what its manifest must say under ``ADAPTED_FROM``.

    Raises:
        RunDirectoryError: something else is there.
        ConfigError: it began with other settings.
    """
    if not RunPaths(run_dir).manifest.is_file():
        RunDirectory.require_absent(run_dir)
        return None
    saved = load_run(run_dir)
    if saved.manifest.get(ADAPTED_FROM) != provenance or saved.manifest.get("finished"):
        RunDirectory.require_absent(run_dir)
    require_same_settings(saved.config, config)
    before, now = (c.federated.num_rounds for c in (saved.config, config))
    if before != now:
        raise ConfigError(
            f"federated.num_rounds: {run_dir} was begun with {before} and {now} are given. Go on "
            "with as many, or choose another --name."
        )
    complete = complete_rounds(saved.manifest)
    return Resumption(saved, complete[-1] if complete else FRESH, config)


@dataclass(frozen=True)
class Adaptation:
    """The work of all new clients, one after the other in every round.

    Args:
        root: the project, to which the data's paths are relative.
        earlier: the run with the clients' local adapters, of which only the scale is fitted; None
            where new ones are trained.
        say: is given the lines that tell how far it is.
    """

    origin: Origin
    config: Config
    root: Path
    run_dir: Path
    earlier: SavedRun | None = None
    say: Say = print

    @cached_property
    def date(self) -> str:
        """The day that prompts are written for: the run's, which its global adapter has seen."""
        return self.origin.run.date or datetime.now(UTC).date().isoformat()

    def client(self, client_id: str) -> Client:
        """Return a new client."""
        args = self.config, client_id, self.run_dir, self.root, self.date
        return (
            Client(*args) if self.earlier is None else RescalingClient(*args, earlier=self.earlier)
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the adapters come from, as the manifest says it."""
        found = self.origin.describe()
        if self.earlier is not None:
            local = {"run": self.earlier.name, "round": self.earlier.final_round}
            found["local_adapters"] = local
        return found

    def run(self) -> Path:
        """Train all clients, or go on where that was stopped; return the run directory.

        Raises:
            UserError: with all that is wrong, before anything is written or loaded; later where
                a client's data change, or it cannot be trained.
        """
        require_trackers(self.config)
        resumption = find_stopped(self.run_dir, self.config, self.provenance)
        model, state, reports = self._prepare(resumes=resumption is not None)
        after = FRESH if resumption is None else resumption.after_round
        if resumption is None:
            facts = {ADAPTED_FROM: self.provenance}
            create = RunDirectory.create
            commit = getattr(model.get_base_model().config, "_commit_hash", None)
            run = create(self.run_dir, self.config, self.root, reports, commit, self.date, **facts)
        else:
            require_same_data(resumption.saved.manifest, reports)
            run = RunDirectory.reopen(self.run_dir, resumption.saved.manifest)
        with closing(run):
            if self.earlier is None:
                shapes = {name: state_shapes(model, name) for name in (GLOBAL, LOCAL)}
                self.say(describe_start(self.config, shapes, reports))
            locals_: dict[str, tuple[int, str]] = {}
            if resumption is not None:
                locals_ |= self._resume(run, resumption, reports)
            run.trackers = build_trackers(self.config, run.path)
            base = self.config.model.name
            save_adapter(run.paths.global_adapter(0), model, GLOBAL, state, base)
            for server_round in range(after + 1, self.config.federated.num_rounds + 1):
                self._run_round(run, server_round, state, locals_)
            save_adapter(run.paths.final_global, model, GLOBAL, state, base)
            run.finish()
        return run.path

    def _prepare(
        self, *, resumes: bool
    ) -> tuple[AdaptedModel, AdapterState, dict[str, dict[str, Any]]]:
        """Return the model's shapes, the global adapter and what each client says of itself."""
        model, faults = build_shapes(self.config, self.root)
        known = list(faults)
        reports = {}
        for client_id in self.config.client_ids:
            try:
                metrics, facts = self.client(client_id).register(resumes=resumes)
                reports[client_id] = read_report(metrics, facts)
                if self.earlier is not None and model is not None:
                    args = self.earlier, client_id, self.config, model, self.origin.run
                    require_local(*args)
            except UserError as error:
                text = str(error)
                for fault in known:  # which every client finds too
                    text = text.replace(fault, "").strip()
                faults += [f"{client_id}: {text}"] if text else []
        state: AdapterState = {}
        if model is not None:
            try:
                self._require_same_base()
                state = self.origin.load(model)
            except UserError as error:
                faults.append(str(error))
        if model is None or faults:
            raise AdaptationError("\n".join(["The new clients cannot be trained:", *faults]))
        return model, state, reports

    def _require_same_base(self) -> None:
        """Raise unless the base model is the run's: by its fingerprint, wherever it lies."""
        recorded, ours = self.origin.run.manifest["base_model"], self.config.model
        if "fingerprint" in recorded:
            found = compute_fingerprint(ours, self.root)
            if found == recorded["fingerprint"]:
                return
            which = f"its fingerprint is {found[:12]}, the run's {recorded['fingerprint'][:12]}"
        elif (ours.name, ours.revision) == (recorded["name"], recorded.get("revision")):
            return
        else:
            which = f"it is called {ours.name}, and the run's manifest holds no fingerprint"
        raise AdaptationError(
            f"model.name: {ours.name} is not the base model that the global adapter of "
            f"{self.origin.run.name} was trained on ({recorded['name']}): {which}. Name that one, "
            "and its model.revision: weights, config.json, tokenizer and chat template must be "
            f"the same.{explain_fingerprint(recorded)}"
        )

    def _resume(
        self, run: RunDirectory, resumption: Resumption, reports: Mapping[str, Any]
    ) -> dict[str, tuple[int, str]]:
        """Return the clients' local adapters after their files were checked, and go back to them.

        Raises:
            AdapterError: one is missing, or is not what was written.
        """
        for note in describe_other_software(run.manifest, reports):
            self.say(note)
        locals_ = resumption.find_kept(LOCAL)
        for client_id, entry in locals_.items():
            self.client(client_id).verify({LOCAL: Kept(*entry)})
        run.rewind(self.config, resumption.after_round, resumption.changes)
        num_rounds = self.config.federated.num_rounds
        self.say(f"Going on after round {max(resumption.after_round, 0)} of {num_rounds}.")
        return locals_

    def _run_round(
        self,
        run: RunDirectory,
        server_round: int,
        state: AdapterState,
        locals_: dict[str, tuple[int, str]],
    ) -> None:
        """Have every client take its local phase and evaluate, and enter the round.

        Args:
            locals_: each client's local adapter, of which round it is and its sha256; changed.
        """
        federated, reports = self.config.federated, {}
        record = RoundRecord(run, server_round, self.say)
        record.adapters[GLOBAL] = self.origin.sha256
        for client_id in self.config.client_ids:
            keeps = federated.keep_rounds
            oldest = run.oldest_kept_round(LOCAL, client_id, keeps) if keeps else 0
            before = locals_.get(client_id, (-1, ""))
            args = server_round, state, {LOCAL: Kept(*before, oldest)}
            try:
                reports[client_id], facts = self.client(client_id).personalise(*args)
            except TrainingError as error:
                raise AdaptationError(f"{client_id}: {error}") from None
            self._enter(run, record, client_id, reports[client_id], facts)
            locals_[client_id] = server_round, facts["local_adapter"]
        seconds, left = record.complete({}, {}), None
        if server_round > 0:  # round 0 trains nothing
            left = seconds * (federated.num_rounds - server_round)
        sample = self.config.evaluation.sample
        line = describe_round(server_round, federated.num_rounds, reports, seconds, left, sample)
        self.say(line)

    def _enter(
        self,
        run: RunDirectory,
        record: RoundRecord,
        client_id: str,
        metrics: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> None:
        """Enter what a client did in a round, as a server would.

        Raises:
            AdaptationError: its data are no longer what it began with.
        """
        if changed := find_changed_data(run.manifest["clients"][client_id], facts):
            raise AdaptationError(describe_changed_data(self.config, client_id, changed))
        require_same_base(run.manifest["base_model"], {client_id: facts["base_model"]})
        evaluation, training = split_evaluation(dict(metrics))
        if training:
            record.add_metrics(client_id, LOCAL, training)
        record.add_metrics(client_id, "evaluate", evaluation)
        record.adapters[f"{LOCAL}:{client_id}"] = facts["local_adapter"]
        told = {key: value for key, value in facts.items() if not key.startswith(DATA_HASH)}
        record.log("facts", client=client_id, **told)


def describe_newcomers(config: Config, origin: Origin, unused: list[str]) -> Iterator[str]:
    """Yield what is to be known before new clients are trained."""
    if unused:
        yield f"Note: no server takes part, so these have no effect: {', '.join(unused)}."
    took_part = set(origin.run.config.client_ids)
    for client_id in config.client_ids:
        if client_id in took_part:
            yield (
                f"Note: {client_id} is a client of {origin.run.name} and has a local adapter "
                "there; the one that is fitted now begins anew."
            )
