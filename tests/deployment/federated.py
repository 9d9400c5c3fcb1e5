"""A deployment of the tiny experiment: a coordinator and its sites, each in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from conftest import ROOT
from deployment.sites import make_site
from flower_process import BIN, free_port
from loopback import Federation, wait_until

from fedlora_app.config.schema import Config
from fedlora_app.deployment.audit import Entry, compare_logs, read_log
from fedlora_app.deployment.control import stop
from fedlora_app.deployment.coordinator import create
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder
from fedlora_app.deployment.membership import approve
from fedlora_app.deployment.processes import KnownProcess, read_started
from fedlora_app.deployment.site import join, make_request, open_package

START_SECONDS = 120.0
RUN_SECONDS = 240.0
STOP_SECONDS = 90.0

Where = Callable[..., list[str]]


def here(*command: str) -> list[str]:
    """Return a command as it runs on this machine's own network."""
    return list(command)


class Deployment:
    """Keys and packages of all ends; ``fedlora deploy`` runs what there is to run.

    Args:
        folder: in which each end gets a folder.
        host: of the coordinator, as sites reach it.
        at_coordinator, at_site: make of a command one that runs on the end's host.
        variables: of the environment of all processes.
    """

    def __init__(
        self,
        folder: Path,
        project: Path,
        config: Config,
        host: str = "127.0.0.1",
        at_coordinator: Where = here,
        at_site: Where = here,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.coordinator = CoordinatorFolder(folder / "coordinator")
        self.sites = {client: SiteFolder(folder / client) for client in config.client_ids}
        self._project = project
        self._at_coordinator, self._at_site = at_coordinator, at_site
        self._variables = variables or {}
        self._runs: list[Run] = []
        experiment = folder / "experiment.yaml"
        experiment.write_text(json.dumps(config.dump()))
        coordinator = create(self.coordinator.folder, host, free_port(), experiment, ROOT)
        for client, site in self.sites.items():
            make_site(project, site.folder, client)
            approve(coordinator, make_request(client, site.folder))
            package, _ = open_package(self.coordinator.package(client), site.folder)
            join(package, site)

    def start(self) -> None:
        """Start all ends and wait until all sites are online."""
        self._call(self._at_coordinator, "start", str(self.coordinator.folder))
        for site in self.sites.values():
            self._call(self._at_site, "start", str(site.folder))
        wait_until(lambda: self._status().count(": approved, online") == len(self.sites), 60)

    def stop(self) -> None:
        """End all that was started, and fail where anything is left."""
        for run in self._runs:
            run.stop()
        for end in (*self.sites.values(), self.coordinator):
            if end.processes.exists():
                stop(end.folder)
        wait_until(lambda: not self._find_processes())

    def run(self, name: str, *options: str) -> Run:
        """Begin a run, or go on with one."""
        self._runs.append(Run(self, name, options))
        return self._runs[-1]

    def command(self, at: Where, *arguments: str) -> list[str]:
        return at(str(BIN / "fedlora"), "deploy", *arguments)

    @property
    def environment(self) -> dict[str, str]:
        own = {"HF_HUB_OFFLINE": "1", "FEDLORA_PROJECT_DIR": str(ROOT), "PYTHONPATH": str(ROOT)}
        return os.environ | own | self._variables

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def run_command(self, *options: str) -> list[str]:
        where = (str(self.coordinator.folder), "--output-dir", str(self.results))
        return self.command(self._at_coordinator, "run", *where, *options)

    def process(self, end: CoordinatorFolder | SiteFolder, name: str) -> KnownProcess:
        """Return a process of an end, as it is now."""
        started = read_started(end.processes)
        assert started is not None
        return next(process for process in started.processes if process.name == name)

    def events(self, end: CoordinatorFolder | SiteFolder, event: str, **fields: object) -> int:
        """Return how many entries of an end's log are of an event and have these fields."""
        return sum(
            entry["event"] == event and fields.items() <= entry.items()
            for entry in read_entries(end)
        )

    def check_evidence(self) -> None:
        """Check that all logs are whole, and that no two contradict each other."""
        server = read_log(self.coordinator.evidence)
        for site in self.sites.values():
            log = read_log(site.evidence)
            assert (server.fault, log.fault) == (None, None)
            assert compare_logs(server, log).contradictions == []

    def logs(self) -> str:
        """The end of each log, to be shown where a test fails."""
        files = sorted(self.folder.rglob("*.log"))
        return "".join(f"\n== {p}\n{p.read_text(errors='replace')[-3000:]}" for p in files)

    def check_result(self, run: Path, folder: Path) -> None:
        """Check that all adapters are, byte for byte, those of one process without a network.

        Args:
            run: a run's directory.
            folder: an empty one, for the other run.
        """
        federation = Federation(self._project, folder / "results", self.config)
        for client in self.sites:
            federation.own_files[client] = make_site(
                self._project, folder / client, client, store=str(folder / "results")
            )
        expected = federation.run()
        parts = {"global": run} | {
            f"clients/{client}": site.store / run.name for client, site in self.sites.items()
        }
        for part, where in parts.items():
            ours, theirs = (
                (path / "final" / part / "adapter_model.safetensors").read_bytes()
                for path in (where, expected)
            )
            assert ours == theirs, part

    def _find_processes(self) -> list[str]:
        """Return which processes have a folder of this deployment in their environment."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if f"={self.folder}/".encode() in (process / "environ").read_bytes():
                    found.append(process.name)
        return found

    def _status(self) -> str:
        return self._call(self._at_coordinator, "status", str(self.coordinator.folder))

    def _call(self, at: Where, *arguments: str) -> str:
        done = subprocess.run(
            self.command(at, *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


class Run:
    """A run that is under way, as ``fedlora deploy run`` shows it."""

    def __init__(self, deployment: Deployment, name: str, options: tuple[str, ...]) -> None:
        self.path = deployment.results / name
        self._log = deployment.folder / f"{name}-{free_port()}.log"
        self._deployment = deployment
        named = options if "--resume" in options else ("--name", name, *options)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                deployment.run_command(*named),
                env=deployment.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until(self, is_so: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
        """Wait for something that happens in the run, and fail when that ends before."""
        wait_until(lambda: is_so() or self._process.poll() is not None, seconds)
        assert is_so(), self.text + self._deployment.logs()

    def end(self, status: int = 0) -> str:
        """Wait for its end and return what it has printed."""
        ended = self._process.wait(RUN_SECONDS)
        assert ended == status, self.text + self._deployment.logs()
        return self.text

    def stop(self) -> None:
        """Stop it as Ctrl-C does, if it is under way."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(STOP_SECONDS)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text())


def read_entries(end: CoordinatorFolder | SiteFolder) -> Iterator[Entry]:
    """Yield the entries of an end's log; there are none before something has happened."""
    if end.evidence.exists():
        yield from read_log(end.evidence).entries
