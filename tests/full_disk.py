"""A limit on the size of files, which stands for a disk that takes no more."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_larger_files_than(num_bytes: int | None) -> Iterator[None]:
    """Let no file of this process grow beyond some bytes while the block runs.

    Args:
        num_bytes: None to begin without a limit, for ``limit_files`` to set one in the block.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if num_bytes is not None:
            limit_files(num_bytes)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def limit_files(num_bytes: int) -> None:
    """Set the limit; ``no_larger_files_than`` takes it away."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
