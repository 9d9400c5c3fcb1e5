"""The reader of a run directory.

``load_run`` is strict: what resumes, evaluates or exports a run needs all of it as it was
written. ``read_what_is_left`` is tolerant: a report of a damaged or half-finished run says what
is missing and shows the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedlora_app.config.combination import Combination, as_configured
from fedlora_app.config.loading import parse_config
from fedlora_app.config.rounds import RoundPlan, plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, OWN_GLOBAL, Config, ConfigError
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.foundation.files import WEIGHTS_FILE, hash_file
from fedlora_app.runs.manifest import (
    Manifest,
    check_manifest,
    complete_rounds,
    find_final_round,
    find_kept_round,
    read_date,
)
from fedlora_app.runs.paths import RunDirectoryError, RunPaths, require_within

MOST_FAULTS = 5  # that an error names
OWN_AVERAGES = "own averages"
MODES = {
    "dual": "a global and a local adapter at each client",
    "fedavg": "one averaged adapter for all clients, a baseline",
    OWN_AVERAGES: "an averaged adapter of each client's own, a baseline",
    "finetuned": "each client's own copy of the average, a baseline",
    "local-only": "a local adapter at each client and nothing shared, a baseline",
    "centralized": "one adapter trained on everybody's data, a baseline",
    "adapted": "another run's global adapter and a local one at each new client",
}
"""What clients answer with."""


def find_kind(mode: str, rule: str | None) -> str:
    """Return a run's mode, or that its rule leaves each client an average of its own."""
    return OWN_AVERAGES if mode == "fedavg" and rule in PERSONAL else mode


@dataclass(frozen=True)
class SavedRun:
    """One run directory with its checked configuration."""

    path: Path
    config: Config
    manifest: Manifest

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def date(self) -> str:
        """The day that the run's prompts are written for (YYYY-MM-DD), "" where it is not known."""
        return read_date(self.manifest)

    @cached_property
    def paths(self) -> RunPaths:
        """Where its files lie."""
        return RunPaths(self.path)

    @property
    def last_round(self) -> int:
        """The newest complete round.

        Raises:
            RunDirectoryError: not one is complete.
        """
        rounds = complete_rounds(self.manifest)
        if not rounds:
            raise RunDirectoryError(f"{self.path} has no complete round; nothing to evaluate.")
        return rounds[-1]

    @property
    def final_round(self) -> int:
        """The round whose adapters are the result, of a stopped run the newest one.

        Raises:
            RunDirectoryError: not one is complete.
        """
        return self.last_round if (found := find_final_round(self.manifest)) is None else found

    def plan(self, server_round: int) -> RoundPlan:
        """Return what a round of this run does, and which adapters clients answer with after it."""
        return plan_round(self.config, server_round)

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """What ``fedlora evaluate`` wrote for the final round, None before that.

        A run that went on after it has one of a former final round, which is none.
        """
        return self.find_evaluation(self.final_round)

    def find_evaluation(
        self, server_round: int, combination: Combination | None = None
    ) -> dict[str, Any] | None:
        """Return what ``fedlora evaluate`` wrote for a round, None if it did not.

        Args:
            combination: of the two adapters; None: as the run's configuration says.
        """
        path = self.evaluation_path(server_round, combination)
        found = read_object(path) if path.exists() else None
        return found if found and found.get("round") == server_round else None

    def evaluation_path(self, server_round: int, combination: Combination | None = None) -> Path:
        """Where the evaluation of a round and of a combination is kept."""
        is_final = server_round == self.final_round
        is_own = combination in (None, as_configured(self.config.adapters))
        if is_final and is_own:
            return self.paths.evaluation
        return self.paths.other_evaluation(
            None if is_final else server_round, None if is_own else combination
        )

    def count_steps(self, server_round: int) -> int:
        """Return the optimizer steps of all clients and phases up to a round."""
        path = self.paths.history
        history = _read_json(path)
        try:
            values = [
                value
                for entry in history
                if entry["round"] <= server_round
                for metric, value in entry["metrics"].items()
                if metric.startswith("train_") and metric.endswith("/num_steps")
            ]
            return int(sum(values))
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            raise RunDirectoryError(
                f"{path} is damaged: it is not a list of rounds with their metrics."
            ) from None

    def count_parameters(self, server_round: int, active: Sequence[str]) -> dict[str, int]:
        """Return the parameters of each adapter that clients answer with."""
        clients = {GLOBAL: None, LOCAL: self.config.client_ids[0]}
        counts = {}
        for name in active:
            weights = self._weights_file(server_round, clients[name])
            try:
                with safe_open(weights, framework="np") as file:
                    shapes = (file.get_slice(key).get_shape() for key in file.keys())  # noqa: SIM118
                    counts[name] = sum(map(math.prod, shapes))
            except (SafetensorError, OSError, ValueError) as error:
                raise RunDirectoryError(f"{weights} is damaged: {error}") from error
        return counts

    def local_round(self, server_round: int, client_id: str) -> int:
        """Return the round of the local adapter that a client had after a round."""
        return find_kept_round(self.manifest, client_id, server_round)

    def adapter_folder(
        self, server_round: int, client_id: str | None = None, role: str = LOCAL
    ) -> Path:
        """Folder of the global adapter after a round, or of one that a client had for itself.

        Args:
            role: of the client's, ``LOCAL`` or ``OWN_GLOBAL``.
        """
        if client_id is None:
            is_given = self.plan(server_round).is_global_given  # and so it is kept once
            return self.paths.global_adapter(0 if is_given else server_round)
        own_round = find_kept_round(self.manifest, client_id, server_round, role)
        find = self.paths.own_global if role == OWN_GLOBAL else self.paths.local_adapter
        return find(client_id, own_round)

    def adapter_sha256(
        self, server_round: int, client_id: str | None = None, role: str = LOCAL
    ) -> str:
        """Return an adapter's hash after comparing the file with the manifest.

        Args:
            role: as for ``adapter_folder``.

        Raises:
            RunDirectoryError: the round is not complete, or the file is not what was written.
        """
        entry = next((e for e in self.manifest["rounds"] if e["round"] == server_round), None)
        if entry is None:
            done = ", ".join(map(str, complete_rounds(self.manifest))) or "none"
            raise RunDirectoryError(
                f"{self.path} has no complete round {server_round}. Complete: {done}."
            )
        if client_id is not None:
            own_round = find_kept_round(self.manifest, client_id, server_round, role)
            entry = next(e for e in self.manifest["rounds"] if e["round"] == own_round)
        recorded = entry["adapters"].get(GLOBAL if client_id is None else f"{role}:{client_id}")
        weights = self._weights_file(server_round, client_id, role)
        if recorded is None:
            raise RunDirectoryError(f"{weights} is not in the run's manifest.")
        found = hash_file(weights)
        if recorded not in ("", found):  # empty where a client has written it and not answered
            raise RunDirectoryError(
                f"{weights} is not the file that the run wrote: its sha256 differs from the one "
                "in manifest.json. Restore it, or evaluate another round."
            )
        return found

    def _weights_file(self, server_round: int, client_id: str | None, role: str = LOCAL) -> Path:
        """Return an adapter's file after checking that it lies, links followed, in this run."""
        weights = self.adapter_folder(server_round, client_id, role) / WEIGHTS_FILE
        if not weights.is_file():
            raise RunDirectoryError(f"{weights} does not exist or is not a regular file.")
        require_within(weights, self.path)
        return weights


