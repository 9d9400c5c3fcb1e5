"""Keeps the processes of one end running, and ends them when it ends.

``fedlora deploy start`` has it in the background, ``--foreground`` in front. A process that ends is
started again after a pause that doubles; one that ends soon again and again ends them all, and so
does one that no other start would help (a site that was revoked). Its exit status says whether
somebody stopped it (0) or it gave up (1). A disk on which this process itself cannot write ends
nothing: what is missing is written when there is room again.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedlora_app.deployment.endings import STOPPED_IN_TASK, UNUSABLE
from fedlora_app.deployment.evidence import Evidence
from fedlora_app.deployment.happenings import END_FAILED, END_STARTED, END_STOPPED
from fedlora_app.deployment.logs import head, read_tail, rotate
from fedlora_app.deployment.processes import (
    STOP_SECONDS,
    KnownProcess,
    ProcessesError,
    Started,
    know,
    read_started,
    signal_session,
    write_started,
)
from fedlora_app.deployment.programs import End, Program, plan_end
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import keep_files_private, lock_folder, make_private_dir
from fedlora_app.foundation.project import hash_package
from fedlora_app.foundation.terminal import shell

SUPERVISOR = "supervisor"
POLL_SECONDS = 0.2
READY_SECONDS = 120.0
SOON_SECONDS = 60.0
"""A process that ends within them has ended too soon."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
MOST_SOON_ENDS = 8
"""In sum more than a minute, after which a SuperLink lets a SuperNode that was killed in again."""
REPLY_SECONDS = 2.0
"""In which a SuperNode sends the reply of an executor that was stopped in its work."""
LOOK_SECONDS = 60.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more."""

Say = Callable[[str], None]


class _Stopped(BaseException):
    """A signal asks this process to end."""


class _StartInVain(ProcessesError):
    """A process has ended, and another start would not help."""


@dataclass
class _Child:
    """A program with the process that runs it now."""

    program: Program
    log: Path
    process: subprocess.Popen[bytes]
    known: KnownProcess
    started: float
    num_soon_ends: int = 0
    due: float | None = None
    """When it is to be started again, by the monotonic clock."""


@dataclass
class Supervisor:
    """Starts an end's programs and keeps them running."""

    end: End
    say: Say
    children: list[_Child] = field(default_factory=list)
    state: str = "starting"
    why: str = ""
    has_own_words: bool = False
    """Whether why holds nothing that a log said."""
    is_asked_to_stop: bool = False
    is_kept: bool = True
    """Whether the file of what runs is as it is."""
    trouble: str = ""
    """What was said last of a full disk."""

    def __post_init__(self) -> None:
        """Let nothing end where a line cannot be said, which may go to a file as well."""
        given = self.say

        def say(line: str) -> None:
            with suppress(OSError):
                given(line)

        self.say = say

    def run(self) -> int:
        """Run until a signal comes, or a process cannot be kept running."""
        self.own = know(SUPERVISOR, os.getpid())
        previous = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start_all()
            self._watch()
        except _Stopped:
            self.say("Stopping.")
            self.state = "stopped"
        except UserError as error:
            self.state, self.why = "failed", str(error)
            self.has_own_words = isinstance(error, _StartInVain)
            self.say(f"Error: {error}")
        except OSError as error:
            self.state, self.why = "failed", f"{error.strerror or error}: {error.filename}"
            self.say(f"Error: {self.why}")
        finally:
            self._end_all()
            self._enter_end()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 0 if self.state == "stopped" else 1

    def _stop(self, _number: int, _frame: object) -> None:
        """Note a signal, which is heeded where no process is just being started."""
        self.is_asked_to_stop = True

    def _pause(self) -> None:
        time.sleep(POLL_SECONDS)
        if self.is_asked_to_stop:
            raise _Stopped

    def _start_all(self) -> None:
        for program in self.end.programs:
            self._start(program)
            self._wait(self.children[-1])
        for line in self.end.when_ready():
            self.say(line)
        Evidence(self.end.folder.evidence).add(
            END_STARTED,
            programs=[child.program.name for child in self.children],
            package_sha256=hash_package(),
        )
        self.state = "running"
        self._keep()
        self.say("Running.")

    def _start(self, program: Program) -> None:
        log = self.end.folder.logs / f"{program.name}.log"
        process = _spawn(program, log)
        known = know(program.name, process.pid)
        self.children.append(_Child(program, log, process, known, time.monotonic()))
        self._keep()
        self.say(f"{program.name}: process {process.pid}, log {log}")

    def _wait(self, child: _Child) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not child.program.is_ready():
            if child.process.poll() is not None or time.monotonic() > deadline:
                has_ended = child.process.poll() is not None
                if has_ended:
                    _refuse_in_vain(child)
                what = "ended" if has_ended else "is not ready"
                raise ProcessesError(
                    f"{child.program.name} {what} within {READY_SECONDS:g} seconds. The end of "
                    f"{child.log}:\n{read_tail(child.log, 10)}"
                )
            self._pause()

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            self._pause()
            for child in self.children:
                with self._outlasting_a_full_disk():
                    self._keep_running(child)
            if not self.is_kept:
                with self._outlasting_a_full_disk():
                    self._keep()
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                for child in self.children:
                    with self._outlasting_a_full_disk():
                        rotate(child.log, is_open=True)

    @contextmanager
    def _outlasting_a_full_disk(self) -> Iterator[None]:
        """Go on where a disk takes no more; it is said once, and tried again."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            trouble = f"{error.strerror}: {error.filename or 'a file'}. Make room; all goes on."
            if trouble != self.trouble:
                self.trouble = trouble
                self.say(trouble)

    def _keep_running(self, child: _Child) -> None:
        """Start a process again that has ended, when its pause is over."""
        now = time.monotonic()
        if child.due is None and (status := child.process.poll()) is not None:
            signal_session(child.process.pid, signal.SIGKILL)  # what it has left
            _refuse_in_vain(child)
            lived = now - child.started
            child.num_soon_ends = child.num_soon_ends + 1 if lived < SOON_SECONDS else 0
            if child.num_soon_ends >= MOST_SOON_ENDS or status == UNUSABLE:
                raise ProcessesError(
                    f"{child.program.name} ended with status {status} and cannot be kept running. "
                    f"The end of {child.log}:\n{read_tail(child.log, 10)}"
                )
            factor = 2 ** max(child.num_soon_ends - 1, 0)
            pause = min(FIRST_PAUSE_SECONDS * factor, LONGEST_PAUSE_SECONDS)
            child.due = now + pause
            self.say(f"{child.program.name} ended with status {status}; again in {pause:g} s.")
        elif child.due is not None and now >= child.due:
            child.process = _spawn(child.program, child.log)
            child.known = know(child.program.name, child.process.pid, child.known.num_restarts + 1)
            child.started, child.due = now, None
            self._keep()

    def _end_all(self) -> None:
        """End all of them, the last first."""
        for child in reversed(self.children):
            signal_session(child.process.pid, signal.SIGTERM)
            try:
                status = child.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            signal_session(child.process.pid, signal.SIGKILL)  # also what it has left
            child.process.wait()
            if status == STOPPED_IN_TASK:
                time.sleep(REPLY_SECONDS)
        with suppress(OSError):  # without room for it, the next start finds them ended
            if self.state == "failed":
                write_started(self.end.folder.processes, Started("failed", self.why, ()))
            else:
                self.end.folder.processes.unlink(missing_ok=True)

    def _enter_end(self) -> None:
        """Enter that all have ended; the ends of logs, which may quote anything, stay out."""
        event = END_STOPPED if self.state == "stopped" else END_FAILED
        fields = {"why": self.why} if self.has_own_words else {}
        try:
            Evidence(self.end.folder.evidence).add(event, **fields)
        except (OSError, UserError) as error:
            self.say(f"Not entered in the evidence: {event}. {error}")

    def _keep(self) -> None:
        known = (self.own, *(child.known for child in self.children))
        self.is_kept = False
        write_started(self.end.folder.processes, Started(self.state, "", known))
        self.is_kept = True


def supervise(folder: Path, say: Say) -> int:
    """Run one end of a deployment in this process; return the exit status.

    Raises:
        UserError: it runs already, or its folder is incomplete.
    """
    end = plan_end(folder)
    lock = lock_folder(end.folder.folder)
    if lock is None:
        raise ProcessesError(
            f"{folder} is running already. See fedlora deploy status {shell(folder)}"
        )
    with lock:
        refuse_leftovers(end.folder.processes, folder)
        make_private_dir(end.folder.logs)
        return Supervisor(end, say).run()


def refuse_leftovers(path: Path, folder: Path) -> None:
    """Raise where processes of an earlier start are still there."""
    started = read_started(path)
    if started is not None and (alive := started.alive):
        names = ", ".join(f"{process.name} ({process.pid})" for process in alive)
        raise ProcessesError(
            f"{folder} is running already: {names}. To end them: "
            f"fedlora deploy stop {shell(folder)}"
        )


def _refuse_in_vain(child: _Child) -> None:
    """Raise where it is known why a process has ended, and that another start would be in vain."""
    if (why := child.program.explain_end()) is not None:
        raise _StartInVain(f"{child.program.name} ended: {why}")


def _spawn(program: Program, log: Path) -> subprocess.Popen[bytes]:
    rotate(log, is_open=False)
    head(log)
    with log.open("ab") as file:
        return subprocess.Popen(
            program.command,
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def main() -> int:
    """Supervise the folder that is named, in the background; what is said goes to the log."""
    keep_files_private()

    def say(line: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), line, flush=True)

    try:
        return supervise(Path(sys.argv[1]), say)
    except UserError as error:
        say(f"Error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
