from __future__ import annotations

import pytest
from random_states import STATE

from fedlora_app.federation.messages import MessageError
from fedlora_app.model.adapter_state import compute_norm
from fedlora_app.runs.received import ReceivedChanges


def moved(distance: float):
    """An adapter that far from ``STATE``."""
    return {key: tensor * (1 + distance / compute_norm(STATE)) for key, tensor in STATE.items()}


@pytest.fixture
def changes(tmp_path) -> ReceivedChanges:
    """A client that has seen changes of 2, 2.5 and 3."""
    changes = ReceivedChanges(tmp_path / "ann" / "changes.json", 2.0)
    changes.accept(STATE, None, 0)
    for number, distance in ((1, 2.0), (2, 2.5), (3, 3.0)):
        changes.accept(moved(distance), STATE, number)
    return changes


def test_a_change_is_held_against_the_median_of_earlier_rounds(changes):
    with pytest.raises(MessageError, match=r"changed by 5\.1, which is 2\.04 times the median"):
        changes.accept(moved(5.1), STATE, 4)
    changes.accept(moved(4.9), STATE, 4)


def test_rounds_that_are_taken_again_do_not_count(changes):
    with pytest.raises(MessageError, match=r"2\.05 times"):
        changes.accept(moved(4.1), STATE, 2)
    changes.accept(moved(3.9), STATE, 2)


@pytest.mark.parametrize("server_round", [0, 1])
def test_calling_a_round_the_first_does_not_lift_the_bound(changes, server_round):
    with pytest.raises(MessageError, match="times the median"):
        changes.accept(moved(50.0), STATE, server_round)


def test_what_was_accepted_once_is_accepted_again_from_anywhere(changes):
    before = changes.path.read_bytes()
    changes.accept(moved(2.0), moved(1000.0), 0)
    assert changes.path.read_bytes() == before
    assert changes.path.stat().st_mode & 0o077 == 0
