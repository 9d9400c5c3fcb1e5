"""The device's memory: how much is free, whether it ran out, and the peak of a stretch of work."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fedlora_app.foundation.cores import count_cores
from fedlora_app.foundation.process_memory import read_peak


def compute_reproducibly(clients_at_once: int) -> None:
    """Have this process use the whole machine, or its part of it, and give the same bits twice."""
    torch.set_num_threads(max(1, count_cores() // clients_at_once))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # time for what is overwritten
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers


def read_free_memory(device: torch.device) -> int:
    """Return the bytes that torch could still allocate on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # free fragments count only when joined
        free, total = torch.cuda.mem_get_info(device)
        cap = torch.cuda.get_per_process_memory_fraction(device) * total
        reserved = torch.cuda.memory_reserved(device)
        unused = reserved - torch.cuda.memory_allocated(device)
        return min(free, int(cap) - reserved) + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or its cause, means that a GPU's memory was too small."""
    if isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    ):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def has_spoilt_process(error: BaseException) -> bool:
    """Return whether every later use of the GPU by this process would fail as well.

    So it is after an illegal access, a failed assertion in a kernel or a memory fault of the
    card: CUDA's context is lost with them, and only a new process gets another one.
    """
    if is_out_of_memory(error):
        return False
    seen = isinstance(error, torch.AcceleratorError) or "CUDA error: " in str(error)
    linked = error.__cause__ or error.__context__
    return seen or (linked is not None and has_spoilt_process(linked))


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
    return read_peak()
