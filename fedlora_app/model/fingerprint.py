"""What tells one base model from another: a hash of every byte that its answers depend on.

But for the tokens that generation_config.json ends answers with: runs of before have a fingerprint
without them.

Weights are read as a whole once (``kept_hashes``), because under a real deployment every message
reaches a new process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora_app.model.kept_hashes import hash_files, measure_unknown

WEIGHTS = ("*.safetensors",)
SETTINGS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.*"),
    *("special_tokens_map.json", "added_tokens.json"),
)
VOCABULARY = ("vocab*", "merges*", "*.model")
"""Not read where there is a tokenizer.json, and then not part of every download."""
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
    _say_if_long(folder, paths)
    hashes = hash_files(paths)
    names = [path.name for path in paths]
    return hashlib.sha256(json.dumps([names, hashes]).encode()).hexdigest()


def _say_if_long(folder: Path, paths: list[Path]) -> None:
    size = measure_unknown(paths)
    if size >= SAID_FROM_BYTES:
        print(
            f"Hashing {size / 1e9:.1f} GB of weights in {folder}, which is done once and takes "
            "about as long as reading them.",
            file=sys.stderr,
            flush=True,
        )
