from __future__ import annotations

import json
import time

import pytest
from conftest import build_tiny_config
from flwr.app import Error, Message, RecordDict
from loopback import LoopbackGrid

from fedlora_app import client_app, server_app
from fedlora_app.federation import grid as grid_module
from fedlora_app.federation import probes, registration
from fedlora_app.federation import ray_pool as workers
from fedlora_app.federation.grid import MOST_ATTEMPTS, PacedGrid, build_message
from fedlora_app.federation.messages import MessageError, build_probe, is_probe
from fedlora_app.strategy import RoundError

pytestmark = pytest.mark.usefixtures("flower_identity")


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


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_clients_than_allowed_are_busy_and_none_is_lost(at_once):
    grid = SlowGrid(polls_needed=3)
    messages = (build_message(RecordDict(), "train", node) for node in range(7))
    replies = list(PacedGrid(grid, at_once).send_and_receive(messages, timeout=0.0))
    assert len(replies) == 7
    assert grid.most_outstanding == at_once


def test_of_many_clients_at_once_only_a_few_replies_are_in_memory():
    """However many have answered: each may bring an update of hundreds of megabytes."""

    class Counting(SlowGrid):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            pulled.append(len(replies))
            return replies

    pulled: list[int] = []
    messages = (build_message(RecordDict(), "train", node) for node in range(30))
    replies = list(PacedGrid(Counting(polls_needed=1), 30).send_and_receive(messages))
    assert len(replies) == 30 == sum(pulled)
    assert max(pulled) == grid_module.PULLED_AT_ONCE


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


@pytest.mark.parametrize("answer", [[], [""], [None]])
def test_a_message_that_flower_does_not_accept_is_its_clients_failure(answer):
    class Refusing(SlowGrid):
        def push_messages(self, messages):
            [message] = messages
            refused = message.metadata.dst_node_id in (77, 78)
            return answer if refused else super().push_messages([message])

    messages = [build_message(RecordDict(), "train", node) for node in (77, 5, 78)]
    replies = {
        reply.metadata.src_node_id: reply
        for reply in PacedGrid(Refusing(1), 3).send_and_receive(messages)
    }
    assert {node for node, reply in replies.items() if reply.has_error()} == {77, 78}
    assert "did not accept the message" in replies[77].error.reason
    assert len(replies) == 3


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


class OneWorker:
    """Takes one message after another; the node ``hung`` never lets go of it."""

    def __init__(self, grid: SlowGrid, hung: int) -> None:
        self.grid, self.hung = grid, hung
        self.starts: dict[str, float] = {}
        self.stopped: list[int] = []
        self._current = ""

    def started_at(self, message_id):
        if self._current not in self.grid._replies:
            waiting = [i for i in self.grid._replies if i not in self.starts]
            self._current = next(iter(waiting), "")
            self.starts[self._current] = time.monotonic()
        return self.starts.get(message_id)

    def is_done(self, message_id):
        """A client needs 0.1 seconds."""
        started = self.started_at(message_id)
        return started and time.monotonic() - started > 0.1 and not self.hangs(message_id)

    def hangs(self, message_id):
        return self.node(message_id) == self.hung

    def node(self, message_id):
        return self.grid._replies[message_id].metadata.src_node_id

    def stop(self, message_id):
        if self._current != message_id:
            return False
        self.stopped.append(self.node(message_id))
        del self.grid._replies[message_id]
        return True


def serve_by_one_worker(hung: int, num_clients: int = 5):
    class Served(SlowGrid):
        def pull_messages(self, message_ids):
            for number in message_ids:
                if number in self._replies and worker.is_done(number):
                    yield self._replies.pop(number)

    grid = Served(1)
    worker = OneWorker(grid, hung)
    paced = PacedGrid(grid, num_clients, 0.3, lambda: worker)
    messages = (build_message(RecordDict(), "train", node) for node in range(num_clients))
    return worker, paced, list(paced.send_and_receive(messages))


