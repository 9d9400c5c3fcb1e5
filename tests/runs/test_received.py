from __future__ import annotations

import json

import pytest
from conftest import build_tiny_config
from random_states import STATE

from fedlora_app.config.loading import change_config
from fedlora_app.federation.messages import MessageError
from fedlora_app.model.adapter_state import compute_norm
from fedlora_app.runs.received import ReceivedChanges


def moved(distance: float):
    """An adapter that far from ``STATE``."""
    return {key: tensor * (1 + distance / compute_norm(STATE)) for key, tensor in STATE.items()}


@pytest.fixture
def changes(tmp_path) -> ReceivedChanges:
    """A client that has seen changes of 2, 2.5 and 3."""
    config = build_tiny_config(federated={"max_norm_ratio": 2.0, "num_rounds": 12})
    config = change_config(config, "training.lr_scheduler=constant training.warmup_ratio=0")
    changes = ReceivedChanges(tmp_path / "ann" / "changes.json", config)
    changes.accept(STATE, None, 0)
    for number, (before, distance) in enumerate(((0, 2.0), (2.0, 4.5), (4.5, 7.5)), start=1):
        changes.accept(moved(distance), moved(before), number)
    return changes


def test_a_change_is_held_against_the_median_of_earlier_rounds(changes):
    with pytest.raises(MessageError, match=r"changed by 5\.1, which is 2\.04 times the median"):
        changes.accept(moved(7.5 + 5.1), moved(7.5), 4)
    changes.accept(moved(7.5 + 4.9), moved(7.5), 4)


def test_rounds_that_are_taken_again_do_not_count(changes):
    with pytest.raises(MessageError, match=r"2\.05 times"):
        changes.accept(moved(2 + 4.1), moved(2.0), 2)
    changes.accept(moved(2 + 3.9), moved(2.0), 2)


@pytest.mark.parametrize("server_round", [0, 1])
def test_calling_a_round_the_first_does_not_lift_the_bound(changes, server_round):
    with pytest.raises(MessageError, match="times the median"):
        changes.accept(moved(50.0), STATE, server_round)


def test_what_was_kept_without_the_round_before_is_read(changes):
    listed = json.loads(changes.path.read_text())
    changes.path.write_text(json.dumps({n: entry[:2] for n, entry in listed.items()}))
    with pytest.raises(MessageError, match=r"2\.04 times the median"):
        changes.accept(moved(7.5 + 5.1), moved(7.5), 4)
    changes.accept(moved(7.5 + 4.9), moved(7.5), 4)


def test_rounds_that_a_client_has_missed_add_up(changes):
    last = moved(7.5)
    with pytest.raises(MessageError, match="at the learning rates of the rounds between"):
        changes.accept(moved(7.5 + 2 * 6 * 2.5 + 1), last, 9)  # 6 rounds later, 2.5 the median
    changes.accept(moved(7.5 + 2 * 6 * 2.5 - 1), last, 9)


def test_what_was_accepted_once_is_accepted_again_from_anywhere(changes):
    before = changes.path.read_bytes()
    changes.accept(moved(2.0), moved(1000.0), 0)
    assert changes.path.read_bytes() == before
    assert changes.path.stat().st_mode & 0o077 == 0
