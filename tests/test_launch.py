"""What is shown of a run's log. ``tests/test_flower.py`` runs the whole."""

from __future__ import annotations

import re

import pytest
from flower_process import BIN

from fedlora_app.config.run_config import format_run_config
from fedlora_app.launch import FLWR, LogReader

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
        "overrides": "federated.clients.0.system_prompt='You help.'",
    }
    expected = "num-rounds=3 overrides='federated.clients.0.system_prompt=\"You help.\"'"
    assert format_run_config(given) == expected


def test_the_command_is_that_of_this_environment():
    assert str(BIN / "flwr") == FLWR
