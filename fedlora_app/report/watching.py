"""A report that is kept current while its run goes, whoever started it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedlora_app.report.page import write_report
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.paths import RunPaths

POLL_SECONDS = 2.0
RELOAD_SECONDS = 5
LOOKS_BEFORE_STOPPED = 3
"""A run that begins or is resumed exists for a moment before it holds its lock."""

Marks = dict[Path, tuple[int, int]]
"""Time and size of each file that a page is made from."""


def watch_report(
    run_dir: Path,
    output: Path | None,
    tell: Callable[[str], None],
    poll_seconds: float = POLL_SECONDS,
) -> Path:
    """Write a run's report whenever the run has changed, until it ends, and return the page's path.

    Until then browsers reload the page by themselves. It is written once more at the end, also
    after Ctrl-C, so that they no longer do.

    Args:
        tell: called with a line for each page that is written.

    Raises:
        RunDirectoryError: there is nothing of a run in the folder.
    """
    run_dir = run_dir.resolve()
    try:
        tell(_follow(run_dir, output, tell, poll_seconds))
    except KeyboardInterrupt:
        tell("No longer watched.")
    return write_report(run_dir, output)


def _follow(
    run_dir: Path, output: Path | None, tell: Callable[[str], None], poll_seconds: float
) -> str:
    """Keep the page current, and return how the run ended."""
    seen: Marks | None = None
    num_stopped = 0
    while True:
        # In this order: what comes after a look is found by the next one.
        marks, run = _look(run_dir), read_what_is_left(run_dir)
        if run.state == "finished":
            return "The run has finished."
        num_stopped = num_stopped + 1 if run.state == "stopped" else 0
        if num_stopped == LOOKS_BEFORE_STOPPED:
            return "The run has stopped before its end; nothing is writing in its folder."
        if marks != seen:
            # A run that is resumed in this moment clears away what is half written.
            with suppress(FileNotFoundError):
                page = write_report(run_dir, output, reload_seconds=RELOAD_SECONDS)
                if seen is None:
                    tell(f"Watched, and reloaded by the browser itself: {page}")
                done = "no round" if run.last_round is None else f"round {run.last_round}"
                tell(f"{done} of {run.num_rounds} complete")
                seen = marks
        time.sleep(poll_seconds)


def _look(run_dir: Path) -> Marks:
    """Return the state of the files that a page is made from.

    Events count before the first round is complete; then they come too often, and no page has them.
    """
    paths = RunPaths(run_dir)
    figures = paths.history if paths.history.exists() else paths.events
    marks = {}
    for path in (paths.config, paths.manifest, figures, paths.evaluation):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        marks[path] = (found.st_mtime_ns, found.st_size)
    return marks
