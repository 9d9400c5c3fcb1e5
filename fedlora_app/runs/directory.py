"""The run directory: what training writes and everything else reads.

A round is complete once it stands in ``manifest.json``, which is written last; whatever a
stopped run leaves beyond that is to be ignored.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from fedlora_app.config.schema import LOCAL, SAFE_NAME, Config
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import (
    LOCK_FILE,
    extend_atomically,
    extend_json_list,
    lock_folder,
    new_folder,
    remove_partials,
    write_atomically,
    write_json,
)
from fedlora_app.foundation.project import hash_package
from fedlora_app.runs.tracking import Trackers

LATEST = "latest"
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


WRITTEN_BY_SERVER = (
    *("config.json", "manifest.json", "metrics.jsonl", "history.json", "history.csv"),
    *("server", "final", "final/global"),
)
TABLE_HEADING = "round,client,phase,metric,value\n"


class RunDirectoryError(UserError):
    """A run directory exists already or cannot be written."""


def require_within(path: Path, run_dir: Path) -> None:
    """Raise ``RunDirectoryError`` where links lead from a path in a run directory out of it."""
    try:
        is_within = path.resolve().is_relative_to(run_dir.resolve())
    except RuntimeError:  # links that lead to themselves
        is_within = False
    if not is_within:
        raise RunDirectoryError(
            f"{path} is a link that leads out of the run directory. Put a copy there."
        )


def check_run_name(name: str) -> str:
    """Return a name that is a plain folder name and not the link's, or raise."""
    if name == LATEST:
        raise RunDirectoryError(f'run-name "{LATEST}" is the name of the link to the newest run.')
    if not re.fullmatch(SAFE_NAME, name):
        raise RunDirectoryError(
            f"run-name {name!r:.100} is not a folder name. Expected letters, digits, '.', '_' and "
            "'-', beginning with a letter or digit, at most 64."
        )
    return name


def default_run_name(config: Config) -> str:
    """Return a name made from the experiment, its mode, its seed and the time."""
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    tail = f"-{config.federated.mode}-seed{config.experiment.seed}-{time}"
    return config.experiment.name[: 64 - len(tail)] + tail


class RunDirectory:
    """One run's folder, written by the server. Clients write below ``clients/<id>``."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
    ) -> RunDirectory:
        """Make the folder with ``config.json`` and ``manifest.json``, and point latest to it.

        Args:
            clients: what each client reported when it registered.
            base_commit: the hub's commit of the base model, where it comes from there.

        Raises:
            RunDirectoryError: the folder exists; nothing in it is touched.
        """
        cls.require_absent(path)
        run = cls(path)
        run.manifest = {
            "format": 1,
            "started": _now(),
            "finished": None,
            "seed": config.experiment.seed,
            "mode": config.federated.mode,
            "base_model": {
                "name": config.model.name,
                "revision": config.model.revision,
                "commit": base_commit,
            },
            "git_commit": _git_commit(root),
            "package_sha256": hash_package(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in RECORDED_PACKAGES},
            "server_hardware": {"machine": platform.machine(), "cpu_count": os.cpu_count()},
            "clients": clients,
            "rounds": [],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(path) as partial:  # a run directory always has both files
                partial.chmod(0o700)
                write_json(partial / "config.json", config.dump())
                write_json(partial / "manifest.json", run.manifest)
            run._take_lock()
        except OSError as error:
            if isinstance(error, FileExistsError):
                cls.require_absent(path)  # another run was quicker
            raise RunDirectoryError(f"{path} cannot be made: {error.strerror}.") from None
        run._point_latest()
        return run

    @classmethod
    def reopen(cls, path: Path, manifest: dict[str, Any]) -> RunDirectory:
        """Return a stopped run's folder, locked; ``rewind`` makes it ready to be continued.

        Args:
            manifest: what ``manifest.json`` holds.

        Raises:
            RunDirectoryError: another process is writing in it, or a part of it lies elsewhere.
        """
        links = (folder for folder in (path / "server").glob("*") if folder.is_symlink())
        for own in (*(path / name for name in WRITTEN_BY_SERVER), path / LOCK_FILE, *links):
            require_within(own, path)
        run = cls(path)
        run.manifest = dict(manifest)
        run._take_lock()
        return run

    def rewind(self, config: Config, after_round: int) -> None:
        """Forget what came after a complete round; its files are rewritten.

        The manifest comes first: where this stops, the rest holds more rounds than count, and
        never fewer.

        Args:
            after_round: below 0 for none.
        """
        entries = read_complete_history(self.path, rounds_until(self.manifest, after_round))
        for folder in (self.path, self.path / "server", self.path / "final"):
            remove_partials(folder)
        rounds = [entry for entry in self.manifest["rounds"] if entry["round"] <= after_round]
        stop = {"time": _now(), "after_round": after_round}
        resumed = [*self.manifest.get("resumed", []), stop]
        self.manifest |= {"finished": None, "rounds": rounds, "resumed": resumed}
        self._write_manifest()
        write_json(self.path / "config.json", config.dump())
        shutil.rmtree(self.final_global, ignore_errors=True)  # it would be of an earlier round
        write_json(self.path / "history.json", entries)
        write_atomically(self.path / "history.csv", TABLE_HEADING + _as_rows(entries))
        self._rewind_events(after_round)
        self._point_latest()

    def thin(self, keep_rounds: int) -> None:
        """Delete the adapters of all but the newest complete rounds."""
        for server_round in self._complete_rounds[:-keep_rounds]:
            shutil.rmtree(self.server_round(server_round), ignore_errors=True)

    def oldest_local_round(self, client: str, keep_rounds: int) -> int:
        """Return the oldest round whose local adapter a client needs for the rounds to keep.

        In the oldest of these it may have had no part, and have gone on with an earlier one.
        """
        kept = self._complete_rounds[-keep_rounds:]
        return find_local_round(self.manifest, client, kept[0]) if kept else 0

    @staticmethod
    def require_absent(path: Path) -> None:
        """Raise if something is at ``path`` already."""
        if path.exists() or path.is_symlink():
            raise RunDirectoryError(
                f"{path} exists already and is left as it is. Choose another run-name."
            )

    def server_round(self, server_round: int) -> Path:
        """Folder of the global adapter after a round."""
        return self.path / "server" / f"round_{server_round:03d}"

    @property
    def final_global(self) -> Path:
        """Folder of the global adapter to use."""
        return self.path / "final" / "global"

    def log_event(self, event: str, **fields: Any) -> None:
        """Append one object to ``metrics.jsonl`` and show it to the trackers."""
        entry = {"time": _now(), "event": event, **fields}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
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
        """Keep that a client had no part in a round, and log why."""
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

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished."""
        self.manifest |= {"finished": _now(), **facts}
        self._write_manifest()

    def close(self) -> None:
        """Let go of the trackers and the lock, also when the run ends with an error."""
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

    @property
    def _complete_rounds(self) -> list[int]:
        return sorted(entry["round"] for entry in self.manifest["rounds"])

    def _extend_history(self) -> None:
        """Add what is new to both files; what they hold already is not read."""
        entries, self._new_history = self._new_history, []
        table = self.path / "history.csv"
        rows = _as_rows(entries)
        extend_json_list(self.path / "history.json", entries)
        extend_atomically(table, rows if table.exists() else TABLE_HEADING + rows)

    def _rewind_events(self, after_round: int) -> None:
        """Drop the events of later rounds, and a last line that a stop has cut."""
        path, kept = self.path / "metrics.jsonl", []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            try:
                if json.loads(line).get("round", after_round) <= after_round:
                    kept.append(line.decode() + "\n")
            except (ValueError, AttributeError, TypeError):
                continue
        write_atomically(path, "".join(kept))

    def _write_manifest(self) -> None:
        write_json(self.path / "manifest.json", self.manifest)

    def _point_latest(self) -> None:
        link = self.path.parent / LATEST
        partial = link.with_name(f".{LATEST}.{os.getpid()}")
        partial.unlink(missing_ok=True)
        try:
            partial.symlink_to(self.path.name)
            partial.replace(link)
        except OSError as error:
            partial.unlink(missing_ok=True)
            print(f"Note: {link} was not updated: {error.strerror}.", flush=True)


