"""Runs that are killed at random moments and continued end in the bytes of an undisturbed one.

``pytest -m killtest`` (a quarter of an hour). The first test kills real server and client code in
one process, half of the times exactly at a file operation or message and half after a random time;
the second kills Flower's daemon with its simulation; the third kills or halts its worker, which
must cost no more than one client's part in one round.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import build_tiny_config
from flower_process import Flower, processes_with
from loopback import wait_until
from test_resuming import snapshot

from fedlora_app.config.loading import load_config

pytestmark = pytest.mark.killtest

NUM_KILLS = int(os.getenv("FEDLORA_KILLS", "50"))
KILLS_PER_RUN = 5
CHILD = Path(__file__).parents[1] / "killed_run.py"


def start(project: Path, output_dir: Path, kind: str = "none", number: int = 0):
    command = [sys.executable, CHILD, project, output_dir, kind, str(number)]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for the end by itself; return the last line."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output.splitlines()[-1]


def kill_once(process: subprocess.Popen, after: float | None) -> str | None:
    """Wait for a kill, or kill after some seconds; return where, or None if it ended before."""
    output = ""
    if after is not None:
        time.sleep(after)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            output = f"time: after {after:.1f} s"
    output = process.communicate(timeout=300)[0] + output
    if process.returncode == 0:
        return None
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    return output.splitlines()[-1]


def is_finished(run: Path) -> bool:
    manifest = run / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["finished"] is not None


def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bytes(tiny_project, tmp_path):
    started = time.monotonic()
    num_files, num_messages = map(int, finish(start(tiny_project, tmp_path / "whole")).split())
    seconds = time.monotonic() - started
    expected = snapshot(tmp_path / "whole" / "run")
    rng, places, number = random.Random(2026), [], 0
    while len(places) < NUM_KILLS:
        number += 1
        output_dir = tmp_path / f"run{number}"
        for _ in range(KILLS_PER_RUN):
            kind = rng.choice(("file", "message", "time"))
            count = {"file": num_files, "message": num_messages, "time": 1}[kind]
            process = start(tiny_project, output_dir, kind, rng.randint(1, count))
            place = kill_once(process, rng.uniform(0, seconds) if kind == "time" else None)
            if place is None:
                break
            places.append(place)
            if is_finished(output_dir / "run"):  # killed when all was written
                break
        else:
            finish(start(tiny_project, output_dir))
        assert snapshot(output_dir / "run") == expected, places
        assert not list((output_dir / "run").rglob(".*.partial"))
    print(f"{len(places)} kills in {number} runs:", *sorted(places), sep="\n  ")
    assert {place.partition(":")[0] for place in places} == {"file", "message", "time"}


def test_flower_s_daemon_and_simulation_are_killed(tmp_path):
    """The demo, cut short, under ``flwr run``: all of it is killed, and the run goes on."""
    settings = "num-rounds=2 overrides='training.global_epochs=1 evaluation.max_new_tokens=4'"
    rng, homes = random.Random(7), iter(range(100))

    def launch(name: str, stop_after: float | None) -> None:
        flower = Flower(tmp_path / f"home{next(homes)}")
        output = tmp_path / name
        resume = "resume='run'" if (output / "run").is_dir() else "run-name='run'"
        config = f"{settings} output-dir='{output}' {resume}"
        try:
            process = subprocess.Popen(
                [
                    Path(sys.executable).parent / "flwr",
                    "run",
                    ".",
                    "--run-config",
                    config,
                    "--stream",
                ],
                cwd=CHILD.parents[1],
                env=flower.env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            process.wait(timeout=stop_after or 300)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            for pid in family(processes_with(str(flower.port))):
                os.kill(pid, signal.SIGKILL)

    launch("whole", None)
    expected = snapshot(tmp_path / "whole" / "run")
    for _ in range(3):
        launch("killed", rng.uniform(15, 40))
    launch("killed", None)
    assert snapshot(tmp_path / "killed" / "run") == expected
    assert load_config(tmp_path / "killed" / "run" / "config.json").federated.num_rounds == 2


@pytest.mark.parametrize("required", [1, None], ids=["one-required", "all-required"])
@pytest.mark.parametrize(
    "signal_number, why",
    [
        (signal.SIGKILL, "its worker process died"),
        (signal.SIGSTOP, r"no answer within 30 seconds \(federated.client_timeout_seconds\)"),
    ],
    ids=["killed", "halted"],
)
def test_a_lost_worker_costs_one_client_its_round(
    signal_number, why, required, tiny_project, tmp_path
):
    """Ray's only worker dies or hangs while a client trains and others may wait in line."""
    federated = {
        "num_rounds": 2,
        "clients_at_once": 2,
        "client_timeout_seconds": 30,
        "min_clients": required,
    }
    clients = ("ann", "bob", "cy")
    config = build_tiny_config(clients, federated=federated, training={"global_epochs": 30})
    path = tiny_project / "lost_worker.yaml"
    path.write_text(json.dumps(config.dump()))
    resources = "num-supernodes=3 init-args-num-cpus=2 client-resources-num-cpus=2"
    flower, log = Flower(tmp_path / "home"), tmp_path / "log"
    command = [Path(sys.executable).parent / "flwr", "run", ".", "--stream"]
    settings = f"config='{path}' output-dir='{tmp_path}' run-name='run'"
    workers: list[int] = []
    try:
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, "--federation-config", resources, "--run-config", settings],
                cwd=CHILD.parents[1],
                env=flower.env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            wait_until(lambda: completed_rounds(tmp_path / "run") == [0], seconds=150)
            time.sleep(0.3)  # the log comes later than that
            workers = [p for p in family(processes_with(str(flower.port))) if is_worker(p)]
            for pid in workers:
                os.kill(pid, signal_number)
            process.wait(timeout=240)
    finally:
        for pid in family(processes_with(str(flower.port))):
            os.kill(pid, signal.SIGKILL)
    assert len(workers) == 1
    text = log.read_text()
    missing = re.findall(rf"^ *round 1: (\w+): {why}", text, re.MULTILINE)
    assert len(missing) == 1, text[-3000:]
    if required is None:
        assert (
            "2 of 3 clients returned valid results and 3 are required (federated.min_clients)"
            in text
        )
        assert re.search(rf"required.*\n  {missing[0]}: {why}.*\n.* is untouched", text), text
        assert completed_rounds(tmp_path / "run") == [0]
        return
    assert completed_rounds(tmp_path / "run") == [0, 1, 2], text[-3000:]
    rounds = json.loads((tmp_path / "run" / "manifest.json").read_text())["rounds"]
    assert [list(entry.get("failures", {})) for entry in rounds] == [[], missing, []]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    trained = {
        number: {e["client"] for e in history if e["round"] == number and e["phase"] == "global"}
        for number in (1, 2)
    }
    assert trained == {1: set(clients) - set(missing), 2: set(clients)}
    failures = [(e["round"], e["client"]) for e in history if e["phase"] == "failure"]
    assert failures == [(1, missing[0])]
    assert is_finished(tmp_path / "run")
    assert not Path(f"/proc/{workers[0]}").exists()


def is_worker(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ClientAppActor")


def completed_rounds(run: Path) -> list[int]:
    if not (run / "manifest.json").exists():
        return []
    return [entry["round"] for entry in json.loads((run / "manifest.json").read_text())["rounds"]]


def family(pids: list[int]) -> list[int]:
    """Return the processes and all that they have started, Ray's among them."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = list(pids)
    for pid in found:
        found += [child for child in children.get(pid, []) if child not in found]
    return found
