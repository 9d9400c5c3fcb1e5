"""What is started, kept running and ended at one end of a deployment."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
from full_disk import limit_files, no_larger_files_than
from loopback import wait_until

from fedlora_app.deployment import logs, supervisor
from fedlora_app.deployment.audit import read_log
from fedlora_app.deployment.control import describe_status, stop
from fedlora_app.deployment.endings import UNUSABLE
from fedlora_app.deployment.happenings import END_FAILED, END_STARTED, END_STOPPED
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.deployment.logs import READY, head, read_tail, rotate
from fedlora_app.deployment.processes import (
    ProcessesError,
    Started,
    end,
    find_beginning,
    know,
    read_started,
    write_started,
)
from fedlora_app.deployment.programs import (
    End,
    Program,
    build_environment,
    find_folder,
    plan_end,
)
from fedlora_app.deployment.supervisor import Supervisor, refuse_leftovers
from fedlora_app.foundation.project import hash_package

SLEEP = "import time; time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); {SLEEP}"


@pytest.fixture
def site(tmp_path) -> SiteFolder:
    """A site that has joined."""
    folder = SiteFolder(tmp_path / "ayr")
    folder.package.mkdir(parents=True)
    folder.logs.mkdir()
    folder.package_facts.write_text(json.dumps({"address": "fed.example.org:8000"}))
    for path in (folder.root_certificate, folder.key, folder.client_file):
        path.touch()
    return folder


@pytest.fixture
def spawn():
    """Start Python in a session of its own; whatever is left of it is ended."""
    started: list[subprocess.Popen] = []

    def start(code: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def program(name: str, code: str) -> Program:
    return Program(name, (sys.executable, "-c", code), os.environ)


def test_a_process_is_known_by_its_beginning(spawn):
    process = spawn(SLEEP)
    known = know("sleeper", process.pid)
    assert known.is_alive and find_beginning(process.pid) == known.began
    process.kill()
    wait_until(lambda: not known.is_alive)  # also before it is waited for
    process.wait()
    assert find_beginning(process.pid) is None


def test_another_process_of_the_same_id_is_left_alone(spawn):
    process = spawn(SLEEP)
    earlier = replace(know("superlink", process.pid), began="an earlier boot:1")
    assert not earlier.is_alive
    assert end([earlier]) == [] and process.poll() is None


def test_a_process_that_ignores_the_request_is_ended_with_its_children(spawn):
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], "
    code += f"stdout=subprocess.PIPE); p.stdout.readline(); print(p.pid, flush=True); {SLEEP}"
    parent = spawn(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {code}")
    child = know("child", int(parent.stdout.readline()))
    threading.Thread(target=parent.wait).start()  # as its own parent would
    assert end([know("stubborn", parent.pid)], seconds=0.3) == ["stubborn"]
    wait_until(lambda: not child.is_alive)


def test_stop_and_status_where_nothing_runs(site):
    folder = site.folder
    for _ in range(2):
        assert stop(folder) == []
    assert list(describe_status(folder)) == [f"{folder}: nothing runs."]
    write_started(site.processes, Started("failed", "The port is taken.", ()))
    assert "The port is taken." in next(describe_status(folder))
    assert stop(folder) == [] and not site.processes.exists()


def test_stop_ends_what_a_killed_supervisor_has_left(site, spawn):
    left, foreign = spawn(SLEEP), spawn(SLEEP)
    known = (
        replace(know("supervisor", foreign.pid), began="another"),
        know("supernode", left.pid),
    )
    write_started(site.processes, Started("running", "", known))
    (site.logs / "supernode.log").write_text("one\n\x1b[92mINFO\x1b[0m two\n\n")
    lines = list(describe_status(site.folder))
    assert lines[0].startswith("supervisor: ended") and "running since" in lines[1]
    assert lines[2] == "  INFO two"
    with pytest.raises(ProcessesError, match=f"running already: supernode .{left.pid}."):
        refuse_leftovers(site.processes, site.folder)
    threading.Thread(target=left.wait).start()
    assert stop(site.folder) == ["supernode"]
    assert left.wait() == -signal.SIGTERM and foreign.poll() is None
    assert not site.processes.exists() and stop(site.folder) == []


def test_a_damaged_list_is_not_guessed_at(site):
    site.processes.write_text('{"state": ')
    with pytest.raises(ProcessesError, match="is damaged"):
        stop(site.folder)


def test_a_site_s_programs(site):
    supernode, executor = plan_end(site.folder).programs
    assert site.executor_secret.stat().st_mode & 0o777 == 0o600
    secret = site.executor_secret.read_bytes()
    assert len(secret) == 32
    where = supernode.command[supernode.command.index("--port") + 1]
    assert f"127.0.0.1:{where}" in executor.command
    assert f'client-file="{site.client_file}"' in supernode.command
    assert "fed.example.org:8000" in supernode.command
    assert executor.environment["FLWR_HOME"] == str(site.flower_home)
    log = site.logs / "executor.log"
    for line, is_ready in ((READY, True), ("", False), (f"{READY}; code 12", True)):
        head(log)
        with log.open("a") as file:
            file.write(f"{line}\nanother line\n")
        assert executor.is_ready() == is_ready
    assert not any(str(secret) in argument for argument in (*supernode.command, *executor.command))
    plan_end(site.folder)
    assert site.executor_secret.read_bytes() == secret
    site.client_file.unlink()
    with pytest.raises(ProcessesError, match=r"client\.yaml is missing: fedlora deploy join"):
        plan_end(site.folder)


def test_a_supervisor_holds_no_torch():
    """It stays for months beside the executor, which needs the memory."""
    asked = "import sys, fedlora_app.deployment.supervisor, fedlora_app.deployment.site_checks; "
    asked += "print({'torch', 'transformers', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_what_is_started_reaches_this_machine_by_no_proxy(site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "fed.example.org")
    environment = build_environment(site)
    assert environment["NO_PROXY"].split(",")[0] == "fed.example.org"
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        asked = (
            f"import httpx; print(httpx.head('http://127.0.0.1:{server.server_port}').status_code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", asked], env=environment, capture_output=True, text=True
        )
    assert done.stdout == "200\n", done.stderr


def test_a_folder_that_is_neither_end_s(tmp_path, site):
    with pytest.raises(ProcessesError, match="is neither a coordinator's folder"):
        find_folder(tmp_path)
    site.package_facts.unlink()
    site.request.touch()
    with pytest.raises(ProcessesError, match="has asked and not joined yet"):
        find_folder(site.folder)


@pytest.fixture
def brief(monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.02)


def test_what_ends_is_started_again_and_all_end_in_order(site, brief, tmp_path):
    ended, first_try = tmp_path / "ended", tmp_path / "first try"

    def noting(name: str) -> str:
        write = f"open({str(ended)!r}, 'a').write({name + ' '!r})"
        handler = f"signal.signal(signal.SIGTERM, lambda *_: ({write}, sys.exit()))"
        return f"import signal, sys; {handler}; print('up', flush=True); {SLEEP}"

    fails_once = f"from pathlib import Path; p = Path({str(first_try)!r})\n"
    fails_once += f"if not p.exists(): p.touch(); raise SystemExit(5)\n{noting('second')}"
    programs = program("first", noting("first")), program("second", fails_once)
    said: list[str] = []
    kept = Supervisor(End(site, programs, when_ready=lambda: ["two are there"]), said.append)

    def stop_when_up() -> None:
        for each in programs:
            wait_until(lambda: read_tail(site.logs / f"{each.name}.log") == "up")  # noqa: B023
        kept.is_asked_to_stop = True

    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop_when_up)
        assert kept.run() == 0
        stopping.result()
    started, stopped = read_log(site.evidence).entries
    assert started["event"] == END_STARTED and started["programs"] == ["first", "second"]
    assert stopped["event"] == END_STOPPED and started["package_sha256"] == hash_package()
    assert "two are there" in said and any("second ended with status 5" in s for s in said)
    assert ended.read_text() == "second first "
    assert not site.processes.exists() and kept.children[1].known.num_restarts == 1
    assert not any(child.known.is_alive for child in kept.children)


def test_what_ends_again_and_again_ends_all(site, brief):
    failing = program("executor", "print('no such thing'); raise SystemExit(7)")
    said: list[str] = []
    kept = Supervisor(End(site, (program("supernode", SLEEP), failing)), said.append)
    assert kept.run() == 1
    assert said.count("executor ended with status 7; again in 0.01 s.") == 1
    assert not any(child.known.is_alive for child in kept.children)
    started = read_started(site.processes)
    assert started.state == "failed" and "no such thing" in started.why
    assert (site.logs / "executor.log").read_text().count("no such thing") == 8
    ended = read_log(site.evidence).entries[-1]
    assert ended["event"] == END_FAILED and "no such thing" not in json.dumps(ended)


def test_what_cannot_work_is_not_started_again(site, brief):
    unusable = program("executor", f"raise SystemExit({UNUSABLE})")
    kept = Supervisor(End(site, (unusable,)), lambda line: None)
    assert kept.run() == 1 and kept.children[0].known.num_restarts == 0


def test_what_says_why_it_ended_is_not_started_again(site, brief):
    """As a SuperNode whose key is revoked ends: with status 0, and no word of it."""
    asked = []

    def explain() -> str | None:
        asked.append(True)
        return "the key is not let in." if len(asked) == 3 else None

    gone = replace(program("supernode", ""), explain_end=explain)
    said: list[str] = []
    kept = Supervisor(End(site, (gone, program("executor", SLEEP))), said.append)
    assert kept.run() == 1 and kept.children[0].known.num_restarts == 2
    assert said[-1] == "Error: supernode ended: the key is not let in."
    assert not any(child.known.is_alive for child in kept.children)
    assert read_started(site.processes).why == "supernode ended: the key is not let in."
    assert next(describe_status(site.folder)).endswith("supernode ended: the key is not let in.")
    assert read_log(site.evidence).entries[-1]["why"] == "supernode ended: the key is not let in."


def test_what_ends_before_it_is_ready_says_why(site, brief):
    gone = replace(
        program("supernode", ""), is_ready=lambda: False, explain_end=lambda: "not let in."
    )
    kept = Supervisor(End(site, (gone,)), lambda line: None)
    assert kept.run() == 1 and kept.why == "supernode ended: not let in."


def test_what_cannot_be_entered_is_not_started(site, brief):
    site.evidence.write_text("changed\n")
    said: list[str] = []
    kept = Supervisor(End(site, (program("executor", SLEEP),)), said.append)
    assert kept.run() == 1 and not kept.children[0].known.is_alive
    assert "Not entered in the evidence: end_failed." in said[-1]
    assert site.evidence.read_text() == "changed\n"


def test_a_full_disk_ends_nothing_and_all_goes_on_when_there_is_room(site, brief):
    said: list[str] = []
    kept = Supervisor(End(site, (program("executor", SLEEP),)), said.append)

    def fill_and_make_room() -> None:
        wait_until(lambda: "Running." in said)
        limit_files(1)
        os.killpg(kept.children[0].process.pid, signal.SIGKILL)
        wait_until(lambda: any("Make room" in line for line in said))
        assert sum("Make room" in line for line in said) == 1
        limit_files(2**30)
        wait_until(lambda: kept.children[0].known.num_restarts == 1 and kept.is_kept)
        (_, executor) = read_started(site.processes).processes
        assert executor == kept.children[0].known and executor.is_alive

    def watch() -> None:
        try:
            fill_and_make_room()
        finally:
            kept.is_asked_to_stop = True

    with no_larger_files_than(None), ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        assert kept.run() == 0
        watching.result()


def test_a_program_that_never_answers_is_named_with_its_log(site, brief, monkeypatch):
    monkeypatch.setattr(supervisor, "READY_SECONDS", 0.1)
    silent = replace(program("superlink", SLEEP), is_ready=lambda: False)
    kept = Supervisor(End(site, (silent,)), lambda line: None)
    assert kept.run() == 1
    assert "superlink is not ready" in kept.why and not kept.children[0].known.is_alive


def test_large_logs_move_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LARGE_LOG_BYTES", 10)
    log = tmp_path / "superlink.log"
    with log.open("a") as file:
        for number in range(5):
            file.write(f"{number}: ten bytes\n")
            file.flush()
            rotate(log, is_open=True)
    assert log.read_text() == ""
    old = [log.with_name(f"superlink.log.{n}").read_text()[0] for n in (1, 2, 3)]
    assert old == ["4", "3", "2"] and len(list(tmp_path.iterdir())) == 4
    assert read_tail(tmp_path / "none.log") == ""


def test_a_line_that_cannot_be_said_ends_nothing(site, brief):
    """As in the foreground, with the output in a file on the full disk."""

    def full(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Supervisor(End(site, (program("executor", SLEEP),)), full)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (wait_until(lambda: kept.state == "running"), kept._stop(15, None)))
        assert kept.run() == 0


def test_a_full_disk_takes_no_old_log_away(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LARGE_LOG_BYTES", 100)
    log = tmp_path / "a.log"
    before = {log: "now " * 100} | {tmp_path / f"a.log.{n}": f"old {n}" for n in (1, 2, 3)}
    for path, text in before.items():
        path.write_text(text)
    with no_larger_files_than(10), pytest.raises(OSError, match="too large"):
        rotate(log, is_open=True)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
    rotate(log, is_open=True)
    assert (log.stat().st_size, (tmp_path / "a.log.1").read_text()) == (0, before[log])
