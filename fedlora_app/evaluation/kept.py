"""Evaluations kept apart from their runs, so that a study can go on where the runs are not.

One compressed JSON file per run: its configuration and its ``evaluation.json``. It is used in the
run's place as long as configuration and data files are the same.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.evaluation.tables import FORMAT

SUFFIX = ".json.gz"


def keep_evaluation(path: Path, config: Config, evaluation: Mapping[str, Any]) -> None:
    """Write an evaluation with its run's configuration, the same bytes for the same values."""
    content = json.dumps({"config": config.dump(), "evaluation": evaluation}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode(), mtime=0))


def find_kept(
    path: Path, config: Config, files: Mapping[str, ClientFiles]
) -> dict[str, Any] | None:
    """Return a kept evaluation, or None where there is none of this configuration and data."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        evaluation = content["evaluation"]
        # Read as a configuration, since an older version's lacks the keys that have come since.
        is_same = parse_config(content["config"]) == config and is_of(evaluation, files)
    except (OSError, EOFError, ValueError, LookupError, TypeError, ConfigError):
        return None
    return evaluation if is_same else None


def is_of(evaluation: Mapping[str, Any], files: Mapping[str, ClientFiles]) -> bool:
    """Return whether an evaluation is of today's format and of the files as they are now."""
    hashes = {c: {n: f.sha256 for n, f in fs.all.items()} for c, fs in files.items()}
    return evaluation.get("format") == FORMAT and evaluation["files"] == hashes
