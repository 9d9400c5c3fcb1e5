from __future__ import annotations

import json

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from random_states import SHAPES, STATE

from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    MessageError,
    build_error_reply,
    build_need_reply,
    build_reply,
    is_declared,
)
from fedlora_app.federation.replies import (
    Reply,
    RoundError,
    choose_valid,
    read_reply,
    require_examples,
    require_same_base,
    require_update,
)
from fedlora_app.federation.roster import Roster

pytestmark = pytest.mark.usefixtures("flower_identity")

NODES = {"ann": 5, "bob": 6, "cy": 7}


def build_request(client: str = "ann") -> Message:
    return Message(RecordDict(), dst_node_id=NODES[client], message_type="train")


def test_a_reply_reads_back():
    metrics = {"num-examples": 3, "train_global/train_loss": 0.5, "peak_memory_bytes": 2**36}
    metrics |= {"train_global+local/peak_memory_bytes": 2**36}
    reply = build_reply(
        build_request(), "ann", 2, metrics, {"device": "CPU"}, STATE, "bfloat16", SHAPES
    )
    read = read_reply(reply, "ann", 2)
    assert (read.metrics, read.facts) == (metrics, {"device": "CPU"})
    assert require_update(read, SHAPES, "bfloat16").keys() == STATE.keys()


def test_no_text_of_a_client_writes_over_what_a_terminal_shows():
    """An escape sequence could hide a line, or show one that the server never wrote."""
    about = ConfigRecord({"client-id": "ann", "error": "out of\x1b[2K paper\r\nmore\x9b1A"})
    reply = Message(RecordDict({ABOUT_RECORD: about}), reply_to=build_request())
    with pytest.raises(MessageError) as caught:
        read_reply(reply, "ann", 1)
    assert str(caught.value) == "ann: out of�[2K paper�\nmore�1A"
    finding = {"severity": "error", "rule": "a-rule", "file": "a.json", "record": 1}
    assert is_declared("findings", json.dumps([finding]))
    for value in ([finding | {"file": "a\x1b[1A"}], [finding] * 10_001):
        assert not is_declared("findings", json.dumps(value))
    assert not is_declared("device", "CPU\x1b[1A")


@pytest.mark.parametrize(("client", "server_round"), [("bob", 2), ("ann", 1)])
def test_a_reply_of_another_client_or_round_is_refused(client, server_round):
    reply = build_reply(build_request(), "ann", 2, {}, {})
    with pytest.raises(MessageError, match="answered as 'ann' for round 2"):
        read_reply(reply, client, server_round)


def test_an_error_or_an_undeclared_metric_in_a_reply_is_named():
    about = ConfigRecord({"client-id": "ann", "error": "out of paper"})
    with pytest.raises(MessageError, match="ann: out of paper"):
        read_reply(Message(RecordDict({ABOUT_RECORD: about}), reply_to=build_request()), "ann", 1)
    reply = build_reply(build_request(), "ann", 1, {}, {})
    reply.content.metric_records["metrics"]["secret"] = 1
    with pytest.raises(MessageError, match="not declared"):
        read_reply(reply, "ann", 1)


def choose(messages, ask_again=lambda clients: (), use=lambda reply: None):
    """Return the valid replies' clients, what was told, and how many had replied each time."""
    told, counts = [], []
    valid = choose_valid(
        *(messages, 1, Roster(dict(NODES)), use),
        ask_again=ask_again,
        count=counts.append,
        tell=lambda event, client, why: told.append((event, client, why)),
    )
    return [reply.client_id for reply in valid], told, counts


def reply_of(client: str, **facts: str) -> Message:
    return build_reply(build_request(client), client, 1, {}, facts)


def test_each_client_counts_once_and_only_if_its_reply_is_valid():
    def use(reply: Reply) -> None:
        if reply.client_id == "cy":
            raise MessageError("cy sent nonsense.")

    stranger = build_reply(
        Message(RecordDict(), dst_node_id=99, message_type="train"), "dan", 1, {}, {}
    )
    messages = [reply_of("ann"), stranger, reply_of("ann"), reply_of("cy")]
    messages += [build_error_reply(build_request("bob"), "bob", "out of paper")]
    valid, told, counts = choose(messages, use=use)
    assert valid == ["ann"] and counts == [1, 2, 3]
    assert told == [
        ("unasked_reply", "an unknown node", ""),
        ("unasked_reply", "ann", ""),
        ("failure", "cy", "cy sent nonsense."),
        ("failure", "bob", "bob: out of paper"),
    ]


@pytest.mark.parametrize("finds_it", [True, False])
def test_who_lost_the_global_adapter_is_asked_once_more_after_all_others(finds_it):
    asked = []

    def ask_again(clients: list[str]):
        asked.append(list(clients))
        again = reply_of("ann") if finds_it else build_need_reply(build_request(), "ann", 1)
        return [again]

    messages = [build_need_reply(build_request(), "ann", 1), reply_of("bob"), reply_of("cy")]
    valid, told, _ = choose(messages, ask_again)
    assert asked == [["ann"]] and told[0] == ("lost_adapter", "ann", "")
    assert valid == (["bob", "cy", "ann"] if finds_it else ["bob", "cy"])
    if not finds_it:
        assert "lost the global adapter that it was just sent" in told[1][2]


def test_nobody_is_asked_again_where_nobody_lost_anything():
    assert choose([reply_of("ann")], ask_again=pytest.fail)[0] == ["ann"]


def test_flower_s_own_error_is_the_client_s_failure():
    message = Message(Error(code=0, reason="gone"), reply_to=build_request())
    assert choose([message])[1] == [("failure", "ann", "ann: gone")]


@pytest.mark.parametrize("num_examples", [0, 8, 1.5, None])
def test_a_weight_that_a_client_cannot_have_is_refused(num_examples):
    registered = [{"universal_examples": 4, "local_examples": 3}]
    reply = Reply("ann", {"num-examples": num_examples}, {}, None)
    with pytest.raises(MessageError, match=f"ann reports {num_examples} examples"):
        require_examples(reply, registered)
    assert require_examples(Reply("ann", {"num-examples": 7}, {}, None), registered) == 7


def test_all_clients_and_the_run_hold_one_base_model():
    recorded: dict[str, str] = {}
    require_same_base(recorded, {"ann": "a" * 64, "bob": "a" * 64})
    assert recorded["fingerprint"] == "a" * 64
    for found in ({"ann": "b" * 64}, {"ann": "a" * 64, "bob": "b" * 64}):
        with pytest.raises(RoundError, match="do not hold the same base model"):
            require_same_base(recorded, found)
