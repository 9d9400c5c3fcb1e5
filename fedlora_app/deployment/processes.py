"""What `start` has started: known by process id and start, so that no other process is ever ended.

A process id is used again once its process has ended. So each is kept with the moment at which its
process began, as the kernel counts it, and counts only while both are those of one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import write_json

STOP_SECONDS = 20.0
"""After which a process that was asked to end is ended."""
POLL_SECONDS = 0.1


class ProcessesError(UserError):
    """Processes of a folder cannot be started; the message says what to do."""


@dataclass(frozen=True)
class KnownProcess:
    """A process that was started, the first of a session of its own."""

    name: str
    pid: int
    began: str
    """What tells it from an earlier or later process of the same id."""
    since: str
    """When it was started, in UTC."""
    num_restarts: int = 0

    @property
    def is_alive(self) -> bool:
        """Whether it is this process that has the id, and it has not ended."""
        return find_beginning(self.pid) == self.began


@dataclass(frozen=True)
class Started:
    """All that belongs to a folder."""

    state: str
    """starting, running, or failed."""
    why: str
    processes: tuple[KnownProcess, ...]
    """The supervisor first, then in the order in which they were started."""

    @property
    def alive(self) -> list[KnownProcess]:
        """Those that have not ended."""
        return [process for process in self.processes if process.is_alive]


def find_beginning(pid: int) -> str | None:
    """Return when the process of this id began, as its system says it; None if there is none."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = content[content.rindex(")") + 2 :].split()  # the name before may hold anything
        has_ended = fields[0] in "ZX"  # and was not yet waited for
        return None if has_ended else f"{_read_boot()}:{fields[19]}"
    except (OSError, ValueError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    said = subprocess.run(  # macOS has no /proc
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return said[1].strip() if len(said) == 2 and "Z" not in said[0] else None


def know(name: str, pid: int, num_restarts: int = 0) -> KnownProcess:
    """Return what to keep of a process that has just been started."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return KnownProcess(name, pid, find_beginning(pid) or "ended", since, num_restarts)


def write_started(path: Path, started: Started) -> None:
    """Keep what was started."""
    write_json(path, asdict(started))


def read_started(path: Path) -> Started | None:
    """Return what was started; None if nothing was, or it cannot be read."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        processes = tuple(KnownProcess(**entry) for entry in raw.pop("processes"))
        return Started(**raw, processes=processes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProcessesError(
            f"{path} is damaged ({error}), so what runs here is not known. Look for processes of "
            "this folder with ps, end them, and remove the file."
        ) from None


def end(processes: Iterable[KnownProcess], seconds: float = STOP_SECONDS) -> list[str]:
    """End processes one after another with their sessions; return the names of those that ran.

    Args:
        seconds: that each has for ending by itself.
    """
    ended = []
    for process in processes:
        if not process.is_alive:
            continue
        ended.append(process.name)
        signal_session(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while process.is_alive and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if process.is_alive:
            signal_session(process.pid, signal.SIGKILL)
        while process.is_alive:
            time.sleep(POLL_SECONDS)
    return ended


def signal_session(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and, if it leads a group, to all of that."""
    with suppress(ProcessLookupError, PermissionError):
        is_led_by_another = find_beginning(pid) is not None and os.getpgid(pid) != pid
        (os.kill if is_led_by_another else os.killpg)(pid, number)


def _read_boot() -> str:
    """Return what tells this start of the machine from others, which count from 0 again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