def test_waiting_in_line_is_no_clients_time():
    """Five clients take longer than the limit together, and each of them shorter."""
    worker, paced, replies = serve_by_one_worker(hung=-1)
    assert len(replies) == 5 and not any(reply.has_error() for reply in replies)
    assert not worker.stopped and not paced.has_running_clients


def test_a_hung_worker_is_stopped_and_only_its_client_blamed():
    worker, paced, replies = serve_by_one_worker(hung=1)
    assert worker.stopped == [1] and not paced.has_running_clients
    assert [r.metadata.src_node_id for r in replies if r.has_error()] == [1]
    assert len(replies) == 5


def test_a_registration_has_time_for_what_starts_with_it(monkeypatch):
    def ask():
        paced = PacedGrid(SlowGrid(polls_needed=9), 1, client_timeout_seconds=0.01)
        return next(paced.send_and_receive([build_message(RecordDict(), "query", 1)]))

    assert not ask().has_error()
    monkeypatch.setattr(grid_module, "REGISTRATION_SECONDS", 0.02)
    assert "no answer within 0.02 seconds (the least for a registration)" in ask().error.reason


def test_the_settings_limit_reaches_the_grid(federation, monkeypatch):
    """A client that does not answer fails, and the worker that it holds is stopped."""
    config = build_tiny_config(federated={"min_clients": 1, "client_timeout_seconds": 0.2})
    silent, stopped = [], []

    def tamper(message, reply):
        task = message.content.config_records["task"]
        if (task["client_id"], message.metadata.message_type) == ("bob", "train"):
            silent.append(message.metadata.message_id)
            return None
        return reply

    class Pool:
        def started_at(self, message_id):
            return 0.0 if message_id in silent else None

        def stop(self, message_id):
            stopped.append(message_id)
            return True

    monkeypatch.setattr(workers, "_pool", Pool())
    run = federation.run("run", config, tamper)
    rounds = json.loads((run / "manifest.json").read_text())["rounds"]
    why = "bob: no answer within 0.2 seconds (federated.client_timeout_seconds)"
    assert [entry.get("failures") for entry in rounds] == [None, {"bob": why}, {"bob": why}]
    assert stopped == silent and len(stopped) == 2


@pytest.mark.parametrize("is_simulation", [True, False])
def test_why_a_run_ends_is_told_where_flower_waits_for_a_hung_worker(
    is_simulation, federation, monkeypatch, capsys
):
    config = build_tiny_config(federated={"client_timeout_seconds": 0.2})
    monkeypatch.setattr(PacedGrid, "is_simulation", is_simulation)
    monkeypatch.setattr(registration, "wait_for_nodes", lambda grid, *_: grid.get_node_ids())

    def tamper(message, reply):
        return None if message.metadata.message_type == "train" else reply

    with pytest.raises(RoundError, match="0 of 2 clients"):
        federation.run("run", config, tamper)
    assert ("0 of 2 clients returned valid results" in capsys.readouterr().out) == is_simulation


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


def test_of_clients_in_line_the_one_at_work_is_named(monkeypatch, capsys):
    monkeypatch.setattr(grid_module, "WAITING_REPORT_SECONDS", 0.05)

    class Busy:
        def started_at(self, message_id):
            return time.monotonic() - 0.1 if message_id == "m1" else None

    grid = PacedGrid(SlowGrid(polls_needed=12), 2, find_workers=Busy)
    grid.names = {5: "ann", 6: "bob"}
    list(grid.send_and_receive(build_message(RecordDict(), "train", node) for node in (5, 6)))
    assert "Still waiting for bob, " in capsys.readouterr().out


