"""What a run is to be, from ``--run-config``: its configuration, its name and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora_app.config.loading import change_config, load_config
from fedlora_app.config.run_config import DECLARED_DEFAULTS
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.foundation.project import find_project_root
from fedlora_app.runs.paths import check_run_name, default_run_name
from fedlora_app.runs.resuming import Resumption, find_resumption
from fedlora_app.runs.tracking import require_trackers


@dataclass(frozen=True)
class Settings:
    """What ``flwr run . --run-config`` decides, with the project it was resolved in."""

    config: Config
    root: Path
    run_name: str
    output_dir: str
    resumption: Resumption | None = None

    @cached_property
    def date(self) -> str:
        """The day that the run's prompts are written for: that of its first start."""
        if self.resumption is not None:
            return self.resumption.saved.date
        return datetime.now(UTC).date().isoformat()

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return resolve_output_dir(self.root, self.output_dir) / self.run_name


def read_settings(run_config: dict[str, Any]) -> Settings:
    """Resolve the run configuration into settings.

    Raises:
        ConfigError, RunDirectoryError, ProjectNotFoundError: before anything is written.
    """
    config_path = str(run_config["config"])
    root = find_project_root(config_path)
    output_dir = str(run_config["output-dir"])
    places = [resolve_output_dir(root, output_dir), root]
    given_rounds, mode = run_config["num-rounds"], run_config["mode"]
    num_rounds = None if given_rounds == 0 and given_rounds is not False else given_rounds

    changes = {
        "overrides": str(run_config["overrides"]),
        "federated__num_rounds": num_rounds,
        "federated__mode": None if mode == "" else mode,
    }
    if not run_config["resume"]:
        config = load_config(root / config_path, **changes)
        require_federation(config)
        require_trackers(config)
        name = check_run_name(str(run_config["run-name"] or default_run_name(config)))
        return Settings(config, root, name, output_dir)
    if run_config["run-name"]:
        raise ConfigError("run-name has no effect with resume: the run keeps its name.")
    resumption = find_resumption(str(run_config["resume"]), places, num_rounds)
    if ("config", config_path) not in DECLARED_DEFAULTS:
        given = load_config(root / config_path, **changes)
        resumption = resumption.with_changes(given, num_rounds)
    elif run_config["overrides"] or mode:  # of the run's own configuration
        given = change_config(resumption.saved.config, **changes)
        resumption = resumption.with_changes(given, num_rounds)
    require_federation(resumption.config)
    require_trackers(resumption.config)
    path = resumption.saved.path
    return Settings(resumption.config, root, path.name, str(path.parent), resumption)


def resolve_output_dir(root: Path, output_dir: str) -> Path:
    """Return the absolute folder that run directories go to."""
    if not output_dir.strip():
        raise ConfigError("output-dir is empty. Name a folder; the default is results.")
    return (root / Path(output_dir).expanduser()).resolve()


def require_federation(config: Config) -> None:
    """Raise where a run has no server, and nothing that Flower could run."""
    if config.federated.mode == "adapted":
        raise ConfigError(
            "federated.mode: adapted is what new clients of a finished run do, without a server. "
            "To begin or go on: fedlora adapt RUN --config CONFIG"
        )
