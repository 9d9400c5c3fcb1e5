"""What Linux says of a process: memory, open files, threads and children."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MIB = 2**20


def read_status(pid: int | str = "self") -> dict[str, str]:
    """Return the fields of ``/proc/<pid>/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def resident_bytes(pid: int | str = "self") -> int:
    """Return the memory that a process holds now."""
    return _bytes(read_status(pid)["VmRSS"])


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most that it has held since ``process_memory.reset_peak``."""
    return _bytes(read_status(pid)["VmHWM"])


def sample(pid: int, but: frozenset[int] = frozenset()) -> dict[str, int]:
    """Return what a process holds now.

    Args:
        but: children that are not counted.
    """
    status = read_status(pid)
    return {
        "rss_bytes": _bytes(status["VmRSS"]),
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "children": len(_children(pid) - but),
    }


def _children(pid: int) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, KeyError):
            if int(read_status(folder.name)["PPid"]) == pid:
                found.add(int(folder.name))
    return found


def _bytes(kibibytes: str) -> int:
    return int(kibibytes.split()[0]) * 1024