class OneByOne(SlowGrid):
    """A node that deals with messages in their order, each at the given number of polls.

    It restarts with some of those that train, and has them no longer.
    """

    def __init__(self, polls_needed: int, num_lost: int) -> None:
        super().__init__(polls_needed)
        self.num_lost = num_lost
        self.queue: list[str] = []
        self.done: list[str] = []

    def push_messages(self, messages):
        [number] = super().push_messages(messages)
        if not is_probe(self.sent[-1]) and self.num_lost:
            self.num_lost -= 1
        else:
            self.queue.append(number)
        return [number]

    def pull_messages(self, message_ids):
        if self.queue:
            self.polls[self.queue[0]] += 1
            if self.polls[self.queue[0]] >= self.polls_needed:
                self.done.append(self.queue.pop(0))
        return [self._replies.pop(i) for i in list(message_ids) if i in self.done]

    @property
    def trained(self) -> int:
        return sum(not is_probe(message) for message in self.sent)


@pytest.fixture
def quick_probes(monkeypatch):
    monkeypatch.setattr(probes, "FIRST_PROBE_SECONDS", 0.05)


@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_message_that_a_node_has_lost_is_sent_again(num_lost, quick_probes, capsys):
    node = OneByOne(1, num_lost)
    grid = PacedGrid(node, 1)
    grid.names = {5: "ann"}
    [reply] = grid.send_and_receive([build_message(RecordDict(), "train", 5)])
    assert not reply.has_error() and reply.metadata.src_node_id == 5
    assert node.trained == num_lost + 1
    assert capsys.readouterr().out.count("ann: its SuperNode has lost the message") == num_lost


def test_a_node_that_loses_a_message_again_and_again_has_failed(quick_probes):
    [reply] = PacedGrid(OneByOne(1, 100), 1).send_and_receive(
        [build_message(RecordDict(), "train", 5)]
    )
    assert f"has lost the message {MOST_ATTEMPTS} times" in reply.error.reason


def test_a_node_that_is_busy_for_long_has_lost_nothing(quick_probes):
    node = OneByOne(25, 0)
    [reply] = PacedGrid(node, 1).send_and_receive([build_message(RecordDict(), "train", 5)])
    assert not reply.has_error() and node.trained == 1
    assert len(node.sent) == 2  # one probe waited behind the message


def test_a_reply_that_came_just_before_that_to_the_probe_counts(quick_probes):
    """Both may come between two looks, and the probe's is looked at first once."""

    class Hasty(OneByOne):
        def pull_messages(self, message_ids):
            is_of_probes = all(is_probe(self.sent[int(i[1:])]) for i in message_ids)
            if is_of_probes:
                self.done += self.queue
                self.queue = []
            return [self._replies.pop(i) for i in list(message_ids) if i in self.done]

    node = Hasty(1, 0)
    [reply] = PacedGrid(node, 1).send_and_receive([build_message(RecordDict(), "train", 5)])
    assert not reply.has_error() and node.trained == 1


def test_a_client_answers_a_probe_without_doing_anything(federation):
    federation.run("run", build_tiny_config(federated={"num_rounds": 1}))
    [context] = list(federation.grids[-1].contexts.values())[:1]
    probe = build_probe(context.node_id)
    probe.metadata.__dict__["_message_id"] = "probe"
    reply = client_app.app(probe, context)
    assert is_probe(reply) and not reply.content.array_records


class Coming(SlowGrid):
    """Flower's SuperLink: a message whose reply is asked for while its node is gone is dropped."""

    def __init__(self, absent: dict[int, int]) -> None:
        super().__init__(1)
        self.absent = absent  # node: number of looks until it is there
        self.served: list[int] = []

    def get_node_ids(self):
        self.absent = {node: left - 1 for node, left in self.absent.items() if left > 1}
        return [n for n in {m.metadata.dst_node_id for m in self.sent} if n not in self.absent]

    def pull_messages(self, message_ids):
        for number in list(message_ids):
            reply = self._replies.pop(number)
            node = reply.metadata.src_node_id
            if node in self.absent:
                request = next(m for m in self.sent if m.metadata.message_id == number)
                reply = Message(Error(code=5, reason="unavailable"), reply_to=request)
            self.served.append(node)
            yield reply


