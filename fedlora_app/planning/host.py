"""This machine without a GPU: its memory, and how fast its CPU multiplies matrices."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import torch

from fedlora_app.foundation.cores import count_cores
from fedlora_app.planning.gpus import Card
from fedlora_app.training.activations import Numerics, Shape
from fedlora_app.training.phase_memory import Item

CPU_EFFICIENCY = 0.5
"""Assumed: the share of the speed of plain matrix products that training reaches on a CPU."""
PROCESS = Item("Python and its libraries", 1_300_000_000, "client and server, assumed")
PROBE_SECONDS = 0.3
PROBE_ROWS, MAX_PROBE_WIDTH = 256, 4096
LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")
"""A container's memory, as cgroup v2 has it: bytes, or "max"."""


def read_host_memory() -> int:
    """Return the bytes that this machine has, or this container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(LIMIT_FILE.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or no limit
        return total


def probe_cpu(shape: Shape, numerics: Numerics, clients_at_once: int = 1) -> Card:
    """Return this CPU as a card, by products of matrices of the model's own widths.

    With the threads that a client will have.
    """
    threads = max(1, count_cores() // clients_at_once)
    dtype = torch.float32 if numerics.dtype_bytes == 4 else torch.bfloat16
    hidden, inner = (min(n, MAX_PROBE_WIDTH) for n in (shape.hidden, shape.intermediate))
    rows, weight = torch.randn(PROBE_ROWS, hidden).to(dtype), torch.randn(hidden, inner).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ends = [time.perf_counter()]
        while len(ends) < 3 or ends[-1] - ends[0] < PROBE_SECONDS:
            rows @ weight
            ends.append(time.perf_counter())
    finally:
        torch.set_num_threads(before)
    # The fastest, because what else the machine does only ever slows one down.
    taken = min(end - start for start, end in pairwise(ends))
    flops = 2 * PROBE_ROWS * hidden * inner / taken
    name = f"CPU, {threads} thread" + "s" * (threads > 1)
    # Products of these widths read their weights, so that their speed holds what reading takes.
    return Card(name, read_host_memory(), flops / 1e12, float("inf"), CPU_EFFICIENCY)
