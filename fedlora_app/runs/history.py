"""A run's history as it is read: by resuming, by reports, and as a tidy table for notebooks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.runs.paths import RunDirectoryError, RunPaths

if TYPE_CHECKING:
    import pandas

COLUMNS = ["run", "round", "client", "phase", "metric", "value"]


def load_history(*runs: Path | Any) -> pandas.DataFrame:
    """Return every number that runs recorded, a row each.

    Args:
        runs: run directories, or what ``load_run`` returns.

    Returns:
        The columns run, round, client, phase, metric and value; losses in nats per answer
        token, times in seconds, sizes in bytes, accuracies in [0, 1].

    Raises:
        RunDirectoryError: a run has no history yet, or a damaged one.
    """
    import pandas

    names = name_runs(Path(getattr(run, "path", run)) for run in runs)
    rows = [
        (name, entry["round"], entry["client"], entry["phase"], metric, float(value))
        for path, name in names.items()
        for entry in read_history(path)
        for metric, value in entry["metrics"].items()
        if isinstance(value, int | float)
    ]
    return pandas.DataFrame(rows, columns=COLUMNS)


def name_runs(paths: Iterable[Path]) -> dict[Path, str]:
    """Return each run's name, with as much of its path as distinguishes it from the others."""
    found = list(dict.fromkeys(path.resolve() for path in paths))  # "latest" is a link
    names = {path: path.name for path in found}
    depth = 2
    while len(set(names.values())) < len(found):
        counts = Counter(names.values())
        longer = {path: "/".join(path.parts[-depth:]) for path in found}
        names = {path: longer[path] if counts[name] > 1 else name for path, name in names.items()}
        depth += 1
    return names


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of ``history.json``, or of ``metrics.jsonl`` before a round was complete.

    Raises:
        RunDirectoryError: neither can be read.
    """
    paths = RunPaths(run_dir)
    try:
        if paths.history.exists():
            return _check(json.loads(paths.history.read_text(encoding="utf-8")))
        if paths.events.exists():
            return list(_from_events(paths.events.read_bytes().splitlines()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise RunDirectoryError(f"The history in {run_dir} is damaged ({why}).") from None
    names = f"{paths.history.name} nor {paths.events.name}"
    raise RunDirectoryError(f"{run_dir} has neither {names}.")


def until_round(history: Iterable[dict[str, Any]], server_round: int) -> list[dict[str, Any]]:
    """Return the entries of the rounds up to one."""
    return [entry for entry in history if entry["round"] <= server_round]


def read_rounds(run_dir: Path, rounds: Iterable[int]) -> list[dict[str, Any]]:
    """Return the entries of ``history.json`` that are of these rounds, each of which it must hold.

    Raises:
        RunDirectoryError: it is damaged, or a round is not in it.
    """
    history, rounds = RunPaths(run_dir).history, set(rounds)
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


def _from_events(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """Yield the metrics among the events; a last line that a stop has cut is dropped."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict):
            raise ValueError(f"an event is not as expected: {str(event)[:80]}")
        if event.pop("event", None) == "metrics":
            del event["time"]
            head = {key: event.pop(key) for key in ("round", "client", "phase")}
            yield head | {"metrics": event}


def _check(entries: Any) -> list[dict[str, Any]]:
    for entry in entries:
        if not isinstance(entry["metrics"], dict) or not isinstance(entry["round"], int):
            raise ValueError(f"an entry is not as expected: {str(entry)[:80]}")
        entry["client"], entry["phase"]  # both must be there
    return entries
