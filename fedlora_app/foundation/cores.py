"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of the cores, as cgroup v2 has it: microseconds per period, or "max"."""
ENVIRONMENT_FILE = Path("/proc/self/environ")
"""What this process was started with: Ray sets OMP_NUM_THREADS in its workers afterwards."""


def count_cores() -> int:
    """Return the number of cores for this process, at least 1.

    That is the least of its affinity, its container's quota and the user's OMP_NUM_THREADS.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [affinity, _read_quota(), _read_omp_threads()]
    return max(1, min(limit for limit in limits if limit is not None))


def _read_quota() -> int | None:
    try:
        quota, period = QUOTA_FILE.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # none, or "max"
        return None


def _read_omp_threads() -> int | None:
    try:
        entries = ENVIRONMENT_FILE.read_bytes().split(b"\0")
        given = dict(entry.partition(b"=")[::2] for entry in entries)[b"OMP_NUM_THREADS"]
        threads = int(given.split(b",")[0])  # the outermost level of nested ones
    except (OSError, KeyError, ValueError):
        return None
    return threads if threads > 0 else None
