"""Hashes of large files, read once per machine and kept on disk.

A file whose inode, size and times are those of then is not read again. Whatever is kept may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fedlora_app.foundation.files import hash_file, make_private_dir, write_json

CACHE_VARIABLE = "FEDLORA_CACHE"
HASHING_THREADS = 4
KEPT_FROM_BYTES = 1 << 24
"""Smaller files are hashed again each time."""


def find_cache_dir() -> Path:
    """Return this user's folder for caches: $FEDLORA_CACHE, or one at the usual place."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(usual)).absolute() / "fedlora"


def hash_files(paths: Iterable[Path], *, keep: bool = True) -> list[str]:
    """Return the sha256 of every file, several at once.

    Args:
        keep: the hashes of large files; otherwise all are read now and none is kept.
    """
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(_hash if keep else hash_file, paths))


def measure_unknown(paths: Iterable[Path]) -> int:
    """Return how many bytes of large files have to be read to know their hashes."""
    large = [_identify(path) for path in paths if path.stat().st_size >= KEPT_FROM_BYTES]
    return sum(about["size"] for about in large if _read_kept(about) is None)


def _hash(path: Path) -> str:
    """Return a file's sha256, read from what is kept where the file is as it was then."""
    about = _identify(path)
    if about["size"] < KEPT_FROM_BYTES:
        return hash_file(path)
    kept = _read_kept(about)
    if kept is not None:
        return kept
    sha256 = _hash_once(**about)
    if about == _identify(path):  # nobody wrote while it was read
        _keep(about | {"sha256": sha256})
    return sha256


@cache
def _hash_once(path: str, inode: int, size: int, mtime_ns: int, ctime_ns: int) -> str:
    return hash_file(Path(path))


def _identify(path: Path) -> dict[str, Any]:
    """Return what changes when a file does; the time of its last change cannot be set back."""
    path = path.resolve()
    stat = path.stat()
    return {
        "path": str(path),
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _place(about: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(about["path"].encode(errors="surrogateescape")).hexdigest()[:32]
    return find_cache_dir() / "hashes" / f"{name}.json"


def _read_kept(about: Mapping[str, Any]) -> str | None:
    try:
        kept = json.loads(_place(about).read_text(encoding="utf-8"))
        sha256 = kept.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return sha256 if kept == about and isinstance(sha256, str) and len(sha256) == 64 else None


def _keep(entry: dict[str, Any]) -> None:
    place = _place(entry)
    try:
        make_private_dir(place.parent)
        write_json(place, entry)
    except (OSError, UnicodeError) as error:
        print(
            f"Note: the hash of {entry['path']} could not be kept in {place.parent}: {error}. Each "
            "start computes it again.",
            file=sys.stderr,
            flush=True,
        )
