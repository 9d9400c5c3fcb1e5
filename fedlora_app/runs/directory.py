"""The run directory: what training writes and everything else reads.

A round is complete once ``manifest.json`` lists it, which is written last; whatever else a
stopped run leaves is ignored.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from fedlora_app.config.schema import Config
from fedlora_app.foundation.files import (
    extend_atomically,
    extend_json_list,
    lock_folder,
    new_folder,
    remove_partials,
    write_atomically,
    write_json,
)
from fedlora_app.foundation.project import hash_package
from fedlora_app.runs.history import read_rounds
from fedlora_app.runs.manifest import complete_rounds, find_kept_round
from fedlora_app.runs.paths import LATEST, RunDirectoryError, RunPaths, require_within
from fedlora_app.runs.tracking import Trackers

SERVER = "(server)"
"""Stands for the client where a figure is the server's own; no client can be called that."""
RECORDED_PACKAGES = (
    "flwr",
    "ray",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
)


TABLE_HEADING = "round,client,phase,metric,value\n"


class RunDirectory:
    """One run's folder, written by the server. Clients write below ``clients/<id>``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = RunPaths(path)
        self._new_history: list[dict[str, Any]] = []  # of the round that is not complete yet
        self.manifest: dict[str, Any] = {}
        self.trackers = Trackers()
        self._lock: IO[str] | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        config: Config,
        root: Path,
        clients: dict[str, Any],
        base_commit: str | None = None,
        date: str | None = None,
        **facts: Any,
    ) -> RunDirectory:
        """Create the folder with ``config.json`` and ``manifest.json``, and point latest to it.

        Args:
            clients: what each client reported when it registered.
            base_commit: the hub's commit of the base model, where it comes from there.
            date: the day that prompts are written for; None: this one.
            facts: what else the manifest says.

        Raises:
            RunDirectoryError: the folder exists; nothing in it is touched.
        """
        cls.require_absent(path)
        run = cls(path)
        model = config.model
        base = {"name": model.name, "revision": model.revision, "commit": base_commit}
        run.manifest = begin_manifest(config, root, clients, date, **{"base_model": base} | facts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(path) as partial:  # a run directory always has both files
                partial.chmod(0o700)
                write_json(RunPaths(partial).config, config.dump())
                write_json(RunPaths(partial).manifest, run.manifest)
            run._take_lock()
        except OSError as error:
            if isinstance(error, FileExistsError):
                cls.require_absent(path)  # another run was quicker
            raise RunDirectoryError(f"{path} cannot be made: {error.strerror}.") from None
        run.point_latest()
        return run

    @classmethod
    def reopen(cls, path: Path, manifest: dict[str, Any]) -> RunDirectory:
        """Return a stopped run's folder, locked; ``rewind`` makes it ready to be continued.

        Args:
            manifest: what ``manifest.json`` holds.

        Raises:
            RunDirectoryError: another process is writing in it, or a part of it lies elsewhere.
        """
        run = cls(path)
        links = (folder for folder in run.paths.server.glob("*") if folder.is_symlink())
        for own in (*run.paths.written_by_server, *links):
            require_within(own, path)
        run.manifest = dict(manifest)
        run._take_lock()
        return run

    def rewind(
        self,
        config: Config,
        after_round: int,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        """Discard what came after a complete round; the other files are rewritten.

        The manifest comes first: where this stops, the rest holds more rounds than count, and
        never fewer.

        Args:
            after_round: below 0 for none.
            changes: of the run's settings from here on, what each was and what it is.
        """
        entries = read_rounds(self.path, complete_rounds(self.manifest, after_round))
        for folder in (self.path, self.paths.server, self.paths.final):
            remove_partials(folder)
        rounds = [entry for entry in self.manifest["rounds"] if entry["round"] <= after_round]
        stop = {"time": _now(), "after_round": after_round, "changes": dict(changes or {})}
        resumed = [*self.manifest.get("resumed", []), stop]
        self.manifest |= {"finished": None, "rounds": rounds, "resumed": resumed}
        self.manifest.pop("final", None)
        self._write_manifest()
        write_json(self.paths.config, config.dump())
        shutil.rmtree(self.paths.final_global, ignore_errors=True)  # of an earlier round
        self.write_history(entries)
        self._rewind_events(after_round)
        self.point_latest()

    def thin(self, keep_rounds: int) -> None:
        """Delete the adapters of all but the newest complete rounds."""
        for server_round in complete_rounds(self.manifest)[:-keep_rounds]:
            shutil.rmtree(self.paths.global_adapter(server_round), ignore_errors=True)

    def oldest_kept_round(self, role: str, client: str, keep_rounds: int) -> int:
        """Return the oldest round whose local adapter a client needs for the rounds to keep.

        If it took no part in the oldest of these, that is the round whose adapter it still had.

        Args:
            role: of the local adapter, or of something else that clients keep by rounds.
        """
        kept = complete_rounds(self.manifest)[-keep_rounds:]
        return find_kept_round(self.manifest, client, kept[0], role) if kept else 0

    @staticmethod
    def require_absent(path: Path) -> None:
        """Raise if something is at ``path`` already."""
        if path.exists() or path.is_symlink():
            raise RunDirectoryError(
                f"{path} exists already and is left as it is. Choose another name for the run."
            )

    @classmethod
    def require_makeable(cls, path: Path) -> None:
        """Raise if a run directory could not be made: it is there, or nothing can be written."""
        cls.require_absent(path)
        there = next(folder for folder in path.parents if folder.exists())
        if not there.is_dir():
            raise RunDirectoryError(f"{path} cannot be made: {there} is not a folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RunDirectoryError(f"{path} cannot be made: {there} may not be written in.")

    def log_event(self, event: str, **fields: Any) -> None:
        """Append one object to ``metrics.jsonl`` and show it to the trackers."""
        entry = {"time": _now(), "event": event, **fields}
        with self.paths.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.trackers.log(entry)

    def add_metrics(
        self, server_round: int, client: str, phase: str, metrics: dict[str, Any]
    ) -> None:
        """Keep one client's metrics of one phase for the history, and log them."""
        self.log_event("metrics", round=server_round, client=client, phase=phase, **metrics)
        self._new_history.append(
            {"round": server_round, "client": client, "phase": phase, "metrics": metrics}
        )

    def add_failure(self, server_round: int, client: str, why: str) -> None:
        """Record that a client took no part in a round, and log why."""
        self.log_event("failure", round=server_round, client=client, why=why)
        self._new_history.append(
            {
                "round": server_round,
                "client": client,
                "phase": "failure",
                "metrics": {"failed": 1},
                "why": why,
            }
        )

    def complete_round(self, server_round: int, adapters: dict[str, str], **facts: Any) -> None:
        """Write the history and then enter the round in the manifest with its hashes."""
        self._extend_history()
        self.manifest["rounds"].append(
            {"round": server_round, "completed": _now(), "adapters": adapters, **facts}
        )
        self._write_manifest()

    def write_history(self, entries: list[dict[str, Any]]) -> None:
        """Write both files of the history, in the place of what they held."""
        write_json(self.paths.history, entries)
        write_atomically(self.paths.history_table, TABLE_HEADING + _as_rows(entries))

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished."""
        self.manifest |= {"finished": _now(), **facts}
        self._write_manifest()

    def close(self) -> None:
        """Release the trackers and the lock; also called when the run ends with an error."""
        self.trackers.close()
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> None:
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise RunDirectoryError(
                f"{self.path} is being written by another process. Two runs cannot share a run "
                "directory; wait for it, or stop it (flwr list, flwr stop)."
            )

    def _extend_history(self) -> None:
        """Add what is new to both files; what they hold already is not read."""
        entries, self._new_history = self._new_history, []
        table = self.paths.history_table
        rows = _as_rows(entries)
        extend_json_list(self.paths.history, entries)
        extend_atomically(table, rows if table.exists() else TABLE_HEADING + rows)

    def _rewind_events(self, after_round: int) -> None:
        """Drop the events of later rounds, and a last line that a stop has cut."""
        path, kept = self.paths.events, []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            try:
                if json.loads(line).get("round", after_round) <= after_round:
                    kept.append(line.decode() + "\n")
            except (ValueError, AttributeError, TypeError):
                continue
        write_atomically(path, "".join(kept))

    def _write_manifest(self) -> None:
        write_json(self.paths.manifest, self.manifest)

    def point_latest(self) -> None:
        """Point the link beside the run to it."""
        link = self.path.parent / LATEST
        partial = link.with_name(f".{LATEST}.{os.getpid()}")
        partial.unlink(missing_ok=True)
        try:
            partial.symlink_to(self.path.name)
            partial.replace(link)
        except OSError as error:
            partial.unlink(missing_ok=True)
            print(f"Note: {link} was not updated: {error.strerror}.", flush=True)


def begin_manifest(
    config: Config, root: Path, clients: dict[str, Any], date: str | None, **facts: Any
) -> dict[str, Any]:
    """Return the manifest of a run that begins now.

    Args:
        clients: what each client reported when it registered.
        date: the day that prompts are written for; None: this one.
        facts: what else it says; ``base_model`` must be there.
    """
    return {
        "format": 1,
        "started": _now(),
        "date": date or _now()[:10],
        "finished": None,
        "seed": config.experiment.seed,
        "mode": config.federated.mode,
        "base_model": facts.pop("base_model"),
        "git_commit": _git_commit(root),
        "package_sha256": hash_package(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
        "server_hardware": {"machine": platform.machine(), "cpu_count": os.cpu_count()},
        "clients": clients,
        "rounds": [],
        **facts,
    }


def _as_rows(entries: list[dict[str, Any]]) -> str:
    """Return the rows of the tidy table: one per scalar metric."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    for entry in entries:
        for metric, value in entry["metrics"].items():
            if isinstance(value, int | float):
                row = [entry["round"], entry["client"], entry["phase"], metric, value]
                writer.writerow(row)
    return table.getvalue()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _git_commit(root: Path) -> str | None:
    """Return the checkout's commit, with "+changes" where files differ from it."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
