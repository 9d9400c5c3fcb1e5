"""A run directory as those read it who come after the training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedlora_app.config.loading import parse_config
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.foundation.files import WEIGHTS_FILE, hash_file
from fedlora_app.runs.directory import RunDirectoryError, find_local_round, require_within

EVALUATION_FILE = "evaluation.json"
MAX_KEY_SHOWN = 100


EXAMPLE_COUNTS = ("universal_examples", "local_examples")


@dataclass(frozen=True)
class SavedRun:
    """One run directory with its checked configuration."""

    path: Path
    config: Config
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def last_round(self) -> int:
        """The newest complete round.

        Raises:
            RunDirectoryError: not one is complete.
        """
        rounds = [entry["round"] for entry in self.manifest["rounds"]]
        if not rounds:
            raise RunDirectoryError(f"{self.path} has no complete round; nothing to evaluate.")
        return max(rounds)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that a client answers with in this run's mode."""
        return plan_round(self.config, self.config.federated.num_rounds).evaluated

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """What ``fedlora evaluate`` wrote for the newest round, None before that."""
        path = self.path / EVALUATION_FILE
        return _read_object(path) if path.exists() else None

    def find_evaluation(self, server_round: int) -> dict[str, Any] | None:
        """Return what ``fedlora evaluate`` wrote for a round, None if it did not."""
        path = self.evaluation_path(server_round)
        found = _read_object(path) if path.exists() else None
        return found if found and found.get("round") == server_round else None

    def evaluation_path(self, server_round: int) -> Path:
        """Where the evaluation of a round is kept."""
        if server_round == self.last_round:
            return self.path / EVALUATION_FILE
        return self.path / f"evaluation_round_{server_round:03d}.json"

    def count_steps(self, server_round: int) -> int:
        """Return the optimizer steps of all clients and phases up to a round."""
        path = self.path / "history.json"
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
        return find_local_round(self.manifest, client_id, server_round)

    def adapter_folder(self, server_round: int, client_id: str | None = None) -> Path:
        """Folder of the global adapter after a round, or of the local one that a client had."""
        if client_id is not None:
            server_round = self.local_round(server_round, client_id)
        name = f"round_{server_round:03d}"
        if client_id is None:
            return self.path / "server" / name
        return self.path / "clients" / client_id / name

    def adapter_sha256(self, server_round: int, client_id: str | None = None) -> str:
        """Return an adapter's hash after comparing the file with the manifest.

        Raises:
            RunDirectoryError: the round is not complete, or the file is not what was written.
        """
        entry = next((e for e in self.manifest["rounds"] if e["round"] == server_round), None)
        if entry is None:
            done = ", ".join(str(e["round"]) for e in self.manifest["rounds"]) or "none"
            raise RunDirectoryError(
                f"{self.path} has no complete round {server_round}. Complete: {done}."
            )
        if client_id is not None:
            own_round = self.local_round(server_round, client_id)
            entry = next(e for e in self.manifest["rounds"] if e["round"] == own_round)
        recorded = entry["adapters"].get(GLOBAL if client_id is None else f"{LOCAL}:{client_id}")
        weights = self._weights_file(server_round, client_id)
        if recorded is None:
            raise RunDirectoryError(f"{weights} is not in the run's manifest.")
        if hash_file(weights) != recorded:
            raise RunDirectoryError(
                f"{weights} is not the file that the run wrote: its sha256 differs from the one "
                "in manifest.json. Restore it, or evaluate another round."
            )
        return recorded

    def _weights_file(self, server_round: int, client_id: str | None) -> Path:
        """Return an adapter's file after checking that it lies, links followed, in this run."""
        weights = self.adapter_folder(server_round, client_id) / WEIGHTS_FILE
        if not weights.is_file():
            raise RunDirectoryError(f"{weights} does not exist or is not a regular file.")
        require_within(weights, self.path)
        return weights


def load_run(path: Path | str) -> SavedRun:
    """Read a run directory.

    Raises:
        RunDirectoryError: it is none, or its files are damaged.
    """
    names = ("config.json", "manifest.json")
    try:
        path = Path(path).resolve()  # "latest" is a link
        missing = [name for name in names if not (path / name).is_file()]
    except (OSError, ValueError, RuntimeError) as error:
        raise RunDirectoryError(f"{path} is not a run directory: {error}.") from None
    if missing:
        raise RunDirectoryError(
            f"{path} is not a run directory: {missing[0]} is missing. Expected what flwr run wrote."
        )
    for name in names:
        require_within(path / name, path)
    manifest = _read_object(path / "manifest.json")
    faults = list(_find_manifest_faults(manifest))
    if faults:
        raise RunDirectoryError(f"{path / 'manifest.json'} is damaged: {'; '.join(faults)}.")
    config = parse_config(_read_json(path / "config.json"), source=str(path / "config.json"))
    return SavedRun(path, config, manifest)


def find_run(name: str, root: Path) -> Path:
    """Return the run directory that ``name`` means: a path, or a name below ``results``.

    Raises:
        RunDirectoryError: there is none, naming the places searched and the newest runs.
    """
    places = [Path(name), root / "results" / name]
    for place in places:
        if place.is_dir():
            return place.resolve()
    results = root / "results"
    found = [*results.glob("*/manifest.json"), *results.glob("*/*/manifest.json")]
    runs = [path.parent for path in found if not path.parent.is_symlink()]
    newest = sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)[:5]
    listing = "".join(f"\n  {run.relative_to(results)}" for run in newest)
    known = f" Newest runs in {results}:{listing}" if newest else " Start one with flwr run first."
    raise RunDirectoryError(f"There is no run {places[0]} and no {places[1]}.{known}")


def _find_manifest_faults(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield what readers would stumble over; what a section leaves out is theirs to miss."""
    if not isinstance(manifest.get("rounds"), list):
        yield "it lists no rounds"
        return
    for number, entry in enumerate(manifest["rounds"], start=1):
        if not _is_round(entry):
            yield f'entry {number} of "rounds" is not a round with the hashes of its adapters'
            return
    if len({entry["round"] for entry in manifest["rounds"]}) < len(manifest["rounds"]):
        yield "a round is there twice"
    sections = {key: manifest.get(key) for key in ("base_model", "clients", "versions")}
    for key, section in sections.items():
        if not isinstance(section, dict):
            yield f'"{key}" is not an object'
            return
    for key, value in {"name": None, **sections["base_model"]}.items():
        if not isinstance(value, str) and (value is not None or key == "name"):
            yield f'"base_model" has no text as {key[:MAX_KEY_SHOWN]!r}'
    for client, facts in sections["clients"].items():
        if not isinstance(facts, dict):
            yield f'"clients" has no object for {client[:MAX_KEY_SHOWN]!r}'
        elif any(not isinstance(facts.get(k, 0), int) for k in EXAMPLE_COUNTS):
            yield f'"clients" has no number of examples for {client[:MAX_KEY_SHOWN]!r}'


def _is_round(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    number, adapters = entry.get("round"), entry.get("adapters")
    return (
        isinstance(number, int)
        and not isinstance(number, bool)
        and number >= 0
        and isinstance(adapters, dict)
        and all(isinstance(value, str) for value in adapters.values())
    )


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{path} is damaged: it does not hold an object.")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}.") from None
