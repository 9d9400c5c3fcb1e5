"""Evaluations kept apart from their runs, so that a study can go on where the runs are not.

One compressed JSON file per run: its configuration and its ``evaluation.json``. It is used in the
run's place as long as data files are the same, and configurations but for how a run is carried out.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_app.config.loading import parse_config
from fedlora_app.config.sameness import gives_the_same
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.evaluation.tables import FORMAT, hash_settings
from fedlora_app.model.base import ModelError, compute_fingerprint

SUFFIX = ".json.gz"


def keep_evaluation(path: Path, config: Config, evaluation: Mapping[str, Any]) -> None:
    """Write an evaluation with its run's configuration, the same bytes for the same values."""
    content = json.dumps({"config": config.dump(), "evaluation": evaluation}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode(), mtime=0))


def find_kept(
    path: Path, config: Config, files: Mapping[str, ClientFiles], root: Path
) -> dict[str, Any] | None:
    """Return a kept evaluation; None where there is none of this configuration, data and base.

    Args:
        root: the project, to which the base model's folder is relative. A base model that is not
            on this machine counts as the one of that name.
    """
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        evaluation = content["evaluation"]
        # Read as a configuration, since an older version's lacks the keys that have come since.
        kept = parse_config(content["config"])
        is_same = gives_the_same(kept, config) and is_of(evaluation, files)
        if not is_same or not has_base(evaluation["base_model"], config, root):
            return None
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, ConfigError):
        return None
    today = {"settings": hash_settings(kept), "max_new_tokens": kept.evaluation.max_new_tokens}
    return evaluation | today  # as evaluations have it now


def has_base(recorded: Mapping[str, Any], config: Config, root: Path) -> bool:
    """Return whether the base model here is the recorded one, as far as both are known."""
    try:
        found = compute_fingerprint(config.model, root)
    except ModelError:
        return True
    return recorded.get("fingerprint", found) == found


def is_of(evaluation: Mapping[str, Any], files: Mapping[str, ClientFiles]) -> bool:
    """Return whether an evaluation is of today's format and of the files as they are now."""
    hashes = {c: {n: f.sha256 for n, f in fs.all.items()} for c, fs in files.items()}
    return evaluation.get("format") == FORMAT and evaluation["files"] == hashes
