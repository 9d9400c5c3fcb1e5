"""``fedlora deploy start``, ``status`` and ``stop`` with Flower's processes, over TLS."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, build_tiny_config
from flower_process import BIN, free_port
from loopback import wait_until

from fedlora_app.deployment.processes import find_beginning

SITE = "ann"


class Commands:
    """``fedlora deploy`` as users type it, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [BIN / "fedlora", "deploy", *arguments],
            cwd=self.folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "FEDLORA_PROJECT_DIR": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def processes(self, end: str) -> dict[str, int]:
        """Return the ids of what runs at an end, by name."""
        started = json.loads((self.folder / end / "processes.json").read_text())
        return {process["name"]: process["pid"] for process in started["processes"]}


@pytest.fixture(scope="module")
def deploy(tiny_project, tmp_path_factory):
    """A coordinator and a site that has joined; neither is started."""
    commands = Commands(tmp_path_factory.mktemp("ends"))
    experiment = tiny_project / "deployed.yaml"
    experiment.write_text(json.dumps(build_tiny_config().dump()))
    where = ("--host", "127.0.0.1", "--port", str(free_port()))
    commands("init", *where, "--config", str(experiment), "--output", "deployment")
    commands("request", SITE)
    commands("approve", f"{SITE}/request.json", "--yes")
    commands("join", f"deployment/packages/{SITE}.zip", "--yes")
    yield commands
    for end in (SITE, "deployment"):
        commands("stop", end)


def is_running(pid: int) -> bool:
    return find_beginning(pid) is not None  # an ended one may wait for its parent for a while


@pytest.mark.minutes
@pytest.mark.deployment
def test_both_ends_are_started_kept_running_and_stopped(deploy):
    assert "Running." in deploy("start", "deployment") and "Running." in deploy("start", SITE)
    assert "running already: supervisor" in deploy("start", SITE, status=2)
    wait_until(lambda: f"site {SITE}: approved, online" in deploy("status", "deployment"), 60)
    first = deploy.processes(SITE)
    os.kill(first["executor"], signal.SIGKILL)
    wait_until(lambda: "restarts: 1" in deploy("status", SITE), 60)
    wait_until(lambda: "Ready for messages" in deploy("status", SITE), 120)
    second = deploy.processes(SITE)
    assert second["supernode"] == first["supernode"] and second["executor"] != first["executor"]
    secret = deploy.folder / SITE / "executor.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    running = [*second.values(), *deploy.processes("deployment").values()]
    assert "Stopped: supervisor, supernode, executor." in deploy("stop", SITE)
    assert re.search("nothing was running", deploy("stop", SITE))
    deploy("start", SITE)
    assert "no longer let in" in deploy("revoke", SITE)
    refused = "supernode ended: the SuperLink does not let this site's key in. Ask the coordinator"
    wait_until(
        lambda: (
            f"nothing runs. What was started last has failed. {refused}" in deploy("status", SITE)
        ),
        60,
    )
    said = (deploy.folder / SITE / "logs" / "supervisor.log").read_text()
    assert "again in" not in said.rpartition("Running.")[2]
    assert "Stopped: supervisor, superlink." in deploy("stop", "deployment")
    assert not any(map(is_running, running))
    for end in (SITE, "deployment"):
        assert "nothing runs" in deploy("status", end)
