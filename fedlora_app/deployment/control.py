"""Start, look at and stop what runs at one end of a deployment."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fedlora_app.deployment.layout import CoordinatorFolder
from fedlora_app.deployment.logs import read_tail, rotate
from fedlora_app.deployment.processes import (
    STOP_SECONDS,
    KnownProcess,
    ProcessesError,
    end,
    read_started,
)
from fedlora_app.deployment.programs import build_environment, find_folder, plan_end
from fedlora_app.deployment.supervisor import (
    REPLY_SECONDS,
    SUPERVISOR,
    refuse_leftovers,
)
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import is_locked, make_private_dir

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
POLL_SECONDS = 0.2


def start_in_background(folder: Path) -> list[KnownProcess]:
    """Start an end's processes and return them once they answer.

    Raises:
        UserError: they run already, or one of them did not start; then none is left.
    """
    end_files = plan_end(folder).folder  # what is missing is said here and not in a log
    refuse_leftovers(end_files.processes, folder)
    if is_locked(end_files.folder):
        raise ProcessesError(f"{folder} is being started or stopped by another process.")
    end_files.processes.unlink(missing_ok=True)
    make_private_dir(end_files.logs)
    log = end_files.logs / f"{SUPERVISOR}.log"
    rotate(log, is_open=False)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedlora_app.deployment.supervisor", str(folder)],
            env=build_environment(end_files),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    while process.poll() is None:
        started = read_started(end_files.processes)
        if started is not None and started.state == "running":
            return list(started.processes)
        time.sleep(POLL_SECONDS)
    failed = read_started(end_files.processes)
    why = failed.why if failed is not None and failed.why else read_tail(log, 10)
    raise ProcessesError(f"{folder} could not be started. {why}")


def stop(folder: Path) -> list[str]:
    """End an end's processes in order and return the names of those that ran; none is no fault."""
    files = find_folder(folder)
    started = read_started(files.processes)
    if started is None:
        return []
    supervisors = [p for p in started.processes if p.name == SUPERVISOR]
    others = [p for p in started.processes if p.name != SUPERVISOR]
    ran = [process.name for process in started.alive]
    # It ends the others in order, each with a time of its own, and starts none again meanwhile.
    end(supervisors, (len(others) + 1) * (STOP_SECONDS + REPLY_SECONDS))
    later = read_started(files.processes)  # it may have started one again before it ended
    end(reversed([p for p in (later or started).processes if p.name != SUPERVISOR]))
    files.processes.unlink(missing_ok=True)
    return ran


def describe_status(folder: Path) -> Iterator[str]:
    """Yield lines on what runs since when, with the last line of its log, and who is online."""
    files = find_folder(folder)
    started = read_started(files.processes)
    if started is None or not started.processes:
        why = f" What was started last has failed. {started.why}" if started is not None else ""
        yield f"{folder}: nothing runs.{why}"
        return
    for process in started.processes:
        log = files.logs / f"{process.name}.log"
        yield f"{process.name}: {_describe_process(process)}"
        if said := COLOURS.sub("", read_tail(log)):
            yield f"  {said}"
    if isinstance(files, CoordinatorFolder):
        yield from _describe_sites(files)


def _describe_process(process: KnownProcess) -> str:
    if not process.is_alive:
        return f"ended (process {process.pid}, started {process.since} UTC)"
    again = f", restarts: {process.num_restarts}" * (process.num_restarts > 0)
    return f"running since {process.since} UTC (process {process.pid}{again})"


def _describe_sites(folder: CoordinatorFolder) -> Iterator[str]:
    from fedlora_app.deployment.coordinator import load_coordinator
    from fedlora_app.deployment.registry import list_nodes

    coordinator = load_coordinator(folder.folder)
    try:
        nodes = list_nodes(folder, coordinator.settings.port)
    except UserError as error:
        yield f"sites: {error}"
        return
    status = {node.fingerprint: node.status for node in nodes}
    for site, entry in coordinator.settings.sites.items():
        said = status.get(entry.fingerprint, "not registered") if entry.fingerprint else ""
        yield f"site {site}: {entry.status}{f', {said}' if said else ''}"
