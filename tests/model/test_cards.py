"""Which card a process takes, with real processes; no card is needed for that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from fedlora_app.model import cards
from fedlora_app.model.base import choose_device
from fedlora_app.model.cards import CardError, claim_card, list_neighbours, release_card

TWO = ["GPU-a", "GPU-b"]
OTHER = """
import sys, time
from fedlora_app.model.cards import claim_card
print(claim_card(sys.argv[2:], sys.argv[1]), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    release_card()


@pytest.fixture
def start_other():
    """Start a process that claims a card; return it and the card's index."""
    processes = []

    def start(run, names):
        command = [sys.executable, "-c", OTHER, run, *names]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_two_runs_take_two_cards_and_a_third_is_refused_by_name(start_other, capsys):
    other, index = start_other("first", TWO)
    assert index == 0
    assert claim_card(TWO, "second") == 1
    assert claim_card(TWO, "second") == 1 and list_neighbours() == []
    release_card()
    assert claim_card(TWO) == 1  # a command that reads goes where nobody is
    release_card()
    with pytest.raises(CardError, match=rf"run first \(process {other.pid}, since"):
        claim_card(TWO[:1], "second")
    assert capsys.readouterr().err == ""
    assert claim_card(TWO[:1], "second", may_share=True) == 0
    assert f"On the same GPU: run first (process {other.pid}" in capsys.readouterr().err
    assert len(list_neighbours()) == 1


def test_workers_of_one_run_spread_and_then_share(start_other):
    assert start_other("one", TWO)[1] == 0
    assert start_other("one", TWO)[1] == 1
    assert claim_card(TWO, "one") == 0


def test_reading_commands_share_and_keep_no_run_away(start_other, capsys):
    start_other("", TWO[:1])
    assert claim_card(TWO[:1], "run") == 0
    assert "a command that reads a run" in capsys.readouterr().err


def test_a_killed_process_holds_no_card(start_other, cache):
    other, _ = start_other("first", TWO[:1])
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert claim_card(TWO[:1], "second") == 0
    assert len(list((cache / "cards").glob("*.json"))) == 1
    release_card()
    assert not list((cache / "cards").glob("*.json"))


def test_a_process_that_read_a_run_and_then_trains_keeps_its_card(start_other):
    assert claim_card(TWO) == 0
    assert start_other("other", TWO)[1] == 1
    assert claim_card(TWO, "run") == 0
    assert cards._held.claim.run == "run"


def test_a_folder_that_cannot_be_written_is_a_note(cache, capsys):
    cache.write_text("in the way")
    assert claim_card(TWO, "run") == 0
    assert "nobody else sees that this process uses a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_the_device_is_the_card_that_was_claimed():
    device = choose_device("run")
    assert device.index == torch.cuda.current_device() == cards._held.index
    assert choose_device() == device
