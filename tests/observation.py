"""Watch a federation in one process: whose code runs, what it prints, which files it opens."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from loopback import client_app

SERVER = "server"
IN_OPEN = 0x20  # <sys/inotify.h>
IN_Q_OVERFLOW = 0x4000
EVENT = struct.Struct("iIII")
WINDOW_BYTES = 16


class FolderWatch:
    """What is opened in folders, by any code of any process: Linux's own account of it.

    Python's audit hooks do not see what compiled code opens, which is how adapters are read.
    """

    def __init__(self, *folders: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders = folders
        self._watched: dict[int, Path] = {}
        self.opened: dict[str, set[Path]] = defaultdict(set)
        self.watch_all()

    def watch_all(self) -> None:
        """Watch every folder that is there by now; what this opens itself does not count."""
        for top in self._folders:
            for folder in (top, *(path for path in top.rglob("*") if path.is_dir())):
                number = self._libc.inotify_add_watch(
                    self._descriptor, os.fsencode(folder), IN_OPEN
                )
                if number >= 0:
                    self._watched[number] = folder
        self._drain()

    def note(self, who: str) -> None:
        """Put everything that was opened since the last call down to somebody."""
        self.opened[who].update(self._drain())

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)

    def _drain(self) -> list[Path]:
        paths = []
        while True:
            try:
                events = os.read(self._descriptor, 2**20)
            except BlockingIOError:
                return paths
            position = 0
            while position < len(events):
                number, mask, _, length = EVENT.unpack_from(events, position)
                assert not mask & IN_Q_OVERFLOW, "more was opened than can be told"
                start = position + EVENT.size
                name = events[start : start + length].rstrip(b"\0")
                paths.append(self._watched[number] / os.fsdecode(name))
                position = start + length


@dataclass
class Observation:
    """Who is at work, and what each has printed and opened."""

    watch: FolderWatch
    now: str = SERVER
    printed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def turn_to(self, who: str) -> None:
        """Somebody else takes over."""
        self.watch.note(self.now)
        self.watch.watch_all()
        self.now = who

    def log_of(self, who: str) -> bytes:
        """Return what somebody has printed."""
        return "".join(self.printed[who]).encode()


class _Log(io.TextIOBase):
    def __init__(self, observation: Observation) -> None:
        self._observation = observation

    def write(self, text: str) -> int:
        self._observation.printed[self._observation.now].append(text)
        return len(text)


@contextmanager
def observe(*folders: Path) -> Iterator[Observation]:
    """Observe what federations do within the block, and what they open in ``folders``."""
    observation = Observation(FolderWatch(*folders))
    handle, log = client_app.app, _Log(observation)

    def deliver(message, context):
        observation.turn_to(str(context.node_config["client-id"]))
        try:
            return handle(message, context)
        finally:
            observation.turn_to(SERVER)

    handler = logging.StreamHandler(log)
    loggers = [logging.getLogger(name) for name in (None, "flwr", "transformers", "datasets")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with (
            mock.patch.object(client_app, "app", deliver),
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            yield observation
        observation.watch.note(SERVER)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        observation.watch.close()


def find_windows(needles: list[np.ndarray], haystack: bytes) -> int:
    """Return how many 16-byte pieces of these arrays stand anywhere in ``haystack``.

    Pieces of few different bytes, such as zeros, say nothing and are left out.
    """
    wanted = set()
    for array in needles:
        data = array.tobytes()
        pieces = (data[at : at + WINDOW_BYTES] for at in range(0, len(data) - 15, WINDOW_BYTES))
        wanted |= {piece for piece in pieces if len(set(piece)) >= 6}
    assert wanted, "nothing to look for"
    beginnings = np.array([int.from_bytes(piece[:8], sys.byteorder) for piece in wanted], np.uint64)
    found = set()
    for offset in range(8 if len(haystack) >= WINDOW_BYTES else 0):
        words = np.frombuffer(haystack, np.uint64, (len(haystack) - offset) // 8, offset)
        for at in np.flatnonzero(np.isin(words, beginnings)):
            start = offset + 8 * int(at)
            found.add(haystack[start : start + WINDOW_BYTES])
    return len(found & wanted)
