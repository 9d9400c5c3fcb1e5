from __future__ import annotations

import pytest

from fedlora_app.foundation import progress
from fedlora_app.foundation.progress import (
    client_lines,
    format_duration,
    prompt_lines,
    step_lines,
)
from fedlora_app.foundation.terminal import show_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "0 s"),
        (45, "45 s"),
        (59.6, "1 min 00 s"),
        (190, "3 min 10 s"),
        (3599.4, "59 min 59 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (7200 + 59 * 60 + 40, "2 h 59 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations(seconds, expected):
    assert format_duration(seconds) == expected


def test_lines_are_rare_and_tell_the_time_left(clock, capsys):
    report = step_lines("ann, round 1, global")
    for step in range(1, 101):  # one a second
        clock.now += 1
        report(step, 100, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0] == "ann, round 1, global: step 10/100, loss 0.500, 1 min 30 s left"
    assert lines[-1] == "ann, round 1, global: step 90/100, loss 0.500, 10 s left"


def test_nothing_is_said_before_the_first_and_after_the_last(clock, capsys):
    report = prompt_lines("ann, round 3, evaluation", 464)
    clock.now += 20
    report(0)  # scored and waiting to be generated for
    report(464)
    assert capsys.readouterr().out == ""
    report(232)
    line = "ann, round 3, evaluation: 232/464 prompts, 20 s left\n"
    assert capsys.readouterr().out == line


def test_clients_are_counted_for_the_server(clock):
    lines = []
    count = client_lines("round 3/8, train", 50, lines.append)
    for done in range(1, 51):
        clock.now += 4
        count(done)
    assert lines[0] == "round 3/8, train: 3 of 50 clients, about 3 min 08 s left"
    assert len(lines) == 16


def test_a_command_that_is_no_terminal_gets_lines_with_each_stretch_at_its_own_speed(clock, capsys):
    with show_progress("runs") as show:
        for total, seconds in ((10, 1), (4, 100)):
            for done in range(1, total + 1):
                clock.now += seconds
                show("reading", done, total)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 6/10 runs, about 4 s left",
        "reading: 2/4 runs, about 3 min 20 s left",
        "reading: 3/4 runs, about 1 min 40 s left",
    ]
    with show_progress(quiet=True) as show:
        for done in (1, 2):
            clock.now += 60
            show("reading", done, 3)
    assert not capsys.readouterr().err
