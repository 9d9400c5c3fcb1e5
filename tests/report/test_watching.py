"""A page that follows its run, and does not go on reloading when the run has ended."""

from __future__ import annotations

import json

import pytest
from synthetic import write_run

from fedlora_app.foundation.files import lock_folder
from fedlora_app.report.watching import watch_report

pytestmark = pytest.mark.usefixtures("unrendered")
RELOADS = '<meta http-equiv="refresh"'


@pytest.fixture
def run(tmp_path):
    """A run of four rounds with two complete."""
    run = write_run(tmp_path / "run", evaluated=False)
    manifest = json.loads((run / "manifest.json").read_text())
    rounds = manifest["rounds"][:3]
    (run / "manifest.json").write_text(json.dumps(manifest | {"finished": None, "rounds": rounds}))
    return run


def add_round(run, **facts) -> None:
    """Change the manifest as a round that is completed does."""
    manifest = json.loads((run / "manifest.json").read_text())
    last = manifest["rounds"][-1]
    manifest["rounds"].append(last | {"round": last["round"] + 1})
    (run / "manifest.json").write_text(json.dumps(manifest | facts))


def test_the_page_is_written_for_every_round_and_reloads_until_the_run_has_finished(run):
    page, told = run / "report.html", []

    def tell(line):
        told.append(line)
        if line == "round 2 of 4 complete":
            assert RELOADS in page.read_text() and "2 of 4" in page.read_text()
            add_round(run)
        if line == "round 3 of 4 complete":
            assert RELOADS in page.read_text() and "3 of 4" in page.read_text()
            add_round(run, finished="2026-01-01T01:00:00Z")

    with lock_folder(run):
        assert watch_report(run, None, tell, poll_seconds=0) == page
    assert told[0].endswith(str(page)) and told[-1] == "The run has finished."
    assert len(told) == 4  # and not once for every look
    assert RELOADS not in page.read_text() and "4 of 4" in page.read_text()


def test_ctrl_c_ends_the_watching_and_the_reloading(run, tmp_path):
    def interrupt(line):
        if line.startswith("round"):
            raise KeyboardInterrupt

    with lock_folder(run):
        page = watch_report(run, tmp_path / "page.html", interrupt, poll_seconds=0)
    assert page == tmp_path / "page.html" and RELOADS not in page.read_text()


def test_a_run_that_nobody_writes_is_not_watched_for_ever(run):
    told = []
    page = watch_report(run, None, told.append, poll_seconds=0)
    assert "stopped before its end" in told[-1] and RELOADS not in page.read_text()


def test_a_run_that_is_just_being_resumed_is_watched(run):
    """Between the first look and its lock there is a moment."""
    locks, told = [], []

    def tell(line):
        told.append(line)
        if line.startswith("round 2"):
            locks.append(lock_folder(run))
            add_round(run)
        if line.startswith("round 3"):
            add_round(run, finished="2026-01-01T01:00:00Z")

    watch_report(run, None, tell, poll_seconds=0)
    locks[0].close()
    assert told[-1] == "The run has finished."
