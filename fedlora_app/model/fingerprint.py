"""What tells one base model from another: a hash of every byte that its answers depend on.

Weights are read as a whole once and their hashes kept on disk, because under a real deployment
every message reaches a new process. Whatever is kept there may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fedlora_app.foundation.files import hash_file, make_private_dir, write_json
from fedlora_app.model.quantised_cache import HASHING_THREADS, find_cache_dir

WEIGHTS = ("*.safetensors",)
SETTINGS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.*"),
    *("special_tokens_map.json", "added_tokens.json"),
)
VOCABULARY = ("vocab*", "merges*", "*.model")
"""Not read where there is a tokenizer.json, and then not part of every download."""
KEPT_FROM_BYTES = 1 << 24
"""Smaller files are hashed again each time."""
SAID_FROM_BYTES = 1 << 30
COVERS = "weights, config.json, tokenizer"
"""Recorded beside a fingerprint; older runs lack it, and their fingerprints say less."""


def fingerprint_model(folder: Path) -> str:
    """Return a hash of a model's weights, configuration, tokenizer and chat template."""
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return _fingerprint(folder, WEIGHTS + SETTINGS + (() if has_tokenizer else VOCABULARY))


def fingerprint_weights(folder: Path) -> str:
    """Return a hash of a model's weights alone."""
    return _fingerprint(folder, WEIGHTS)


def explain_fingerprint(recorded: Mapping[str, Any]) -> str:
    """Return what to add where a run's fingerprint differs because an older version took it.

    Args:
        recorded: the manifest's ``base_model``.
    """
    if "fingerprint" not in recorded or recorded.get("fingerprint_covers") == COVERS:
        return ""
    return (
        "\nThe run's fingerprint is an older version's, which read the weight files only in part "
        "and cannot be compared. If the base model is the same, delete "
        '"fingerprint" from "base_model" in the run\'s manifest.json and try again.'
    )


def _fingerprint(folder: Path, patterns: Iterable[str]) -> str:
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        _say_if_long(folder, paths)
        hashes = list(pool.map(_hash, paths))
    names = [path.name for path in paths]
    return hashlib.sha256(json.dumps([names, hashes]).encode()).hexdigest()


def _say_if_long(folder: Path, paths: list[Path]) -> None:
    unknown = [_identify(path) for path in paths if path.stat().st_size >= KEPT_FROM_BYTES]
    size = sum(about["size"] for about in unknown if _read_kept(about) is None)
    if size >= SAID_FROM_BYTES:
        print(
            f"Hashing {size / 1e9:.1f} GB of weights in {folder}, which is done once and takes "
            "about as long as reading them.",
            file=sys.stderr,
            flush=True,
        )


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
def _hash_once(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    return hash_file(Path(path))


def _identify(path: Path) -> dict[str, Any]:
    """Return what changes when a file does; the time of its last change cannot be set back."""
    path = path.resolve()
    stat = path.stat()
    return {
        "path": str(path),
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
