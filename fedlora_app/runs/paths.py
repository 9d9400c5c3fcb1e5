"""Where everything of a run lies, and what a run directory may be called.

No other module knows the name of a file or folder in a run directory.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from fedlora_app.config.schema import SAFE_NAME, Config
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import LOCK_FILE

LATEST = "latest"
"""The link to the newest run, beside it."""
ROUND = "round_"
MEMORY_FILE = "memory.safetensors"
"""In the folder of a round's global adapter: what the aggregation keeps beside it."""
SAFETENSORS = ".safetensors"
KEY_FILE = "secret.key"
"""Where noise is added, at the server or at a client: the secret that it is drawn from."""
RELEASES_FILE = "releases.jsonl"
"""Likewise: what of clients' privacy has been spent."""
MAX_NAME_LENGTH = 64


class RunDirectoryError(UserError):
    """A run directory exists already, is damaged or cannot be written."""


class RunPaths:
    """The files and folders of one run directory, whether they exist or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.json"
        self.manifest = folder / "manifest.json"
        self.history = folder / "history.json"
        self.history_table = folder / "history.csv"
        self.events = folder / "metrics.jsonl"
        self.evaluation = folder / "evaluation.json"  # of the final round, or the newest
        self.attack = folder / "attack.json"  # what the updates that were kept give away
        self.forgetting = folder / "forgetting.json"  # what a forgotten client's absence changes
        self.partial_evaluation = folder / ".evaluation.partial.jsonl"
        self.lock = folder / LOCK_FILE
        self.server = folder / "server"
        self.server_key = self.server / KEY_FILE
        self.releases = self.server / RELEASES_FILE
        self.clients = folder / "clients"
        self.final = folder / "final"
        self.final_global = self.final / "global"
        self.final_locals = self.final / "clients"

    def other_evaluation(self, server_round: int | None, combination: str | None) -> Path:
        """Return where an evaluation is kept of another round or another combination.

        Args:
            server_round: None for the final one.
            combination: None for that of the run's configuration.
        """
        parts = [_name_round(server_round)] if server_round is not None else []
        parts += [combination] if combination is not None else []
        return self.folder / f"{'_'.join(['evaluation', *parts])}.json"

    def global_adapter(self, server_round: int) -> Path:
        """Return the folder of the global adapter after a round."""
        return self.server / _name_round(server_round)

    def uploads(self, server_round: int) -> Path:
        """Return the folder of the updates that the server keeps of a round."""
        return self.global_adapter(server_round) / "uploads"

    def upload(self, client: str, server_round: int) -> Path:
        """Return the file of a client's update that the server keeps of a round."""
        return self.uploads(server_round) / f"{client}{SAFETENSORS}"

    def client(self, client: str) -> Path:
        """Return the folder of what a client keeps during the run."""
        return self.clients / client

    def run_id(self, client: str) -> Path:
        """Return the file that says of which run a client's folder is."""
        return self.client(client) / "run.json"

    def secret_key(self, client: str) -> Path:
        """Return the file of the secret that a client's own noise is drawn from."""
        return self.client(client) / KEY_FILE

    def own_releases(self, client: str) -> Path:
        """Return the list of what a client's own noise has spent of its privacy."""
        return self.client(client) / RELEASES_FILE

    def local_adapter(self, client: str, server_round: int) -> Path:
        """Return the folder of a client's local adapter after a round."""
        return self.client(client) / _name_round(server_round)

    def own_global(self, client: str, server_round: int) -> Path:
        """Return the folder of the global adapter that a client has for itself after a round."""
        return self.client(client) / "global" / _name_round(server_round)

    def feedback(self, client: str, server_round: int) -> Path:
        """Return the file of what the rounding of a client's updates has left after a round."""
        return self.client(client) / "feedback" / f"{_name_round(server_round)}{SAFETENSORS}"

    def received_global(self, client: str) -> Path:
        """Return the folder of the global adapter that a client keeps for its next message."""
        return self.client(client) / "received"

    def changes(self, client: str) -> Path:
        """Return the file of how much the global adapter has changed at a client, by rounds."""
        return self.client(client) / "changes.json"

    def gate(self, client: str) -> Path:
        """Return the folder of the gate before a client's local adapter."""
        return self.combiner(client, "gate")

    def combiner(self, client: str, combination: str) -> Path:
        """Return the folder of what combines a client's adapters in that way."""
        return self.client(client) / combination

    def final_local(self, client: str) -> Path:
        """Return the folder of the local adapter to use."""
        return self.final_locals / client

    def final_own_global(self, client: str) -> Path:
        """Return the folder of the global adapter to use, where clients differ in it."""
        return self.final / "globals" / client

    @property
    def written_by_server(self) -> list[Path]:
        """What the server writes, without the folders of single rounds."""
        files = [self.config, self.manifest, self.events, self.history, self.history_table]
        secrets = [self.server_key, self.releases]
        return [*files, self.server, *secrets, self.final, self.final_global, self.lock]


