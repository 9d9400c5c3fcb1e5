"""Evaluations kept apart from their runs, so that a study can go on where the runs are not.

One compressed JSON file per run: its configuration and its ``evaluation.json``. It is used in the
run's place as long as data files are the same, and configurations but for how a run is carried out.
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
CARRIED_OUT = {
    "experiment": ("track",),
    "federated": ("share_gpu", "client_timeout_seconds", "reconnect_seconds"),
}
"""Settings of how a run is carried out on a machine, which change no figure of it."""


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
        kept = parse_config(content["config"])
        is_same = gives_the_same(kept, config) and is_of(evaluation, files)
    except (OSError, EOFError, ValueError, LookupError, TypeError, ConfigError):
        return None
    return evaluation if is_same else None


def gives_the_same(one: Config, other: Config) -> bool:
    """Return whether two configurations give the same figures on the same machine and data."""
    dumps = [config.dump() for config in (one, other)]
    for dump in dumps:
        for section, names in CARRIED_OUT.items():
            for name in names:
                dump[section].pop(name, None)
    return dumps[0] == dumps[1]


def is_of(evaluation: Mapping[str, Any], files: Mapping[str, ClientFiles]) -> bool:
    """Return whether an evaluation is of today's format and of the files as they are now."""
    hashes = {c: {n: f.sha256 for n, f in fs.all.items()} for c, fs in files.items()}
    return evaluation.get("format") == FORMAT and evaluation["files"] == hashes
