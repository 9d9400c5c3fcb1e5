"""The most memory that a stretch of work took, so that it can be told what fits on a card."""

from __future__ import annotations

import resource
import sys

import torch

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; getrusage(2)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new stretch; on a CPU there is nothing that could be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peak_memory(device: torch.device) -> int:
    """Return the peak in bytes.

    On a GPU what torch had allocated there since the last reset, the base model included. On a
    CPU the high-water mark of the whole process since its start, whichever client and phase
    it came from.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
