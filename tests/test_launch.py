"""What is shown of a run's log, and real runs by ``fedlora train``."""

from __future__ import annotations

import json
import re
import signal
import subprocess

import pytest
from conftest import ROOT
from flower_process import BIN
from flwr.common.config import parse_config_args

from fedlora_app import launch
from fedlora_app.config.run_config import format_run_config
from fedlora_app.foundation.files import is_locked
from fedlora_app.launch import FLWR, LogReader, RunFailedError, run_with_flower

TRACEBACK = """Traceback (most recent call last):
  File "server_app.py", line 80, in main
    registrations = register_clients(paced, config, task, faults)
fedlora_app.federation.messages.MessageError: The run cannot start:
ann: data.conflict_test: /data/x.json does not exist.
bob: it, too.
\x1b[91mERROR \x1b[0m:     Exit Code: 700

An unhandled exception occurred when running the simulation.
"""
HEADING = "\x1b[91mERROR \x1b[0m:     Simulation raised an exception"


def read(text: str, *texts_again: str) -> tuple[list[str], str | None]:
    said: list[str] = []
    log = LogReader(said.append)
    for each in (text, *texts_again):
        for number, line in enumerate(each.splitlines()):
            log.read(number, line)
    return said, log.close()


def test_an_error_that_can_be_mended_is_its_sentence_alone():
    said, error = read(f"round 0/1\n{HEADING}\n{TRACEBACK}")
    assert said == ["round 0/1"]
    assert error == (
        "The run cannot start:\nann: data.conflict_test: /data/x.json does not exist.\n"
        "bob: it, too."
    )


@pytest.mark.parametrize("last", ["KeyError: 'x'", "pydantic_core.ValidationError: 1 fault"])
def test_any_other_error_keeps_its_traceback(last):
    unknown = re.sub(r"(?m)^fedlora_app\.fed.*$", last, TRACEBACK)
    said, error = read(f"round 0/1\n{HEADING}\n{unknown}")
    assert error is None
    assert said == ["round 0/1", HEADING, *unknown.splitlines()]


def test_a_client_s_traceback_is_shown_when_it_comes():
    said, error = read(f"{TRACEBACK}round 1/1")
    assert said == [*TRACEBACK.splitlines(), "round 1/1"] and error is None


def test_a_log_that_is_shown_again_goes_on_where_it_ended():
    said, error = read("a\nb\n", "a\nb\nc\n", f"a\nb\nc\n{HEADING}\n{TRACEBACK}")
    assert said == ["a", "b", "c"] and error.startswith("The run cannot start:")


def test_settings_are_one_argument_of_flower_s():
    given = {
        "config": "conf/demo.yaml",
        "output-dir": "results",
        "mode": "",
        "num-rounds": 3,
        "overrides": "training.learning_rate=1e-3",
    }
    assert format_run_config(given) == "num-rounds=3 overrides='training.learning_rate=1e-3'"


@pytest.mark.parametrize(
    "text",
    [
        "it's a/e.yaml",
        """federated.clients.0.system_prompt="Ask the 'mayor'." """,
        "federated.clients.0.system_prompt='You \"help\".'",
        "c:\\it's a\n\ttab, é, 京, \U0001f600",
        'back\\slash "q"',
    ],
)
def test_flower_reads_every_text_as_it_was_given(text):
    given = {"overrides": text, "num-rounds": 3}
    assert parse_config_args([format_run_config(given)]) == given


def test_the_command_is_that_of_this_environment():
    assert str(BIN / "flwr") == FLWR


def test_a_superlink_that_is_started_again_is_waited_for(tmp_path, monkeypatch):
    """Between two looks at a run it was killed; the run has failed with it, which it then says."""
    answers = tmp_path / "answers"
    answers.write_text(
        '{"success": true, "run-id": 7}\n'
        '{"success": false, "error-message": "Connection to the SuperLink is unavailable."}\n'
        '{"success": true, "runs": [{"status": "finished:failed"}]}\n'
    )
    flwr = tmp_path / "flwr"
    flwr.write_text(
        f'#!/bin/sh\n[ "$1" = log ] && exit\nhead -n 1 {answers}\nsed -i 1d {answers}\n'
    )
    flwr.chmod(0o755)
    monkeypatch.setattr(launch, "FLWR", str(flwr))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    with pytest.raises(RunFailedError, match="The run failed"):
        run_with_flower(tmp_path, {}, None)
    assert answers.read_text() == ""


@pytest.mark.minutes
def test_fedlora_train_says_how_a_run_ended(flower, tiny_experiment, tiny_project):
    command = [BIN / "fedlora", "train", tiny_experiment, "--rounds", "1", "--name", "trained"]

    def train(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *more], env=flower.env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    done = train()
    assert done.returncode == 0, done.stdout + done.stderr
    run = tiny_project / "results" / "trained"
    assert f"Run directory: {run}" in done.stdout and "round 1/1" in done.stdout
    failed = train()
    assert failed.returncode == 2 and f"{run} exists already" in failed.stderr
    assert "Traceback" not in failed.stdout + failed.stderr


@pytest.mark.minutes
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_and_says_how_to_resume_it(
    sent, flower, tiny_experiment, tiny_project
):
    name = f"stopped-{sent.name}"
    command = [BIN / "fedlora", "train", tiny_experiment, "--rounds", "50", "--name", name]
    with subprocess.Popen(
        command, env=flower.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("round 1/50 not evaluated"):
                process.send_signal(sent)
        said = process.stderr.read()
        assert process.wait(60) == 130
    run = tiny_project / "results" / name
    assert (
        f"To go on: fedlora train {tiny_experiment} --resume {run}" in said
        and "Traceback" not in said
    )
    assert not is_locked(run)
    entries = json.loads((run / "manifest.json").read_text())["rounds"]
    assert 1 <= len(entries) < 50
    command = [*command[:3], "--resume", run, "--rounds", str(entries[-1]["round"] + 1)]
    resumed = subprocess.run(command, env=flower.env, cwd=ROOT, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Resuming after round" in resumed.stdout


def test_fedlora_train_starts_nothing_that_would_be_refused(tiny_experiment):
    command = [BIN / "fedlora", "train", tiny_experiment]
    command += ["--overrides", "data.conflict_test=conflicts.json"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "SuperLink" not in refused.stdout
    assert "data.conflict_test: " in refused.stderr and "conflict.json" in refused.stderr
