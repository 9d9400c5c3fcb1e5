"""What is left of a run directory, whatever state it is in.

A report of a damaged or half-finished run says what is missing; so each file is read by itself,
and what is wrong with it is kept as a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora_app.report.history import read_history
from fedlora_app.run_directory import RunDirectoryError
from fedlora_app.saved_run import EVALUATION_FILE


@dataclass(frozen=True)
class Pieces:
    """A run's files as far as they can be read; ``problems`` says what is the matter."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    history: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

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


def read_pieces(path: Path) -> Pieces:
    """Read what there is of a run.

    Raises:
        RunDirectoryError: there is nothing of a run at all.
    """
    names = ("config.json", "manifest.json", "history.json", "metrics.jsonl")
    if not any((path / name).exists() for name in names):
        raise RunDirectoryError(f"{path} is no run directory: it holds none of {', '.join(names)}.")
    problems: list[str] = []
    config = _read_object(path / "config.json", problems)
    manifest = _read_object(path / "manifest.json", problems)
    if not isinstance(manifest.get("rounds", []), list):
        problems.append("manifest.json is damaged: its rounds are no list.")
        manifest["rounds"] = []
    try:
        history = read_history(path)
    except RunDirectoryError as error:
        problems.append(str(error))
        history = []
    evaluation = None
    if (path / EVALUATION_FILE).exists():
        evaluation = _read_object(path / EVALUATION_FILE, problems) or None
    pieces = Pieces(path, config, manifest, history, evaluation, problems)
    problems += _find_what_is_missing(pieces)
    return pieces


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name} is damaged: it holds no object.")
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
    for entry in pieces.history:
        if any(k.endswith("/memory_retries") and v for k, v in entry["metrics"].items()):
            yield (
                f"Round {entry['round']}: {entry['client']} ran out of memory and went on with "
                "smaller batches and gradient checkpointing."
            )
    if pieces.evaluation is None:
        yield (
            "Not evaluated yet, so these are the run's own figures after its last evaluated round. "
            f"The whole picture needs: fedlora evaluate {pieces.name}"
        )
    elif pieces.evaluation.get("round") != pieces.last_round:
        yield (
            f"evaluation.json is of round {pieces.evaluation.get('round')}, and the last complete "
            f"round is {pieces.last_round}. Evaluate anew: fedlora evaluate {pieces.name}"
        )
