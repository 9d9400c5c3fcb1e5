"""What this process holds in the machine's memory, and the most that it has held."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; getrusage(2)


def read_resident() -> int:
    """Return the bytes that are in memory now, or the peak where only that is known."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return read_peak()
    return pages * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Let the peak begin anew, where the system knows how to (proc(5), ``clear_refs``).

    What has been freed goes back to the system first, as far as it can.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak() -> int:
    """Return the most bytes that were in memory since the peak began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
