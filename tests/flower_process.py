"""Flower's commands as users start them, with a home and a daemon of their own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from loopback import wait_until

ROOT = Path(__file__).resolve().parents[1]
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
