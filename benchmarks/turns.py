"""Timings taken in turn, A B A B ..., in one process, and the ratios of neighbours.

A busy machine slows both members of a pair alike, so the median of the pairs' ratios can be
relied on where the seconds themselves cannot.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], float]
"""Does something once and returns the seconds that count."""


def timed(work: Callable[[], object]) -> Work:
    """Return ``work`` with all of its time counted."""

    def run() -> float:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


def take_turns(works: dict[str, Work], num_turns: int) -> dict[str, list[float]]:
    """Return the seconds of every turn, after one that warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(num_turns + 1):
        for name, work in works.items():
            taken = work()
            if turn > 0:
                seconds[name].append(taken)
        print(f"turn {turn} of {num_turns}" if turn else "warmed up", flush=True)
    return seconds


def compute_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Return the median, least and greatest of the pairs' ratios, and their number."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "value": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "n": len(ratios),
    }


def describe_ratio(ratio: dict[str, Any]) -> str:
    """Return a ratio with its range."""
    return f"{ratio['value']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]"


def least(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the least processor time and the least time by the clock, each in seconds."""
    found = []
    for _ in range(repeats):
        gc.collect()
        cpu, clock = time.process_time(), time.monotonic()
        function()
        found.append((time.process_time() - cpu, time.monotonic() - clock))
    return min(cpu for cpu, _ in found), min(clock for _, clock in found)
