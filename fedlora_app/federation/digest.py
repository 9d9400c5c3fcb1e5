"""Hashes of what a message carries, the same at both ends of its way.

They are taken over values and not over what the transport makes of them: records and entries by
name, arrays with their names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, RecordDict

NOTHING = ""
"""In place of a hash where there is nothing to hash."""


@dataclass(frozen=True)
class Digest:
    """What a message carries, in numbers."""

    num_bytes: int
    """Of the arrays."""
    sha256: str
    """Of the arrays; empty where there are none."""
    rest_sha256: str
    """Of everything else: the task, or the metrics and facts."""


class Digester:
    """Takes the hashes of messages; an adapter that goes to many clients is hashed once."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[ArrayRecord], bytes, int] | None = None

    def digest(self, content: RecordDict) -> Digest:
        """Return the hashes of a message's content."""
        total, num_bytes = hashlib.sha256(), 0
        for name in sorted(content.array_records):
            hashed, size = self._hash_arrays(content.array_records[name])
            total.update(_dump([name]) + hashed)
            num_bytes += size
        rest = {
            name: dict(record)
            for records in (content.config_records, content.metric_records)
            for name, record in records.items()
        }
        return Digest(
            num_bytes,
            total.hexdigest() if content.array_records else NOTHING,
            hashlib.sha256(_dump(rest)).hexdigest() if rest else NOTHING,
        )

    def _hash_arrays(self, record: ArrayRecord) -> tuple[bytes, int]:
        if self._last is not None and self._last[0]() is record:
            return self._last[1:]
        found = hash_arrays(record)
        self._last = (weakref.ref(record), *found)
        return found


def hash_arrays(record: ArrayRecord) -> tuple[bytes, int]:
    """Return the sha256 of a record's arrays, and the number of their bytes."""
    total, num_bytes = hashlib.sha256(), 0
    for key in sorted(record):
        array = record[key]
        shape = [int(size) for size in array.shape]
        total.update(_dump([key, array.dtype, array.stype, shape, len(array.data)]))
        total.update(array.data)
        num_bytes += len(array.data)
    return total.digest(), num_bytes


def _dump(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=bytes.hex)
    return text.encode("ascii")
