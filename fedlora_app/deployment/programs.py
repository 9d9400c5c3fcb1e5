"""What runs at each end of a deployment: Flower's processes, their arguments and environment."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder
from fedlora_app.deployment.logs import READY, read_since_start
from fedlora_app.deployment.processes import ProcessesError
from fedlora_app.deployment.proxies import spare_loopback
from fedlora_app.deployment.record import EVIDENCE_VARIABLE
from fedlora_app.foundation.files import make_private_dir
from fedlora_app.foundation.terminal import shell

LOOPBACK = "127.0.0.1"
ALL_ADDRESSES = "0.0.0.0"
SECRET_BYTES = 32
HERE = Path(sys.executable).parent  # of this environment, whatever PATH says


@dataclass(frozen=True)
class Program:
    """A process to start and to keep running."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    is_ready: Callable[[], bool] = field(default=lambda: True, compare=False)
    """Whether what comes after it can be started."""
    explain_end: Callable[[], str | None] = field(default=lambda: None, compare=False)
    """Why it is not to be started again, once it has ended; None where it is."""


@dataclass(frozen=True)
class End:
    """One end of a deployment: its folder and what runs there, in the order of starting."""

    folder: CoordinatorFolder | SiteFolder
    programs: tuple[Program, ...]
    when_ready: Callable[[], list[str]] = field(default=list, compare=False)
    """Is called once all have started; returns lines for the log."""


def find_folder(folder: Path) -> CoordinatorFolder | SiteFolder:
    """Return whose folder it is.

    Raises:
        ProcessesError: it is neither a coordinator's nor that of a site that has joined.
    """
    coordinator, site = CoordinatorFolder(folder.resolve()), SiteFolder(folder.resolve())
    if coordinator.settings.exists():
        return coordinator
    if site.package_facts.exists():
        return site
    if site.request.exists():
        raise ProcessesError(
            f"{folder} has asked and not joined yet. When the coordinator's package has come: "
            f"fedlora deploy join PACKAGE --site {shell(folder)}"
        )
    raise ProcessesError(
        f"{folder} is neither a coordinator's folder (with {coordinator.settings.name}) nor a "
        f"site's (with package/{site.package_facts.name}). Name the folder of fedlora deploy init "
        "or of fedlora deploy request."
    )


def plan_end(folder: Path) -> End:
    """Return what is to run for a folder; secrets that it needs are made.

    Raises:
        UserError: the folder is incomplete.
    """
    found = find_folder(folder)
    return _plan_site(found) if isinstance(found, SiteFolder) else _plan_coordinator(found)


def build_environment(end: CoordinatorFolder | SiteFolder) -> dict[str, str]:
    """Return the variables of Flower's processes: a home of their own, nothing to install.

    An executor and a ServerApp reach Flower at this machine's loopback, and by no proxy.
    """
    spare_loopback()
    # Flower looks for its other commands on PATH, where systemd and cron do not have them.
    paths = [str(HERE), *filter(None, [os.environ.get("PATH")])]
    return {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "FLWR_HOME": str(end.flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",  # a log is to be read while it is written
        EVIDENCE_VARIABLE: str(end.evidence),
    }


def is_listening(address: tuple[str, int]) -> bool:
    """Return whether a port of this machine takes connections."""
    with socket.socket() as connection:
        connection.settimeout(1.0)
        return connection.connect_ex(address) == 0


def _plan_coordinator(folder: CoordinatorFolder) -> End:
    from fedlora_app.deployment.coordinator import (
        DEPLOYMENT_VARIABLE,
        load_coordinator,
        register_pending,
    )

    coordinator = load_coordinator(folder.folder)
    host, port = coordinator.settings.host, coordinator.settings.port
    superlink = Program(
        "superlink",
        (
            *_python("fedlora_app.deployment.superlink"),
            *("--host", _choose_interface(host), "--port", str(port)),
            *("--ssl-certfile", str(folder.certificate), "--ssl-keyfile", str(folder.key)),
            *("--ssl-ca-certfile", str(folder.root_certificate)),
            "--enable-supernode-auth",
            *("--database", str(folder.database)),
        ),
        build_environment(folder) | {DEPLOYMENT_VARIABLE: str(folder.folder)},
        is_ready=lambda: coordinator.is_running,
    )
    return End(folder, (superlink,), when_ready=lambda: register_pending(folder.folder))


def _plan_site(folder: SiteFolder) -> End:
    from fedlora_app.deployment.site_checks import explain_end

    _require_files(folder)
    if not folder.executor_secret.exists():
        _write_secret(folder.executor_secret)
    make_private_dir(folder.flower_home)
    facts = json.loads(folder.package_facts.read_text(encoding="utf-8"))
    port = _find_port()
    environment = build_environment(folder)
    secret = ("--superexec-auth-secret-file", str(folder.executor_secret))
    # In TOML, of which JSON's strings are a part. Flower splits at blanks outside of quotes.
    node_config = f"client-file={json.dumps(str(folder.client_file), ensure_ascii=False)}"
    supernode = Program(
        "supernode",
        (
            str(HERE / "flower-supernode"),
            *("--superlink", facts["address"]),
            *("--root-certificates", str(folder.root_certificate)),
            *("--auth-supernode-private-key", str(folder.key)),
            *("--isolation", "process", "--host", LOOPBACK, "--port", str(port), *secret),
            *("--node-config", node_config),
        ),
        environment,
        is_ready=lambda: is_listening((LOOPBACK, port)),
        explain_end=lambda: explain_end(folder),
    )
    executor = Program(
        "executor",
        (
            *_python("fedlora_app.deployment.executor"),
            *("--runtime-api-address", f"{LOOPBACK}:{port}", *secret),
            *("--client-file", str(folder.client_file)),
        ),
        environment,
        is_ready=lambda: READY in read_since_start(folder.logs / "executor.log"),
    )
    return End(folder, (supernode, executor))


def _python(module: str) -> tuple[str, ...]:
    """Return how to run a module of the installed package, whatever the working directory holds."""
    return (sys.executable, "-P", "-m", module)


def _choose_interface(host: str) -> str:
    """Return where the SuperLink listens, by the name under which sites reach it."""
    if host in (LOOPBACK, "localhost"):  # a rehearsal, which no other machine is to reach
        return LOOPBACK
    return "::" if ":" in host else ALL_ADDRESSES


def _require_files(folder: SiteFolder) -> None:
    needed = {
        folder.key: "fedlora deploy request makes it",
        folder.root_certificate: "it comes with the coordinator's package",
        folder.client_file: "fedlora deploy join writes a draft, which you complete",
    }
    missing = [f"{path} is missing: {how}." for path, how in needed.items() if not path.exists()]
    if missing:
        raise ProcessesError("\n".join(missing))


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _write_secret(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
