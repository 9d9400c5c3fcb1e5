from __future__ import annotations

import time

import pytest
from federation import LoopbackGrid
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora_app import grid as grid_module
from fedlora_app.grid import PacedGrid, build_message


class SlowGrid(LoopbackGrid):
    """Answers a message only when it has been asked a number of times."""

    def __init__(self, polls_needed: int) -> None:
        super().__init__({})
        self.polls_needed = polls_needed
        self.polls: dict[str, int] = {}
        self.most_outstanding = 0

    def push_messages(self, messages):
        for message in messages:
            number = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            self.sent.append(message)
            self._replies[number] = Message(RecordDict(), reply_to=message)
            self.polls[number] = 0
            self.most_outstanding = max(self.most_outstanding, len(self._replies))
            yield number

    def pull_messages(self, message_ids):
        for number in list(message_ids):
            self.polls[number] += 1
            if self.polls[number] >= self.polls_needed:
                yield self._replies.pop(number)


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_clients_than_allowed_are_busy_and_none_is_lost(at_once):
    grid = SlowGrid(polls_needed=3)
    messages = (build_message(RecordDict(), "train", node) for node in range(7))
    replies = list(PacedGrid(grid, at_once).send_and_receive(messages, timeout=0.0))
    assert len(replies) == 7
    assert grid.most_outstanding == at_once


def test_the_next_message_is_made_only_when_its_turn_comes():
    grid = SlowGrid(polls_needed=1)
    made = []

    def build(node):
        made.append(node)
        return build_message(RecordDict(), "train", node)

    replies = PacedGrid(grid, 1).send_and_receive(build(node) for node in range(3))
    next(iter(replies))
    assert made == [0]


def test_flowers_own_error_replies_are_laid_to_their_client():
    """When a SuperNode is gone, the SuperLink answers in its place and under its own id."""

    class Unavailable(SlowGrid):
        def pull_messages(self, message_ids):
            for number in list(message_ids):
                del self._replies[number]
                request = next(m for m in self.sent if m.metadata.message_id == number)
                reply = Message(Error(code=3, reason="gone"), reply_to=request)
                reply.metadata.__dict__["_src_node_id"] = 1
                yield reply

    messages = [build_message(RecordDict(), "train", node) for node in (21, 22)]
    replies = list(PacedGrid(Unavailable(1), 1).send_and_receive(messages))
    assert [reply.metadata.src_node_id for reply in replies] == [21, 22]
    assert all(reply.has_error() and reply.error.reason == "gone" for reply in replies)


def test_a_message_that_flower_does_not_accept_is_named():
    class Refusing(SlowGrid):
        def push_messages(self, messages):
            list(messages)
            return []

    messages = [build_message(RecordDict(), "train", 77)]
    with pytest.raises(ConnectionError, match="node 77"):
        list(PacedGrid(Refusing(1), 1).send_and_receive(messages))


def test_a_client_that_never_answers_fails_and_the_others_are_still_asked():
    class Silent(SlowGrid):
        def pull_messages(self, message_ids):
            yield from super().pull_messages(i for i in message_ids if i != "m1")

    messages = (build_message(RecordDict(), "train", node) for node in range(3))
    grid = PacedGrid(Silent(1), 1, client_timeout_seconds=0.2)
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
    assert set(replies) == {0, 1, 2}
    assert "no answer within 0.2 seconds" in replies[1].error.reason
    assert not replies[0].has_error() and not replies[2].has_error()


def test_a_reply_that_comes_while_another_is_dealt_with_is_not_late():
    class SecondLater(SlowGrid):
        def pull_messages(self, message_ids):
            ready = [i for i in message_ids if i == "m0" or "m0" not in self._replies]
            yield from super().pull_messages(ready[:1])

    messages = (build_message(RecordDict(), "train", node) for node in range(2))
    grid = PacedGrid(SecondLater(1), 2, client_timeout_seconds=0.2)
    replies = []
    for reply in grid.send_and_receive(messages):
        replies.append(reply)
        time.sleep(0.3)  # an update is folded in
    assert len(replies) == 2 and not any(reply.has_error() for reply in replies)


def test_a_client_that_is_waited_for_is_named(monkeypatch, capsys):
    monkeypatch.setattr(grid_module, "WAITING_REPORT_SECONDS", 0.05)
    grid = PacedGrid(SlowGrid(polls_needed=12), 1)
    grid.names = {5: "ann"}
    assert len(list(grid.send_and_receive([build_message(RecordDict(), "train", 5)]))) == 1
    assert "Still waiting for ann, " in capsys.readouterr().out
