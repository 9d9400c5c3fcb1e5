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
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora_app.config import SAFE_NAME, Config
from fedlora_app.storage import make_private_dir, write_atomically, write_json
from fedlora_app.tracking import Trackers

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


class RunDirectoryError(ValueError):
    """A run directory exists already or cannot be written."""


def check_run_name(name: str) -> str:
    """Return a name that is a plain folder name and not the link's, or raise."""
    if name == LATEST:
        raise RunDirectoryError(f'run-name "{LATEST}" is the name of the link to the newest run.')
    if not re.fullmatch(SAFE_NAME, name):
        raise RunDirectoryError(
            f"run-name {name!r} is not a folder name. Expected letters, digits, '.', '_' and "
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
        self.history: list[dict[str, Any]] = []
        self.manifest: dict[str, Any] = {}
        self.trackers = Trackers()

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
            clients: what each client reported when it checked in.
            base_commit: the hub's commit of the base model, where it comes from there.

        Raises:
            RunDirectoryError: the folder exists; nothing in it is touched.
        """
        cls.require_absent(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make_private_dir(path)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be made: {error.strerror}.") from None
        run = cls(path)
        write_json(path / "config.json", config.dump())
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
            "python": platform.python_version(),
            "versions": {name: version(name) for name in RECORDED_PACKAGES},
            "server_hardware": {"machine": platform.machine(), "cpu_count": os.cpu_count()},
            "clients": clients,
            "rounds": [],
        }
        run._write_manifest()
        run._point_latest()
        return run

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
        self.history.append(
            {"round": server_round, "client": client, "phase": phase, "metrics": metrics}
        )

    def complete_round(self, server_round: int, adapters: dict[str, str], **facts: Any) -> None:
        """Write the history and then enter the round in the manifest with its hashes."""
        write_json(self.path / "history.json", self.history)
        write_atomically(self.path / "history.csv", _as_table(self.history))
        self.manifest["rounds"].append(
            {"round": server_round, "completed": _now(), "adapters": adapters, **facts}
        )
        self._write_manifest()

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished."""
        self.manifest |= {"finished": _now(), **facts}
        self._write_manifest()

    def close(self) -> None:
        """Let go of the trackers, also when the run ends with an error."""
        self.trackers.close()

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


def _as_table(history: list[dict[str, Any]]) -> str:
    """Return the tidy table: one row per scalar metric."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["round", "client", "phase", "metric", "value"])
    for entry in history:
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
