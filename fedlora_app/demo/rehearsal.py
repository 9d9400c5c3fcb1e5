"""A deployment on one machine, with what goes wrong in one: ``fedlora deploy rehearse``.

Coordinator and sites are separate processes with separate folders, which talk over TLS by the
loopback address as they would over a network; keys, packages and commands are those of a real
deployment. The data are a few records of the demo's cities. In the one round that is run a site is
killed and started again, another is paused, and strangers try to come in.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from fedlora_app.demo.data import NAMES, build_experiment, generate
from fedlora_app.deployment.audit import compare_logs, read_log
from fedlora_app.deployment.control import start_in_background, stop
from fedlora_app.deployment.coordinator import create
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder
from fedlora_app.deployment.membership import approve, check_newcomer
from fedlora_app.deployment.processes import read_started, signal_session
from fedlora_app.deployment.programs import build_environment
from fedlora_app.deployment.registry import list_nodes
from fedlora_app.deployment.site import join, make_request, open_package
from fedlora_app.deployment.witness import RECEIVED, SENT
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import find_project_root
from fedlora_app.runs.paths import RunPaths

HOST = "127.0.0.1"
ELSEWHERE = "127.0.0.2"
"""This machine too, and not what the SuperLink takes for its own."""
CITIES = NAMES[:3]
UNTOUCHED, PAUSED, KILLED = CITIES
STRANGER = "stranger"
RUN_NAME = "rehearsal"
NUM_RECORDS = 48
NUM_QUESTIONS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"global_epochs": 20},
    "federated": {"num_rounds": 1, "clients_at_once": 0},
}
PAUSE_SECONDS = 15.0
POLL_SECONDS = 0.2
START_SECONDS = 240.0
RUN_SECONDS = 900.0
REFUSED_SECONDS = 90.0

Say = Callable[[str], None]


class RehearsalError(UserError):
    """The rehearsal could not be held to its end; the message says where its logs are."""


class Rehearsal:
    """A rehearsal's folders, and what was seen in it.

    Args:
        folder: in which the coordinator and each site get a folder of their own.
        say: is given, line by line, what is done and what each end saw.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.coordinator = CoordinatorFolder(folder / "coordinator")
        self.sites = {city: SiteFolder(folder / city) for city in CITIES}
        self.faults: list[str] = []
        self._say = say
        self._port = _find_port()
        self._marks = {city: secrets.token_hex(16) for city in CITIES}

    def hold(self) -> list[str]:
        """Hold it and return what was not as it has to be.

        Raises:
            RehearsalError: it could not be held to its end.
        """
        try:
            self._set_up()
            self._start()
            self._run()
            self._meet_strangers()
        finally:
            for end in (*self.sites.values(), self.coordinator):
                if end.processes.exists():
                    stop(end.folder)
        self._compare()
        self._search()
        return self.faults

    def _set_up(self) -> None:
        """Make all keys and packages, as coordinator and sites do, and write each site's data."""
        self.folder.mkdir(parents=True)
        base = find_project_root() / "data" / "demo" / "base_model"
        experiment = build_experiment(CITIES, Path(RUN_NAME))
        experiment["model"]["name"] = str(base)
        for section, settings in SETTINGS.items():
            experiment[section] |= settings
        experiment["data"] = dict.fromkeys(experiment["data"])
        experiment["federated"]["clients"] = [{"id": city} for city in CITIES]
        path = self.folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
        root = find_project_root()
        coordinator = create(self.coordinator.folder, HOST, self._port, path, root)
        files = generate(CITIES)
        for city, site in self.sites.items():
            request = make_request(city, site.folder)
            check_newcomer(coordinator, request)
            approve(coordinator, request)
            package, _ = open_package(self.coordinator.package(city), site.folder)
            join(package, site)
            _write_data(site, city, files, self._marks[city])
        self._say(
            f"{self.folder}: a coordinator and {len(CITIES)} sites, each with its own folder, key "
            "and data. Of the sites the coordinator knows their ids and public keys."
        )

    def _start(self) -> None:
        for folder in (self.coordinator.folder, *(site.folder for site in self.sites.values())):
            started = start_in_background(folder)
            names = ", ".join(f"{p.name} {p.pid}" for p in started)
            self._say(f"{folder.name}: started ({names}).")
        self._wait("all sites to be online", self._are_online, START_SECONDS)

    def _are_online(self) -> bool:
        nodes = list_nodes(self.coordinator, self._port)
        return sum(node.status == "online" for node in nodes) == len(CITIES)

    def _run(self) -> None:
        """Run the round, and disturb it once the site that is to be killed has begun to train."""
        log = self.folder / "run.log"
        command = [sys.executable, "-P", "-m", "fedlora_app.cli", "deploy", "run"]
        command += [str(self.coordinator.folder), "--name", RUN_NAME]
        command += ["--output-dir", str(self._results)]
        with log.open("w", encoding="utf-8") as file:
            run = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            self._wait(
                f"{KILLED} to train",
                lambda: self._has_begun(KILLED) or run.poll() is not None,
                RUN_SECONDS,
            )
            if run.poll() is not None:
                raise RehearsalError(f"The run ended before it could be disturbed; see {log}.")
            self._kill()
            self._pause()
            start_in_background(self.sites[KILLED].folder)
            self._say(f"{KILLED}: started again, with the same key.")
            self._wait("the end of the round", lambda: run.poll() is not None, RUN_SECONDS)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGINT)
                run.wait()
        text = log.read_text(encoding="utf-8")
        for line in text.splitlines():
            if any(
                line.startswith((f"{city}: its SuperNode", f"round 1: {city}")) for city in CITIES
            ):
                self._say(f"coordinator saw: {line}")
        self._expect(run.returncode == 0, "The round is complete.", f"The run failed; see {log}.")
        sent = [
            entry
            for entry in read_log(self.coordinator.evidence).entries
            if (entry["event"], entry.get("kind"), entry.get("client")) == (SENT, "train", KILLED)
        ]
        self._expect(
            len(sent) > 1,
            f"{KILLED} was asked to train again, and its update counts.",
            f"{KILLED} was killed too late: it had trained already, and nothing was lost.",
        )

    def _has_begun(self, city: str) -> bool:
        return any(
            entry["event"] == RECEIVED and entry.get("kind") == "train"
            for entry in _read_entries(self.sites[city])
        )

    def _kill(self) -> None:
        started = read_started(self.sites[KILLED].processes)
        for process in started.alive if started else []:  # first what would start the others again
            signal_session(process.pid, signal.SIGKILL)
        self._wait(f"{KILLED} to end", lambda: not (started and started.alive), START_SECONDS)
        self._say(f"{KILLED}: killed while it trained.")

    def _pause(self) -> None:
        started = read_started(self.sites[PAUSED].processes)
        paused = started.alive if started else []
        for process in paused:
            signal_session(process.pid, signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        for process in paused:
            signal_session(process.pid, signal.SIGCONT)
        self._say(f"{PAUSED}: stood still for {PAUSE_SECONDS:g} seconds.")

    def _meet_strangers(self) -> None:
        """Knock with a key that nobody approved, from another address, and in the clear."""
        stranger = SiteFolder(self.folder / STRANGER)
        make_request(STRANGER, stranger.folder)
        said = self._knock(stranger)
        self._expect(
            said is not None,
            f"{STRANGER}: its SuperNode, with a key of its own making, was refused: {said}",
            f"{STRANGER}: a key that nobody approved was not refused.",
        )
        certificate = ssl.create_default_context(cafile=str(self.coordinator.root_certificate))
        transport = httpx.HTTPTransport(verify=certificate, local_address=ELSEWHERE)
        with httpx.Client(transport=transport) as client:
            answer = client.post(f"https://{HOST}:{self._port}/v1/control/list-runs")
        self._expect(
            answer.status_code == httpx.codes.FORBIDDEN,
            f"{ELSEWHERE}: may not list or start runs: {answer.text.strip()}",
            f"{ELSEWHERE}: the Control API answered with {answer.status_code}.",
        )
        try:
            httpx.get(f"http://{HOST}:{self._port}/health")
            is_open = True
        except httpx.HTTPError:
            is_open = False
        self._expect(
            not is_open,
            "Without TLS nothing is answered.",
            "The SuperLink answers without TLS.",
        )

    def _knock(self, stranger: SiteFolder) -> str | None:
        """Return the last words of a SuperNode that was refused; None if it was let in."""
        command = [str(Path(sys.executable).with_name("flower-supernode"))]
        command += ["--superlink", f"{HOST}:{self._port}", "--port", str(_find_port())]
        command += ["--root-certificates", str(self.coordinator.root_certificate)]
        command += ["--auth-supernode-private-key", str(stranger.key), "--max-retries", "0"]
        command += ["--isolation", "process"]  # else a child of it keeps its output open
        try:
            ended = subprocess.run(
                command,
                env=build_environment(stranger),
                capture_output=True,
                text=True,
                timeout=REFUSED_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return None
        lines = [line.strip() for line in (ended.stdout + ended.stderr).splitlines()]
        told = [line for line in lines if "code:" in line or "401" in line]
        return (told or lines or ["no word"])[-1]

    def _compare(self) -> None:
        """Lay each site's log beside the coordinator's, and say what each end saw."""
        server, known = read_log(self.coordinator.evidence), len(self.faults)
        for name, site in self.sites.items():
            log = read_log(site.evidence)
            comparison = compare_logs(server, log)
            counts = {
                event: sum(entry["event"] == event for entry in log.entries)
                for event in (RECEIVED, SENT)
            }
            self._say(f"{name} saw: {counts[RECEIVED]} messages come and {counts[SENT]} go.")
            for fault in (log.fault, *comparison.contradictions):
                if fault is not None:
                    self.faults.append(f"{name}: {fault}")
        if server.fault is not None:
            self.faults.append(f"coordinator: {server.fault}")
        self._expect(
            len(self.faults) == known,
            "The logs of both ends are whole and say the same.",
            "The logs of both ends are not whole, or do not say the same.",
        )

    def _search(self) -> None:
        """Look for what is the sites' own on the coordinator's disk, and for the result."""
        paths = RunPaths(self._results / RUN_NAME)
        self._expect(
            paths.final_global.is_dir(),
            f"The global adapter is in {paths.final_global}.",
            f"{paths.final_global} is missing.",
        )
        marks = [mark.encode() for mark in self._marks.values()]
        places = [self.coordinator.folder, self._results]
        found = [
            path
            for place in places
            for path in place.rglob("*")
            if path.is_file() and any(mark in path.read_bytes() for mark in marks)
        ]
        has_locals = paths.clients.exists() or paths.final_locals.exists()
        self._expect(
            not found and not has_locals,
            "No local adapter, and nothing of the sites' data and prompts, is on the coordinator's "
            "disk.",
            f"The coordinator's disk holds what is the sites' own: {found or paths.clients}.",
        )

    @property
    def _results(self) -> Path:
        return (self.folder / "results").resolve()

    def _expect(self, is_so: bool, told: str, fault: str) -> None:
        self._say(told if is_so else f"FAULT: {fault}")
        if not is_so:
            self.faults.append(fault)

    def _wait(self, what: str, is_so: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise RehearsalError(
                    f"Waited {seconds:g} seconds for {what}. The logs are in {self.folder}/*/logs."
                )
            time.sleep(POLL_SECONDS)


def _write_data(
    site: SiteFolder, city: str, files: dict[str, list[dict[str, Any]]], mark: str
) -> None:
    """Write a few of a city's records and questions, and the file that names them.

    Args:
        mark: stands in every record that is its own, and in its prompt, to be looked for.
    """
    names = {
        "local_train": f"{city}/local_train.json",
        "local_test": f"{city}/local_test.json",
        "local_validation": f"{city}/local_validation.json",
        "universal_train": f"{city}/universal_train.json",
    }
    shared = {
        "universal_test": "universal_test.json",
        "universal_validation": "universal_validation.json",
        "conflict_test": "conflict_test.json",
        "conflict_validation": "conflict_validation.json",
    }
    for key, name in (names | shared).items():
        path = site.folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        most = NUM_RECORDS if key.endswith("_train") else NUM_QUESTIONS
        records = files[name][:most]
        if key.startswith("local"):
            records = [r | {"output": f"{r['output']} ({mark})"} for r in records]
        path.write_text(json.dumps(records), encoding="utf-8")
    client = {
        "id": city,
        "system_prompt": f"You are the assistant of {city}, {mark}.",
        **{key: f"data/{name}" for key, name in names.items()},
        "data": {key: f"data/{name}" for key, name in shared.items()},
    }
    site.client_file.write_text(yaml.safe_dump(client, sort_keys=False), encoding="utf-8")


def _read_entries(site: SiteFolder) -> Iterator[dict[str, Any]]:
    if site.evidence.exists():
        yield from read_log(site.evidence).entries


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
