"""Lines that say how far a long phase of training is, for logs and terminals alike."""

from __future__ import annotations

import time

from fedlora_app.training import Progress

INTERVAL_SECONDS = 10.0


def progress_lines(what: str) -> Progress:
    """Return a callback that prints a line every few seconds of a phase."""
    last = started = time.monotonic()

    def report(step: int, num_steps: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < INTERVAL_SECONDS or step == num_steps:
            return
        last = now
        left = (now - started) / step * (num_steps - step)
        print(f"{what}: step {step}/{num_steps}, loss {loss:.3f}, {left:.0f} s left", flush=True)

    return report
