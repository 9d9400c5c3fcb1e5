"""Real runs: ``flwr run`` with its daemon, Ray workers and a deployment on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, build_tiny_config
from federation import wait_until

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def processes_with(argument: str) -> list[int]:
    """Ids of the processes that were started with this argument."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if argument in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
    return found


class Flower:
    """The ``flwr`` command with a home and a daemon of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.env = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "7",  # no such GPU; it must reach the worker all the same
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.env.pop("FEDLORA_PROJECT_DIR", None)

    def run(self, *arguments: str, cwd: Path = ROOT, run_config: str = "") -> str:
        config = ["--run-config", run_config] if run_config else []
        result = subprocess.run(
            [BIN / "flwr", "run", *arguments, *config, "--stream"],
            cwd=cwd,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout + result.stderr)

    def stop(self) -> None:
        for pid in processes_with(str(self.port)):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not processes_with(str(self.port)))


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    flower = Flower(tmp_path_factory.mktemp("flwr"))
    yield flower
    flower.stop()


@pytest.fixture(scope="module")
def tiny_experiment(tiny_project) -> Path:
    path = tiny_project / "flower.yaml"
    path.write_text(json.dumps(build_tiny_config().dump()))
    return path


def events(run: Path, name: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_run_started_from_a_foreign_folder(flower, tiny_experiment, tiny_project, tmp_path):
    """Its results lie in the project and every message reached one process with one load."""
    output = flower.run(
        str(ROOT),
        cwd=tmp_path,
        run_config=f"config='{tiny_experiment}' run-name='foreign' num-rounds=3",
    )
    run = tiny_project / "results" / "foreign"
    assert run.is_dir(), output
    assert output.count(f"Run directory: {run}") == 2, output
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["round"] for entry in manifest["rounds"]] == [0, 1, 2, 3]
    processes = {event["process"] for event in events(run, "facts")}
    assert len(processes) == 1 and "base model loaded 1 times" in processes.pop()
    assert (tiny_project / "results" / "latest").resolve() == run
    assert not list(tmp_path.iterdir())
    assert "global + own local" in output and "round 3/3" in output
    assert output.count("CUDA_VISIBLE_DEVICES is '7'") == 2, output


def test_run_config_keys_do_what_they_say(flower, tiny_experiment, tmp_path):
    output = flower.run(
        ".",
        run_config=f"config='{tiny_experiment}' mode='local-only' output-dir='{tmp_path}' "
        "run-name='named' overrides='training.learning_rate=1e-4 adapters.local.rank=3' "
        "num-rounds=1",
    )
    run = tmp_path / "named"
    assert run.is_dir(), output
    config = json.loads((run / "config.json").read_text())
    assert config["federated"]["mode"] == "local-only"
    assert config["federated"]["num_rounds"] == 1
    assert config["training"]["learning_rate"] == 1e-4
    folder = run / "final" / "clients" / "ann"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3


def test_another_number_of_nodes_stops_with_the_line_that_mends_it(flower, tiny_experiment):
    output = flower.run(
        ".", "--federation-config", "num-supernodes=3", run_config=f"config='{tiny_experiment}'"
    )
    assert "The federation has 3 nodes and federated.clients names 2." in output
    line = 'flwr run . --stream --federation-config "num-supernodes=2" --run-config '
    assert f"{line}\"config='{tiny_experiment}'\"" in output


def test_a_bad_configuration_is_one_clear_error(flower, tiny_experiment):
    output = flower.run(
        ".",
        run_config=f"config='{tiny_experiment}' mode='duel' overrides='training.epoch=1'",
    )
    assert "has 2 faults" in output
    assert "federated.mode" in output and "training.epoch: unknown key" in output


@pytest.mark.slow
def test_a_study_runs_what_is_missing_and_evaluates_it(flower, tiny_experiment, tmp_path):
    path = tmp_path / "study.yaml"
    study = {
        "name": "tiny-study",
        "config": str(tiny_experiment),
        "seeds": [1],
        "overrides": "federated.num_rounds=1",
        "variants": {"pair": "", "one": "federated.mode=fedavg"},
    }
    path.write_text(json.dumps(study))
    folder = tmp_path / "results" / "tiny-study"

    def run() -> str:
        result = subprocess.run(
            [BIN / "fedlora", "study", path, "--output-dir", tmp_path / "results"],
            env=flower.env | {"FEDLORA_PROJECT_DIR": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    output = run()
    assert "| pair | global + own local |" in output and "| one | global alone |" in output
    assert json.loads((folder / "summary.json").read_text())["figures"].keys() == {"pair", "one"}
    kept = (folder / "pair-seed1" / "manifest.json").stat().st_mtime_ns
    evaluated = (folder / "pair-seed1" / "evaluation.json").stat().st_mtime_ns
    manifest = json.loads((folder / "one-seed1" / "manifest.json").read_text())
    (folder / "one-seed1" / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    assert "one-seed1 is unfinished, or" in run()  # as after a stop in the middle of that run
    assert (folder / "pair-seed1" / "manifest.json").stat().st_mtime_ns == kept
    assert (folder / "pair-seed1" / "evaluation.json").stat().st_mtime_ns == evaluated


@pytest.mark.deployment
def test_the_same_app_on_a_superlink_with_two_supernodes(flower, tiny_experiment, tmp_path):
    port, started = free_port(), []

    def start(*command: str) -> None:
        log = (tmp_path / f"{len(started)}.log").open("w")
        started.append(
            subprocess.Popen(
                [BIN / command[0], *command[1:]],
                env=flower.env,
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    project = tiny_experiment.parent
    try:
        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        time.sleep(2)
        for client in ("bob", "ann"):
            start(
                "flower-supernode",
                "--insecure",
                "--superlink",
                f"127.0.0.1:{port}",
                "--port",
                str(free_port()),
                "--node-config",
                f'client-id="{client}" project-dir="{project}" output-dir="{tmp_path / client}"',
            )
        with (flower.home / "config.toml").open("a") as config:
            config.write(f'\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
        output = flower.run(
            ".",
            "loopback",
            run_config=f"config='{tiny_experiment}' num-rounds=1 run-name='deployed' "
            f"output-dir='{tmp_path / 'server'}'",
        )
    finally:
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(timeout=30)
    logs = "".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("*.log")))
    server = tmp_path / "server" / "deployed"
    assert (server / "manifest.json").exists(), output + logs
    manifest = json.loads((server / "manifest.json").read_text())
    assert [entry["round"] for entry in manifest["rounds"]] == [0, 1], output + logs
    assert not (server / "clients").exists()  # a client's folder is on the client's side
    for client, other in (("ann", "bob"), ("bob", "ann")):
        folder = tmp_path / client / "deployed" / "clients"
        assert (folder / client / "round_001" / "adapter_model.safetensors").exists()
        assert not (folder / other).exists()