def find_local_round(manifest: dict[str, Any], client: str, server_round: int) -> int:
    """Return the round of the local adapter that a client had after a round.

    It is an earlier one where the client had no part in the round.
    """
    name = f"{LOCAL}:{client}"
    rounds = [e["round"] for e in manifest["rounds"] if name in e["adapters"]]
    return max((number for number in rounds if number <= server_round), default=server_round)


def describe_missing_finals(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each client without a local adapter of the last round."""
    rounds = sorted(manifest["rounds"], key=lambda entry: entry["round"])
    for client in manifest["clients"]:
        name = f"{LOCAL}:{client}"
        having = [entry["round"] for entry in rounds if name in entry.get("adapters", {})]
        if having and having[-1] < rounds[-1]["round"]:
            yield (
                f"{client} did not report in the last round; what may be in final/clients/{client} "
                f"is not to be used. fedlora ask, evaluate and export take its local adapter of "
                f"round {having[-1]}, clients/{client}/round_{having[-1]:03d}."
            )


def rounds_until(manifest: dict[str, Any], after_round: int) -> set[int]:
    """Return the complete rounds up to one."""
    return {entry["round"] for entry in manifest["rounds"] if entry["round"] <= after_round}


def read_complete_history(path: Path, rounds: set[int]) -> list[dict[str, Any]]:
    """Return the entries of ``history.json`` that are of these rounds.

    Raises:
        RunDirectoryError: it is damaged, or a round is not in it.
    """
    history = path / "history.json"
    try:
        entries = json.loads(history.read_text(encoding="utf-8")) if rounds else []
        kept = [entry for entry in entries if entry["round"] in rounds]
        fields = {
            key for entry in kept for key in ("client", "phase", "metrics") if key not in entry
        }
        missing = rounds - {entry["round"] for entry in kept}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunDirectoryError(
            f"{history} cannot be read ({type(error).__name__}), and the run is to resume with it. "
            "Restore it, or start a new run."
        ) from None
    if fields or missing:
        what = f"round {min(missing)}" if missing else min(fields)
        raise RunDirectoryError(f"{history} lacks {what}. Restore it, or start a new run.")
    return kept


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