def load_run(path: Path | str) -> SavedRun:
    """Read a whole run directory.

    Raises:
        RunDirectoryError: it is not one, or its files are damaged.
        ConfigError: its configuration has faults.
    """
    try:
        path = Path(path).resolve()  # "latest" is a link
        paths = RunPaths(path)
        needed = (paths.config, paths.manifest)
        missing = [file.name for file in needed if not file.is_file()]
    except (OSError, ValueError, RuntimeError) as error:
        raise RunDirectoryError(f"{path} is not a run directory: {error}.") from None
    if missing:
        raise RunDirectoryError(
            f"{path} is not a run directory: {missing[0]} is missing. Expected what flwr run wrote."
        )
    for file in needed:
        require_within(file, path)
    manifest, faults = check_manifest(read_object(paths.manifest))
    if faults:
        raise RunDirectoryError(describe_damage(paths.manifest, faults))
    return SavedRun(path, read_config(paths.config), manifest)


def describe_mode(path: Path) -> str:
    """Return a run's mode in words, such as "mode fedavg: one averaged adapter, a baseline".

    The mode alone where config.json, which has the rule of aggregation, is missing or damaged.
    """
    paths = RunPaths(path)
    try:
        mode = read_object(paths.manifest).get("mode")
    except RunDirectoryError:
        mode = None
    if mode not in MODES:
        return "of an unknown mode"
    try:
        rule = read_config(paths.config).federated.rule
    except (RunDirectoryError, ConfigError):
        return f"mode {mode}"
    return f"mode {mode}: {MODES[find_kind(mode, rule)]}"


def describe_damage(path: Path, faults: Sequence[str]) -> str:
    """Return the error for a manifest with these faults."""
    more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
    return f"{path} is damaged: {'; '.join(faults[:MOST_FAULTS])}{more}."


def read_config(path: Path) -> Config:
    """Read and check a run's configuration."""
    return parse_config(_read_json(path), source=str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    value = _read_json(path)
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{path} is damaged: it does not hold an object.")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}.") from None