def list_rounds(folder: Path) -> dict[int, Path]:
    """Return what a folder of the run has by rounds, folders or files, oldest first."""
    numbers = {
        path: path.name.removeprefix(ROUND).removesuffix(SAFETENSORS)
        for path in folder.glob(f"{ROUND}*")
    }
    return dict(sorted((int(n), path) for path, n in numbers.items() if n.isdecimal()))


def require_within(path: Path, run_dir: Path) -> None:
    """Raise ``RunDirectoryError`` where links lead from a path in a run directory out of it."""
    try:
        is_within = path.resolve().is_relative_to(run_dir.resolve())
    except RuntimeError:  # links that lead to themselves
        is_within = False
    if not is_within:
        raise RunDirectoryError(
            f"{path} is a link that leads out of the run directory. Put a copy there."
        )


def find_run(name: str, root: Path) -> Path:
    """Return the run directory that ``name`` means: a path, or a name below ``results``.

    Raises:
        RunDirectoryError: there is none, naming the places searched and the newest runs.
    """
    results = root / "results"
    places = [Path(name), results / name]
    for place in places:
        if place.is_dir():
            return place.resolve()
    newest = list_runs(results)[:5]
    listing = "".join(f"\n  {run.relative_to(results)}" for run in newest)
    known = f" Newest runs in {results}:{listing}" if newest else " Start one with flwr run first."
    raise RunDirectoryError(f"There is no run {places[0]} and no {places[1]}.{known}")


def list_runs(results: Path) -> list[Path]:
    """Return the run directories in a folder and in those of its studies, the newest first."""
    manifest = RunPaths(Path("*")).manifest.as_posix()
    found = [*results.glob(manifest), *results.glob(f"*/{manifest}")]
    runs = [path.parent for path in found if not path.parent.is_symlink()]
    return sorted(runs, key=lambda run: (-run.stat().st_mtime, run))


def check_run_name(name: str) -> str:
    """Return a name that is a plain folder name and not the link's, or raise."""
    if name == LATEST:
        raise RunDirectoryError(f'run-name "{LATEST}" is the name of the link to the newest run.')
    if not re.fullmatch(SAFE_NAME, name):
        raise RunDirectoryError(
            f"run-name {name!r:.100} is not a folder name. Expected letters, digits, '.', '_' and "
            f"'-', beginning with a letter or digit, at most {MAX_NAME_LENGTH}."
        )
    return name


def default_run_name(config: Config) -> str:
    """Return a name made from the experiment, its mode, its seed and the time."""
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    tail = f"-{config.federated.mode}-seed{config.experiment.seed}-{time}"
    return config.experiment.name[: MAX_NAME_LENGTH - len(tail)] + tail


def _name_round(server_round: int) -> str:
    return f"{ROUND}{server_round:03d}"
