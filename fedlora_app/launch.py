"""Start a run with ``flwr run``, show its log as it comes, and know how it ended.

``flwr run`` itself exits with 0 whether the run failed or not, may stop showing the log of a run in
which nothing is printed for some minutes, and shows a traceback above errors that the user can fix.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedlora_app.config.run_config import format_run_config
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import is_locked
from fedlora_app.runs.paths import RunDirectoryError

FLWR = str(Path(sys.executable).with_name("flwr"))  # of this environment, whatever PATH says
POLL_SECONDS = 5.0
STOP_SECONDS = 60.0
RESTART_SECONDS = 120.0
TRACEBACK_HEADINGS = ("Simulation raised an exception", "ServerApp raised an exception")
"""What stands in the line above the traceback that ends a failed run's log."""
EXIT_CODE = re.compile(r".*ERROR.*: +Exit Code: \d+$")
OWN_ERROR = re.compile(r"fedlora_app\.[\w.]+Error: (.*)")
"""The end of a traceback whose error is one of ours, which say what to do."""

Say = Callable[[str], None]


class RunFailedError(UserError):
    """A run with Flower did not reach its end; the message says why, as far as is known."""


def run_with_flower(
    root: Path,
    run_config: Mapping[str, Any],
    num_supernodes: int | None,
    say: Say = partial(print, flush=True),  # noqa: B008
) -> None:
    """Run the project with Flower and wait for the end.

    A ``KeyboardInterrupt`` stops the run, which would continue without us.

    Args:
        run_config: by Flower's keys; what is left out or empty stays as pyproject.toml has it.
        num_supernodes: that are simulated; None where real ones connect to the SuperLink.
        say: is given the log line by line.

    Raises:
        RunDirectoryError: Flower did not start the run.
        RunFailedError: the run failed, or somebody stopped it.
    """
    environment = _build_environment()
    command = [FLWR, "run", str(root), "--run-config", format_run_config(run_config)]
    if num_supernodes is not None:
        command += ["--federation-config", f"num-supernodes={num_supernodes}"]
    run_id = str(_call_flower(command, environment)["run-id"])
    log = LogReader(say)
    try:
        while True:
            status = _await_status(run_id, environment)  # before the log, then whole at its end
            _follow(log, run_id, environment)
            if status.startswith("finished"):
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        _stop(run_id, environment)
        raise
    error = log.close()
    if status != "finished:completed":
        end = "was stopped" if status.endswith("stopped") else "failed; its log is above"
        raise RunFailedError(error or f"The run {end}.")


class LogReader:
    """Passes a log on, without the traceback that ends a run for a reason that has a sentence."""

    def __init__(self, say: Say) -> None:
        self.num_lines = 0
        self._say = say
        self._held: list[str] = []

    def read(self, number: int, line: str) -> None:
        """Take the line of that number, from 0; one that was taken before is left out."""
        if number < self.num_lines:
            return
        self.num_lines = number + 1
        if self._held or any(heading in line for heading in TRACEBACK_HEADINGS):
            self._held.append(line)
        else:
            self._say(line)

    def close(self) -> str | None:
        """Return the sentence that ended the run; where there is none, pass on what was held."""
        starts = [n for n, line in enumerate(self._held) if OWN_ERROR.match(line)]
        if not starts:
            for line in self._held:
                self._say(line)
            return None
        first, *rest = self._held[starts[-1] :]
        ends = [n for n, line in enumerate(rest) if EXIT_CODE.match(line)] or [len(rest)]
        return "\n".join([OWN_ERROR.match(first)[1], *rest[: ends[0]]]).rstrip()


def _build_environment() -> dict[str, str]:
    """Return the variables that Flower's commands get."""
    # The command runs in an environment that holds everything; none need be made for each run.
    # Flower looks for its other commands on PATH, where cron and editors do not have them.
    paths = [str(Path(FLWR).parent), *filter(None, [os.environ.get("PATH")])]
    environment = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"} | os.environ
    environment["PATH"] = os.pathsep.join(paths)
    return environment


def _follow(log: LogReader, run_id: str, environment: dict[str, str]) -> None:
    """Read a run's log until Flower shows no more of it, which may be before its end."""
    command = [FLWR, "log", run_id, "--stream"]
    # In a session of its own, Ctrl-C reaches us and not it, which would say so in its own words.
    with subprocess.Popen(
        command,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # that it begins, each time
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            for number, line in enumerate(process.stdout or ()):
                log.read(number, line.rstrip("\n"))
        finally:
            process.terminate()


def wait_for_release(run_dir: Path) -> None:
    """Wait until a run that was stopped writes no more; Flower calls it finished before that."""
    deadline = time.monotonic() + STOP_SECONDS
    while is_locked(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)


def _stop(run_id: str, environment: dict[str, str]) -> None:
    """Stop a run and wait until Flower says that it has ended."""
    command = [FLWR, "stop", run_id]
    subprocess.run(command, check=False, env=environment, capture_output=True)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if _read_status(run_id, environment).startswith("finished"):
            return
        time.sleep(1.0)


def _await_status(run_id: str, environment: dict[str, str]) -> str:
    """Return a run's status, by a SuperLink that may just be started again."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return _read_status(run_id, environment)
        except RunDirectoryError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _read_status(run_id: str, environment: dict[str, str]) -> str:
    """Return "running", "finished:completed", "finished:failed", ..."""
    found = _call_flower([FLWR, "list", "--run-id", run_id], environment)
    return found["runs"][0]["status"]


def _call_flower(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Return what one of Flower's commands answers in JSON."""
    done = subprocess.run(
        [*command, "--format", "json"],
        check=False,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        reason = answer.get("error-message") or done.stdout.strip() or "no reason given"
        raise RunDirectoryError(f"flwr {command[1]} failed: {reason}")
    return answer
