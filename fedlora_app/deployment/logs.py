"""The logs of what `start` has started: a heading above each process's lines, and not too long."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

LARGE_LOG_BYTES, NUM_OLD_LOGS = 10 * 2**20, 3
TAIL_BYTES = 65_536
STARTED = "--- Started at (UTC)"
READY = "Ready for messages"
"""What an executor says once it has loaded all but the base model."""


def head(log: Path) -> None:
    """Write the heading of the lines of a process that is about to start."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{STARTED} {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}\n")


def rotate(log: Path, *, is_open: bool) -> None:
    """Move a large log aside and begin a new one; the oldest of several goes.

    Args:
        is_open: a process appends to it, which would go on writing to a file that is moved.
    """
    if not log.exists() or log.stat().st_size < LARGE_LOG_BYTES:
        return
    copy = log.with_name(f"{log.name}.partial")
    if is_open:  # before anything moves: a full disk takes no copy
        try:
            copy.write_bytes(log.read_bytes())
        except OSError:
            copy.unlink(missing_ok=True)
            raise
    old = [log.with_name(f"{log.name}.{n}") for n in range(1, NUM_OLD_LOGS + 1)]
    for newer, older in reversed(list(pairwise(old))):
        if newer.exists():
            newer.replace(older)
    if is_open:
        copy.replace(old[0])
        os.truncate(log, 0)
    else:
        log.replace(old[0])


def read_tail(log: Path, num_lines: int = 1) -> str:
    """Return the last lines of a log that say something."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line.rstrip() for line in lines if line.strip()][-num_lines:])


def read_since_start(log: Path) -> str:
    """Return the last lines, of the process that was started last."""
    return read_tail(log, TAIL_BYTES).rpartition(STARTED)[2]