def test_a_node_that_is_gone_is_waited_for_while_others_are_served(capsys):
    node = Coming(absent={5: 4})
    grid = PacedGrid(node, 1, reconnect_seconds=60.0)
    grid.names = {5: "ann"}
    messages = [build_message(RecordDict(), "train", n) for n in (5, 6, 7)]
    replies = list(grid.send_and_receive(messages))
    assert not any(reply.has_error() for reply in replies)
    assert node.served == [6, 7, 5]
    assert "ann: its SuperNode is gone; waiting 60 seconds" in capsys.readouterr().out


def test_a_node_that_stays_away_has_failed_and_is_waited_for_once(capsys):
    node = Coming(absent={5: 10**6})
    grid = PacedGrid(node, 1, reconnect_seconds=0.2)
    for _ in range(2):
        started = time.monotonic()
        [reply] = grid.send_and_receive([build_message(RecordDict(), "train", 5)])
        assert reply.has_error() and reply.error.reason == "unavailable"
    assert time.monotonic() - started < 0.2  # the second time
    assert capsys.readouterr().out.count("is gone") == 1
    node.absent = {}
    [reply] = grid.send_and_receive([build_message(RecordDict(), "train", 5)])
    assert not reply.has_error()


def test_a_message_that_is_dropped_between_two_looks_is_sent_again():
    """The node goes just after it was seen to be there."""

    class Going(Coming):
        def pull_messages(self, message_ids):
            if not self.served:
                self.absent = {5: 3}
            yield from super().pull_messages(message_ids)

    node = Going(absent={})
    grid = PacedGrid(node, 1, reconnect_seconds=60.0)
    [reply] = grid.send_and_receive([build_message(RecordDict(), "train", 5)])
    assert not reply.has_error() and len(node.sent) == 2


def test_only_nodes_whose_keys_are_known_to_take_part_are_asked():
    """A run would reach every SuperNode that is connected, whether its owner agreed or not."""
    grid = PacedGrid(LoopbackGrid(dict.fromkeys((11, 12, 13))), 1, find_owners=lambda: {11: "ann"})
    assert list(grid.get_node_ids()) == [11]
    assert sorted(PacedGrid(LoopbackGrid(dict.fromkeys((11, 12))), 1).get_node_ids()) == [11, 12]


@pytest.mark.parametrize("owners", [{11: "ann", 12: "bob"}, {11: "bob", 12: "ann"}])
def test_a_node_is_whose_its_key_is(owners, federation, monkeypatch):
    """Nodes 11 and 12 say that they are ann and bob."""
    monkeypatch.setattr(server_app, "find_owners", lambda: owners)
    config = build_tiny_config(federated={"num_rounds": 1})
    if owners[11] == "ann":
        assert (federation.run("run", config) / "final" / "global").is_dir()
        return
    with pytest.raises(MessageError, match="Node 11 says that it is ann, and its key is bob's"):
        federation.run("run", config)
    assert not any(message.content.array_records for message in federation.grids[-1].sent)


def test_a_suspected_message_is_not_given_up_while_its_node_is_away(quick_probes):
    """Its reply may lie at the SuperLink, where nobody asks for it before the node is back."""

    class AnswersAndGoes(OneByOne):
        def get_node_ids(self):
            self.looks = getattr(self, "looks", 0) + 1
            probe_was_answered = any(is_probe(self.sent[int(i[1:])]) for i in self.done)
            return [] if probe_was_answered and self.looks % 3 else [5]

        def pull_messages(self, message_ids):
            if all(is_probe(self.sent[int(i[1:])]) for i in message_ids):
                self.done += self.queue
                self.queue = []
            return [self._replies.pop(i) for i in list(message_ids) if i in self.done]

    node = AnswersAndGoes(1, 0)
    grid = PacedGrid(node, 1, reconnect_seconds=60.0)
    [reply] = grid.send_and_receive([build_message(RecordDict(), "train", 5)])
    assert not reply.has_error() and node.trained == 1


def test_only_an_empty_probe_is_one():
    probe = build_probe(5)
    assert is_probe(probe)
    probe.content["more"] = probe.content["probe"].copy()
    assert not is_probe(probe)
