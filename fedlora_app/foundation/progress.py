"""Lines that say how far a long stretch of work is, for logs and terminals alike.

A log that is streamed is never a terminal, so these are plain lines, and rare ones: none
within ten seconds of the last, and none once the work is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable

INTERVAL_SECONDS = 10.0


def format_duration(seconds: float) -> str:
    """Return "45 s", "3 min 10 s" or "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


class Pace:
    """The time that is left, as often as a line about it is due.

    Args:
        interval: seconds between two lines, ``INTERVAL_SECONDS`` by default.
        done: what was done already when the clock started.
    """

    def __init__(self, interval: float | None = None, done: int = 0) -> None:
        self._interval = INTERVAL_SECONDS if interval is None else interval
        self._done = done
        self._last = self._started = time.monotonic()

    def time_left(self, done: int, total: int) -> str | None:
        """Return the time left, or None where no line is due."""
        now = time.monotonic()
        if now - self._last < self._interval or not self._done < done < total:
            return None
        self._last = now
        return format_duration((now - self._started) / (done - self._done) * (total - done))


def step_lines(what: str) -> Callable[[int, int, float], None]:
    """Return a callback that prints how far a phase of training is, with its loss."""
    pace = Pace()

    def report(step: int, num_steps: int, loss: float) -> None:
        left = pace.time_left(step, num_steps)
        if left is not None:
            print(f"{what}: step {step}/{num_steps}, loss {loss:.3f}, {left} left", flush=True)

    return report


def prompt_lines(what: str, total: int) -> Callable[[int], None]:
    """Return a callback that prints how many of ``total`` prompts are answered."""
    pace = Pace()

    def report(done: int) -> None:
        left = pace.time_left(done, total)
        if left is not None:
            print(f"{what}: {done}/{total} prompts, {left} left", flush=True)

    return report


def client_lines(what: str, total: int, report: Callable[[str], None]) -> Callable[[int], None]:
    """Return a callback that reports how many of ``total`` clients have answered."""
    pace = Pace()

    def count(done: int) -> None:
        left = pace.time_left(done, total)
        if left is not None:
            report(f"{what}: {done} of {total} clients, about {left} left")

    return count
