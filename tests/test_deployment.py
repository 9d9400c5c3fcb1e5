"""The app on Flower's own servers and nodes, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress

import pytest
from deployment.sites import build_bare_config, make_site
from flower_process import BIN, free_port
from loopback import wait_until

from fedlora_app.deployment.audit import compare_logs, read_log
from fedlora_app.deployment.record import EVIDENCE_VARIABLE


@pytest.mark.minutes
@pytest.mark.deployment
@pytest.mark.parametrize("has_own_files", [False, True])
def test_the_same_app_on_a_superlink_with_two_supernodes(
    flower, tiny_experiment, tmp_path, has_own_files
):
    """With files of their own the clients are named by their ids alone, and all served at once."""
    port, started = free_port(), []

    name = f"loopback{port}"

    def start(end: str, *command: str) -> None:
        log = (tmp_path / f"{len(started)}.log").open("w")
        started.append(
            subprocess.Popen(
                [BIN / command[0], *command[1:]],
                env=flower.env | {EVIDENCE_VARIABLE: str(tmp_path / f"{end}.jsonl")},
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    project = tiny_experiment.parent
    experiment, nodes = tiny_experiment, {}
    for client in ("bob", "ann"):
        nodes[client] = (
            f'client-id="{client}" project-dir="{project}" output-dir="{tmp_path / client}"'
        )
    if has_own_files:
        config = build_bare_config(federated={"clients_at_once": 0}, adapters={"gate": "prompt"})
        experiment = project / "bare.yaml"
        experiment.write_text(json.dumps(config.dump()))
        for client in nodes:
            path = make_site(project, tmp_path / client, client, store=".")
            path.with_name("policy.yaml").write_text("rounds: 1\nparticipants: [ann, bob]\n")
            nodes[client] = f'client-file="{path}"'
    try:
        address = ("--host", "127.0.0.1", "--port", str(port))
        start("server", "flower-superlink", "--insecure", *address)
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        time.sleep(2)
        for client, node_config in nodes.items():
            start(
                client,
                "flower-supernode",
                "--insecure",
                "--superlink",
                f"127.0.0.1:{port}",
                "--port",
                str(free_port()),
                "--node-config",
                node_config,
            )
        with (flower.home / "config.toml").open("a") as config:
            config.write(f'\n[superlink.{name}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
        output = flower.run(
            ".",
            name,
            run_config=f"config='{experiment}' num-rounds=1 run-name='deployed' "
            f"output-dir='{tmp_path / 'server'}' overrides='adapters.gate=prompt'",
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
    assert not [path for path in server.rglob("*") if "gate" in path.name]
    assert "gate/opens_for_local" in (server / "history.csv").read_text()
    for client, other in (("ann", "bob"), ("bob", "ann")):
        folder = tmp_path / client / "deployed" / "clients"
        assert (folder / client / "round_001" / "adapter_model.safetensors").exists()
        assert (folder / client / "gate" / "gate.safetensors").exists()
        assert not (folder / other).exists()
        # What Flower carried is what either end says that it sent and received.
        logs = [read_log(tmp_path / f"{end}.jsonl") for end in ("server", client)]
        assert [log.fault for log in logs] == [None, None]
        comparison = compare_logs(*logs)
        assert (comparison.contradictions, comparison.undelivered) == ([], [])
        assert comparison.num_agreed == (8 if has_own_files else 10)  # or asks for its settings
