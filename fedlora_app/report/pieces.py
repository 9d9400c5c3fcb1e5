"""What is left of a run directory, whatever state it is in.

A report of a damaged or half-finished run says what is missing; so each file is read by itself,
and what is wrong with it is kept as a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import ConfigError
from fedlora_app.foundation.project import ProjectNotFoundError, find_project_root
from fedlora_app.runs.directory import RunDirectoryError, describe_missing_finals
from fedlora_app.runs.history import read_history
from fedlora_app.runs.reading import EVALUATION_FILE


@dataclass(frozen=True)
class Pieces:
    """A run's files as far as they can be read; ``problems`` says what is the matter."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    history: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    problems: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def root(self) -> Path | None:
        """The project that the run lies in."""
        try:
            return find_project_root(str(self.path / "config.json"))
        except ProjectNotFoundError:
            return None

    @property
    def reference(self) -> str:
        """What the project's commands call the run: its name below results, or its path."""
        results = self.root / "results" if self.root else None
        if results is not None and self.path.is_relative_to(results):
            return self.path.relative_to(results).as_posix()
        return str(self.path)

    @property
    def mode(self) -> str:
        """The run's mode, "unknown" where neither file tells."""
        federated = self.config.get("federated") or {}
        return str(federated.get("mode") or self.manifest.get("mode") or "unknown")

    @property
    def num_rounds(self) -> int:
        """Rounds that the run was to have."""
        return int((self.config.get("federated") or {}).get("num_rounds") or 0)

    @property
    def last_round(self) -> int | None:
        """The newest complete round."""
        return max((entry["round"] for entry in self.manifest.get("rounds", [])), default=None)

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The clients as configured."""
        return list((self.config.get("federated") or {}).get("clients") or [])


def read_pieces(path: Path, name: str = "") -> Pieces:
    """Read what there is of a run.

    Args:
        name: what to call it, by default as its folder.

    Raises:
        RunDirectoryError: there is nothing of a run at all.
    """
    names = ("config.json", "manifest.json", "history.json", "metrics.jsonl")
    if not any((path / name).exists() for name in names):
        raise RunDirectoryError(
            f"{path} is not a run directory: it holds none of {', '.join(names)}."
        )
    problems: list[str] = []
    config = _read_config(path / "config.json", problems)
    manifest = _check_manifest(_read_object(path / "manifest.json", problems), problems)
    try:
        history = read_history(path)
    except RunDirectoryError as error:
        problems.append(str(error))
        history = []
    evaluation = None
    if (path / EVALUATION_FILE).exists():
        evaluation = _read_object(path / EVALUATION_FILE, problems) or None
    pieces = Pieces(path, config, manifest, history, evaluation, problems, name or path.name)
    if evaluation is not None and evaluation.get("round") != pieces.last_round:
        problems.append(
            f"evaluation.json is of round {evaluation.get('round')} and not of the last complete "
            f"one, {pieces.last_round}; it is left out."
        )
        pieces = replace(pieces, evaluation=None)
    problems += _find_what_is_missing(pieces)
    return pieces


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    num_problems = len(problems)
    raw = _read_object(path, problems)
    if len(problems) > num_problems:
        return {}
    try:
        return parse_config(raw, source=path.name).dump()
    except ConfigError as error:
        problems.append(f"config.json is damaged: {error}")
        return {}


def _check_manifest(manifest: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the manifest with only such parts as are what they should be."""
    rounds = manifest.get("rounds", [])
    whole = [e for e in rounds if _is_round(e)] if isinstance(rounds, list) else []
    clients = manifest.get("clients", {})
    known = {c: r for c, r in clients.items() if isinstance(r, dict)} if _is_dict(clients) else {}
    if whole != rounds or known != clients:
        problems.append("manifest.json is damaged: some of its rounds or clients are malformed.")
    return manifest | {"rounds": whole, "clients": known}


def _is_round(entry: Any) -> bool:
    return (
        _is_dict(entry)
        and isinstance(entry.get("round"), int)
        and isinstance(entry.get("seconds", 0), int | float)
        and _is_dict(entry.get("failures", {}))
        and _is_dict(entry.get("adapters", {}))
    )


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name} is damaged: it does not hold an object.")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} is damaged: {error}.")
    return {}


def _find_what_is_missing(pieces: Pieces) -> Iterator[str]:
    if pieces.manifest and pieces.manifest.get("finished") is None:
        done = "none" if pieces.last_round is None else f"round {pieces.last_round} the last"
        yield (
            f"The run has not finished: of {pieces.num_rounds} rounds {done} complete. It is still "
            "going on, or was stopped."
        )
    for entry in pieces.manifest.get("rounds", []):
        for client, why in (entry.get("failures") or {}).items():
            yield f"Round {entry['round']} went on without {client}: {why}"
    if pieces.manifest.get("finished"):
        yield from describe_missing_finals(pieces.manifest)
    for entry in pieces.history:
        if any(k.endswith("/memory_retries") and v for k, v in entry["metrics"].items()):
            yield (
                f"Round {entry['round']}: {entry['client']} ran out of memory and went on with "
                "smaller batches and gradient checkpointing."
            )
    if pieces.evaluation is None:
        yield (
            "Not evaluated yet, so these are the run's own figures after its last evaluated round. "
            f"The whole picture needs: fedlora evaluate {pieces.reference}"
        )
