"""An append-only log of what happened, each line of which names the hash of the line before it.

A line is canonical JSON: ``seq``, ``time``, ``event``, its fields, ``previous`` (sha256 of the
bytes of the line before) and ``line_sha256`` (of this line without that field). So a line that is
changed, moved, removed or added is found; not so an end that is cut off, which the other end's
log tells, and not so a file that is made anew from its first line by who can write it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.terminal import shell

BEFORE_THE_FIRST = "0" * 64
TORN = "torn"
"""The event that tells of a torn line before it, which the chain passes over."""
OWN_FIELDS = ("seq", "time", "event", "previous", "line_sha256")
BLOCK_BYTES = 1 << 16


class EvidenceError(UserError):
    """The log cannot be continued as it is."""


class Evidence:
    """The log in a file, to which several processes and threads may add."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one line and return what it says, once it is on the disk.

        Raises:
            EvidenceError: the last line was changed, so that nothing can be added to it.
            ValueError: a field has a name of the log's own, or is not JSON.
        """
        if taken := [name for name in fields if name in OWN_FIELDS]:
            raise ValueError(f"The log itself fills in {', '.join(taken)}.")
        with self._locked() as descriptor:
            tail = _read_tail(descriptor)
            if tail is None:
                raise EvidenceError(
                    f"{self.path}: its last line was changed, so nothing is added to it. See what "
                    f"happened with: fedlora deploy audit {shell(self.path)}. Then move the file "
                    "away; the next event begins a new one."
                )
            added = b"" if tail.is_complete else b"\n"
            seq, previous = tail.seq + 1, tail.sha256
            if tail.torn is not None:  # the chain goes on from the line before it
                torn = {"bytes": len(tail.torn), "torn_sha256": hash_bytes(tail.torn)}
                line, _ = _build_line(seq, TORN, torn, previous)
                added += line + b"\n"
                seq, previous = seq + 1, hash_bytes(line)
            line, entry = _build_line(seq, event, fields, previous)
            _write_all(descriptor, added + line + b"\n")
            os.fsync(descriptor)
        return entry

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the open file, which no other process or thread writes meanwhile."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock


@dataclass(frozen=True)
class _Tail:
    """What the next line continues from."""

    seq: int = -1
    sha256: str = BEFORE_THE_FIRST
    """Of the bytes of the last whole line."""
    is_complete: bool = True
    """Whether the file ends with the end of a line."""
    torn: bytes | None = None
    """What a crash has left of a line after the last whole one."""


def _read_tail(descriptor: int) -> _Tail | None:
    """Return the end of the log; None where its last line was changed after it was written."""
    lines, is_complete = _read_last_lines(descriptor, 2)
    torn = None
    if lines and not is_complete and read_entry(lines[-1]) is None:
        torn = lines.pop()
    if not lines:
        return _Tail(is_complete=is_complete, torn=torn)
    entry = read_entry(lines[-1])
    if entry is None:
        return None
    return _Tail(entry["seq"], hash_bytes(lines[-1]), is_complete, torn)


def _read_last_lines(descriptor: int, count: int) -> tuple[list[bytes], bool]:
    """Return the file's last lines, and whether the very last has its end."""
    start, data = os.fstat(descriptor).st_size, b""
    while start > 0 and data.count(b"\n") <= count:
        size = min(BLOCK_BYTES, start)
        start -= size
        data = os.pread(descriptor, size, start) + data
    is_complete = not data or data.endswith(b"\n")
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    return lines[-count:], is_complete


def read_entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line says; None unless it is, byte for byte, as the log wrote it."""
    try:
        entry = json.loads(line)
        rest = {name: value for name, value in entry.items() if name != "line_sha256"}
        is_own = (
            entry["line_sha256"] == hash_bytes(_dump(rest))
            and _dump(entry) == line
            and type(entry["seq"]) is int
            and all(isinstance(entry[name], str) for name in OWN_FIELDS[1:])
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return entry if is_own else None


def _build_line(
    seq: int, event: str, fields: dict[str, Any], previous: str
) -> tuple[bytes, dict[str, Any]]:
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    entry = {"seq": seq, "time": now, "event": event, "previous": previous} | fields
    entry["line_sha256"] = hash_bytes(_dump(entry))
    return _dump(entry), entry


def _dump(entry: dict[str, Any]) -> bytes:
    """Return the one way in which an entry is written; no line break can be in it."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def hash_bytes(line: bytes) -> str:
    """Return the sha256 of a line in hex."""
    return hashlib.sha256(line).hexdigest()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
