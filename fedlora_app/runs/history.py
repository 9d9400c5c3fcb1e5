"""A run's history as a tidy table, for plots and notebooks. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.runs.directory import RunDirectoryError

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
    """Return each run's name, with as much of its path as tells it from the others."""
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
    history, events = run_dir / "history.json", run_dir / "metrics.jsonl"
    try:
        if history.exists():
            return _check(json.loads(history.read_text(encoding="utf-8")))
        if events.exists():
            return list(_from_events(events.read_bytes().splitlines()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise RunDirectoryError(f"The history in {run_dir} is damaged ({why}).") from None
    raise RunDirectoryError(f"{run_dir} has neither history.json nor metrics.jsonl.")


def _from_events(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """Yield the metrics among the events; a last line that a stop has cut is dropped."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
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
