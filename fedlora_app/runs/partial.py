"""What can be read of a run that may not have finished, or is damaged in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora_app.config.schema import ConfigError
from fedlora_app.foundation.files import is_locked
from fedlora_app.foundation.project import ProjectNotFoundError, find_project_root
from fedlora_app.foundation.terminal import shell
from fedlora_app.runs.history import read_history, until_round
from fedlora_app.runs.manifest import (
    Manifest,
    check_manifest,
    complete_rounds,
    describe_missing_finals,
    find_final_round,
)
from fedlora_app.runs.paths import RunDirectoryError, RunPaths
from fedlora_app.runs.reading import describe_damage, find_kind, read_config, read_object


@dataclass(frozen=True)
class PartialRun:
    """What can be read of a run; ``problems`` says what is wrong with the rest."""

    path: Path
    name: str
    config: dict[str, Any]
    manifest: Manifest
    history: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    problems: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path | None:
        """The project that the run lies in."""
        try:
            return find_project_root(str(RunPaths(self.path).config))
        except ProjectNotFoundError:
            return None

    @property
    def reference(self) -> str:
        """What the project's commands call the run, quoted: its name below results, or its path."""
        results = self.root / "results" if self.root else None
        if results is not None and self.path.is_relative_to(results):
            return shell(self.path.relative_to(results).as_posix())
        return shell(self.path)

    @property
    def mode(self) -> str:
        """The run's mode, "unknown" where neither file has it."""
        federated = self.config.get("federated") or {}
        return str(federated.get("mode") or self.manifest.get("mode") or "unknown")

    @property
    def kind(self) -> str:
        """The mode, or that each client has an average of its own (``reading.OWN_AVERAGES``)."""
        return find_kind(self.mode, (self.config.get("federated") or {}).get("aggregation"))

    @property
    def num_rounds(self) -> int:
        """Rounds that the run was to have."""
        return int((self.config.get("federated") or {}).get("num_rounds") or 0)

    @property
    def last_round(self) -> int | None:
        """The newest complete round."""
        return max(complete_rounds(self.manifest), default=None)

    @property
    def final_round(self) -> int | None:
        """The round whose adapters are the result, of a stopped run the newest one."""
        return find_final_round(self.manifest)

    @property
    def result_history(self) -> list[dict[str, Any]]:
        """The history up to the final round, whose figures are the last ones in it."""
        final = self.manifest.get("final")
        return until_round(self.history, final["round"]) if final else self.history

    @property
    def state(self) -> str:
        """Whether the run is "finished", "running" at this moment, or "stopped"."""
        if self.manifest.get("finished") is not None:
            return "finished"
        return "running" if is_locked(self.path) else "stopped"

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The clients as configured."""
        return list((self.config.get("federated") or {}).get("clients") or [])


def read_what_is_left(path: Path, name: str = "") -> PartialRun:
    """Read what there is of a run.

    Args:
        name: what to call it, by default as its folder.

    Raises:
        RunDirectoryError: there is nothing of a run at all.
    """
    paths = RunPaths(path)
    files = (paths.config, paths.manifest, paths.history, paths.events)
    if not any(file.exists() for file in files):
        names = ", ".join(file.name for file in files)
        raise RunDirectoryError(f"{path} is not a run directory: it holds none of {names}.")
    problems: list[str] = []

    def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except ConfigError as error:
            what = f"{paths.config} is damaged: {str(error).replace(f'{path}/', '')}"
        except RunDirectoryError as error:
            what = str(error)
        problems.append(what.removeprefix(f"{path}/"))
        return otherwise

    config = attempt(lambda: read_config(paths.config).dump(), {})
    read = attempt(lambda: read_object(paths.manifest), None)
    manifest, faults = check_manifest(read or {})
    if read is not None and faults:
        problems.append(describe_damage(paths.manifest, faults).removeprefix(f"{path}/"))
    history = attempt(lambda: read_history(path), [])
    evaluation = None
    if paths.evaluation.exists():
        evaluation = attempt(lambda: read_object(paths.evaluation), None)
    run = PartialRun(path, name or path.name, config, manifest, history, evaluation, problems)
    if evaluation is not None and evaluation.get("round") != run.final_round:
        which = "final one" if run.manifest.get("final") else "last complete one"
        problems.append(
            f"{paths.evaluation.name} is of round {evaluation.get('round')} and not of the "
            f"{which}, {run.final_round}; it is left out."
        )
        run = replace(run, evaluation=None)
    problems += _find_what_is_missing(run)
    return run


def _find_what_is_missing(run: PartialRun) -> Iterator[str]:
    if run.manifest.get("finished") is None:
        done = "none" if run.last_round is None else f"round {run.last_round} the last"
        yield (
            f"The run has not finished: of {run.num_rounds} rounds {done} complete. It "
            f"{'is running at this moment' if run.state == 'running' else 'was stopped'}."
        )
    for entry in run.manifest["rounds"]:
        for client, why in entry.get("failures", {}).items():
            yield f"Round {entry['round']} continued without {client}: {why}"
    if run.manifest.get("finished"):
        yield from describe_missing_finals(run.manifest, run.config)
    for entry in run.history:
        if any(k.endswith("/memory_retries") and v for k, v in entry["metrics"].items()):
            yield (
                f"Round {entry['round']}: {entry['client']} ran out of memory and continued with "
                "smaller batches and gradient checkpointing."
            )
        if entry["metrics"].get("evaluation_memory_retries"):
            yield (
                f"Round {entry['round']}: {entry['client']} ran out of memory in evaluation and "
                "continued with smaller batches, which changes no answer."
            )
    if run.evaluation is None:
        yield (
            "Not evaluated yet, so these are the run's own figures after its last evaluated round. "
            f"The whole picture needs: fedlora evaluate {run.reference}"
        )
