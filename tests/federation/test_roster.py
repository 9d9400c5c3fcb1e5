from __future__ import annotations

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from random_states import SHAPES, STATE

from fedlora_app.config.schema import LOCAL
from fedlora_app.federation.messages import (
    ADAPTER_RECORD,
    Kept,
    Task,
    build_error_reply,
    build_reply,
    build_task_content,
    read_task,
)
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.federation.roster import UNKNOWN, Roster, Traffic, count_bytes

pytestmark = pytest.mark.usefixtures("flower_identity")

TASK = Task("", 1, "ab", False, "run", "", "", "", "{}")


def build_request() -> Message:
    return Message(RecordDict(), dst_node_id=5, message_type="train")


def test_only_who_does_not_hold_the_global_adapter_gets_it():
    roster, arrays = Roster({"ann": 5, "bob": 6}), pack_state(STATE)
    roster.held = {"ann": "ab", "bob": "older"}
    roster.kept[LOCAL]["bob"] = (0, "cd")
    for attempt in (1, 2):  # what a client holds is told once; asked again, it gets the adapter
        ann, bob = roster.messages(TASK, MessageType.TRAIN, ["ann", "bob"], lambda _: arrays)
        assert (ADAPTER_RECORD in ann.content) == (attempt == 2)
        assert ADAPTER_RECORD in bob.content and bob.metadata.dst_node_id == 6
    assert read_task(ann).from_kept == {}
    assert read_task(bob).client_id == "bob"
    assert read_task(bob).from_kept == {LOCAL: Kept(0, "cd", 0)}
    assert roster.traffic.by_client["bob"]["adapter_bytes_down"] > 0


def test_who_gets_an_adapter_of_its_own_holds_what_it_said_last():
    roster, arrays = Roster({"ann": 5, "bob": 6}), pack_state(STATE)
    roster.gets_own_state = lambda client: client == "ann"
    roster.held = {"ann": "own", "bob": "own"}
    asked = (TASK, MessageType.TRAIN, ["ann", "bob"], lambda _: arrays)
    ann, bob = roster.messages(*asked)
    assert ADAPTER_RECORD not in ann.content and read_task(ann).global_sha256 == "own"
    assert ADAPTER_RECORD in bob.content and read_task(bob).global_sha256 == "ab"
    ann, _ = roster.messages(*asked)
    assert ADAPTER_RECORD in ann.content


def test_a_client_can_move_to_another_node():
    roster = Roster({"ann": 5, "bob": 6})
    roster.move("ann", 9)
    (message,) = roster.messages(TASK, MessageType.TRAIN, ["ann"], lambda _: None)
    assert message.metadata.dst_node_id == 9
    assert roster.sender(Message(RecordDict(), reply_to=message)) == "ann"
    assert roster.sender(Message(RecordDict(), reply_to=build_request())) == UNKNOWN


def test_the_bytes_of_a_message_grow_by_what_is_put_in():
    task = Task("", 0, "", False, "run", "", "", "", "{}")  # with empty texts, as at registration
    without, arrays = count_bytes(build_task_content(task))
    assert without > 60 and arrays == 0
    packed = pack_state(STATE)
    both, arrays = count_bytes(build_task_content(task, packed))
    assert arrays == sum(len(array.data) for array in packed.values())
    assert both == without + arrays + sum(map(len, packed))
    longer, _ = count_bytes(
        build_task_content(Task("", 0, "", False, "run" + 18 * "x", "", "", "", "{}"))
    )
    assert longer == without + 18


def test_traffic_is_counted_by_client_and_direction():
    traffic, request = Traffic(), build_request()
    request.content = build_task_content(
        Task("ann", 1, "", False, "r", "", "", "", "{}"), pack_state(STATE)
    )
    traffic.add("ann", "down", request)
    reply = build_reply(request, "ann", 1, {"num-examples": 3}, {}, STATE, shapes=SHAPES)
    traffic.add("ann", "up", reply)
    traffic.add("bob", "up", build_error_reply(request, "bob", "out of paper"))
    traffic.add("cy", "up", Message(Error(code=0), reply_to=request))
    ann, bob = traffic.by_client["ann"], traffic.by_client["bob"]
    assert ann["adapter_bytes_up"] == ann["adapter_bytes_down"] == count_bytes(request.content)[1]
    assert ann["bytes_down"] == count_bytes(request.content)[0] > ann["adapter_bytes_down"]
    assert bob["bytes_up"] > len("out of paper") and bob["bytes_down"] == 0
    assert set(traffic.by_client["cy"].values()) == {0}
