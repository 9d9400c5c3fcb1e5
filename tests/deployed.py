"""A SuperLink on loopback without TLS, and sites of a SuperNode and an executor each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from flower_process import BIN, Flower, free_port
from loopback import wait_until

STOP_SECONDS = 30


class Deployed:
    """Processes, each in a session of its own with its output in a file; all end with it."""

    def __init__(self, flower: Flower, folder: Path) -> None:
        self.flower = flower
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str | Path) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                env=self.flower.env,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[name]

    def start_superlink(self) -> None:
        """Start it, and let ``flwr run . loopback`` find it."""
        where = ("--host", "127.0.0.1", "--port", str(self.port))
        self.start("superlink", BIN / "flower-superlink", "--insecure", *where)
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", self.port)) == 0, 60)
        with (self.flower.home / "config.toml").open("a") as config:
            address = f'address = "127.0.0.1:{self.port}"'
            config.write(f"\n[superlink.loopback]\n{address}\ninsecure = true\n")

    def start_supernode(self, client: str, node_config: str, isolation: str) -> str:
        """Return the address of its Runtime API."""
        port = str(free_port())
        secret = ("--superexec-auth-secret-file", self._secret(client))
        self.start(
            f"{client}-supernode",
            *(BIN / "flower-supernode", "--insecure", "--isolation", isolation),
            *("--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", port),
            *("--node-config", node_config, *(secret if isolation == "process" else ())),
        )
        return f"127.0.0.1:{port}"

    def start_executor(self, client: str, address: str) -> subprocess.Popen:
        module = (sys.executable, "-P", "-m", "fedlora_app.deployment.executor")
        where = ("--runtime-api-address", address)
        secret = ("--superexec-auth-secret-file", self._secret(client))
        return self.start(f"{client}-executor", *module, *where, *secret)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> None:
        """End all of them with their children, the last first."""
        for process in reversed(self.processes.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _secret(self, client: str) -> Path:
        path = self.folder / f"{client}.secret"
        if not path.exists():
            path.write_bytes(os.urandom(32))
            path.chmod(0o600)
        return path
