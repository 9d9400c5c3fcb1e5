"""TensorBoard and Weights & Biases, fed with the events that ``metrics.jsonl`` is made of.

Off unless ``experiment.track`` names them. Only the events named "metrics" are passed on, and of
those the numbers, as ``<phase>/<metric>/<client>`` over the rounds. A tracker that fails is
left out for the rest of the run, which continues.

TensorBoard's files stay in the run directory. What leaves the machine with Weights & Biases,
unless WANDB_MODE says otherwise: the metrics that ``messages`` declares and the server's own
(times, bytes, aggregation errors), the clients' ids, the run's name, and the settings that
``public_settings`` returns, without system prompts and the names of data files, but with that of
the base model. What it would collect of itself (code, git state, console, machine, packages)
is switched off, except the platform and the versions of Python, wandb and transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from fedlora_app.config.schema import Config, ConfigError

WANDB_PROJECT = "fedlora-app"  # unless the environment's WANDB_PROJECT names another
FLUSH_SECONDS = 10
FINISH_SECONDS = 60.0  # what is not uploaded by then stays on the disk, for "wandb sync"


class Tracker(Protocol):
    """Where a run's numbers are shown."""

    name: str

    def log(self, event: dict[str, Any]) -> None:
        """Take one event as written to ``metrics.jsonl``."""

    def close(self) -> None:
        """Write what is left."""


class Trackers:
    """The trackers of a run, none of which can stop it."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    def log(self, event: dict[str, Any]) -> None:
        """Pass an event to every tracker that has not failed yet."""
        for tracker in list(self._trackers):
            try:
                tracker.log(event)
            except Exception as error:
                self._trackers.remove(tracker)
                print(
                    f"Note: {tracker.name} failed and is left out for the rest of this run; "
                    f"metrics.jsonl has all of it. {type(error).__name__}: {error}",
                    flush=True,
                )

    def close(self) -> None:
        """Close every tracker, once."""
        while self._trackers:
            tracker = self._trackers.pop()
            try:
                tracker.close()
            except Exception as error:
                print(f"Note: {tracker.name} was not closed: {error}", flush=True)


class TensorBoardTracker:
    """Writes ``<run>/tensorboard``."""

    name = "tensorboard"

    def __init__(self, config: Config, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / self.name), flush_secs=FLUSH_SECONDS)

    def log(self, event: dict[str, Any]) -> None:
        """Add the event's numbers as scalars."""
        for tag, value in scalars(event):
            self._writer.add_scalar(tag, value, event["round"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbTracker:
    """Writes a Weights & Biases run, below ``<run>/wandb`` and wherever WANDB_MODE says."""

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            group=config.experiment.name,
            name=run_dir.name,
            dir=str(run_dir),
            config=public_settings(config),
            save_code=False,
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                finish_timeout=FINISH_SECONDS,
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def log(self, event: dict[str, Any]) -> None:
        """Add the event's numbers to its round."""
        values = dict(scalars(event))
        if values:
            self._run.log(values, step=event["round"])

    def close(self) -> None:
        """Upload what is left, for a minute at most."""
        self._run.finish()


TRACKERS = {tracker.name: tracker for tracker in (TensorBoardTracker, WandbTracker)}


def require_trackers(config: Config) -> None:
    """Raise ``ConfigError`` unless all that ``experiment.track`` names is installed."""
    missing = [name for name in config.experiment.track if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"experiment.track names {' and '.join(missing)}, which is not installed. "
            f"Run: pip install -e '.[{','.join(missing)}]'"
        )


def build_trackers(config: Config, run_dir: Path) -> Trackers:
    """Start what ``experiment.track`` names.

    Raises:
        ConfigError: one of them cannot be started.
    """
    started: list[Tracker] = []
    for name in config.experiment.track:
        try:
            started.append(TRACKERS[name](config, run_dir))
        except Exception as error:
            Trackers(started).close()
            raise ConfigError(
                f"experiment.track: {name} cannot be started: {type(error).__name__}: {error}\n"
                f"Fix that, or take {name} out of experiment.track; nothing was trained yet."
            ) from None
    return Trackers(started)


def scalars(event: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) for every number among an event's metrics."""
    if event["event"] != "metrics":
        return
    phase, client = event["phase"], event["client"]
    for metric, value in event.items():
        if metric == "round" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        yield f"{phase}/{metric.removeprefix(f'train_{phase}/')}/{client}", value


def public_settings(config: Config) -> dict[str, Any]:
    """Return the configuration without system prompts and the names of data files."""
    settings = config.dump()
    clients = settings["federated"]["clients"]
    settings["federated"]["clients"] = [client["id"] for client in clients]
    del settings["data"]
    return settings


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
