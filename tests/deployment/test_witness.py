"""A federation in which the server and every client keep a log of their own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import build_tiny_config
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from loopback import Federation, LoopbackGrid

from fedlora_app.deployment.audit import compare_logs, read_log
from fedlora_app.deployment.audit_pages import describe_log
from fedlora_app.deployment.evidence import Evidence, EvidenceError
from fedlora_app.deployment.record import EVIDENCE_VARIABLE
from fedlora_app.deployment.witness import describe_reason
from fedlora_app.federation.digest import Digester
from fedlora_app.federation.messages import TASK_RECORD, UPDATE_RECORD, read_task
from fedlora_app.strategy import RoundError

CLIENTS = {11: "ann", 12: "bob"}


@dataclass
class Recorded:
    federation: Federation
    folder: Path

    def log(self, end: str) -> Path:
        return self.folder / f"{end}.jsonl"

    def run(self, **changes) -> Path:
        """Run with a log for each end; in one process the environment says whose turn it is."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(EVIDENCE_VARIABLE, str(self.log("server")))
            push = LoopbackGrid.push_messages

            def push_to_client(grid, messages):
                messages = list(messages)
                client = CLIENTS[messages[0].metadata.dst_node_id]
                os.environ[EVIDENCE_VARIABLE] = str(self.log(client))
                try:
                    return push(grid, messages)
                finally:
                    os.environ[EVIDENCE_VARIABLE] = str(self.log("server"))

            patch.setattr(LoopbackGrid, "push_messages", push_to_client)
            return self.federation.run(**changes)


def build_recorded(project: Path, folder: Path, **federated) -> Recorded:
    config = build_tiny_config(federated={"num_rounds": 1} | federated)
    return Recorded(Federation(project, folder / "results", config), folder)


@pytest.fixture(scope="module")
def recorded(tiny_project, tmp_path_factory) -> Recorded:
    recorded = build_recorded(tiny_project, tmp_path_factory.mktemp("recorded"))
    recorded.run()
    return recorded


def test_what_one_end_sent_is_what_the_other_received(recorded):
    server = read_log(recorded.log("server"))
    for client in CLIENTS.values():
        log = read_log(recorded.log(client))
        comparison = compare_logs(server, log)
        assert comparison.clients == [client]
        assert not comparison.contradictions and not comparison.undelivered
        # Who it is, registration, evaluation of the base, training, evaluation: there and back.
        assert comparison.num_agreed == 10
        assert compare_logs(log, server) == comparison


def test_the_server_says_what_ran_and_who_took_part(recorded):
    entries = read_log(recorded.log("server")).entries
    assert [entries[0]["event"], entries[-1]["event"]] == ["run_started", "run_ended"]
    assert entries[0]["clients"] == ["ann", "bob"] and entries[0]["resumed_after"] is None
    assert {"fedlora-app", "flwr", "python"} <= set(entries[0]["versions"])
    joined = [(e["client"], e["node"]) for e in entries if e["event"] == "joined"]
    assert joined == [("ann", "11"), ("bob", "12")]
    at_clients = read_log(recorded.log("ann")).entries
    received = [e for e in at_clients if e["event"] == "received"]
    assert {e["package_sha256"] for e in received} == {entries[0]["package_sha256"]}
    first, *others = [e["config_sha256"] for e in received]
    assert first not in others and len(set(others)) == 1  # nobody's settings, and then its own


def test_bytes_are_those_of_the_arrays(recorded):
    messages = recorded.federation.grids[0].received
    (update,) = {
        sum(len(array.data) for array in m.content.array_records[UPDATE_RECORD].values())
        for m in messages
        if UPDATE_RECORD in m.content.array_records
    }
    entries = read_log(recorded.log("bob")).entries
    sent = [e for e in entries if e["event"] == "sent"]
    assert [e["bytes"] for e in sent] == [0, 0, 0, update, 0]
    assert [bool(e["sha256"]) for e in sent] == [False, False, False, True, False]
    assert "num-examples" in sent[3]["metrics"] and all(e["rest_sha256"] for e in sent)


def test_no_log_holds_a_text_a_prompt_or_the_name_of_a_file(recorded, tiny_project):
    private = {"You are ann.", "You are bob.", "ann_local", "universal_test", "What is the"}
    private |= {str(tiny_project), str(recorded.federation.output_dir)}
    for path in tiny_project.glob("*.json"):
        for item in json.loads(path.read_text()):
            private |= {item[key] for key in ("instruction", "output") if key in item}
    for end in ("server", *CLIENTS.values()):
        text = recorded.log(end).read_text()
        assert len(text) > 3000
        assert not [secret for secret in private if secret in text]


def test_an_update_that_changed_on_the_way_is_found(tiny_project, tmp_path):
    recorded = build_recorded(tiny_project, tmp_path)

    def change(message, reply):
        if UPDATE_RECORD in reply.content.array_records and read_task(message).client_id == "bob":
            record = reply.content.array_records[UPDATE_RECORD]
            key = next(iter(record))
            record[key] = Array(record[key].numpy() + np.float32(1e-3))
        return reply

    recorded.run(tamper=change)
    server = read_log(recorded.log("server"))
    assert not compare_logs(server, read_log(recorded.log("ann"))).contradictions
    (found,) = compare_logs(server, read_log(recorded.log("bob"))).contradictions
    assert found == (
        "run, round 1, reply to train, bob: the site sent something else than the coordinator "
        "received (sha256)."
    )


def test_a_cut_end_shows_against_the_other_log(recorded, tmp_path):
    """The chain of what is left is whole."""
    lines = recorded.log("ann").read_bytes().splitlines(keepends=True)
    (tmp_path / "ann.jsonl").write_bytes(b"".join(lines[:-2]))
    cut = read_log(tmp_path / "ann.jsonl")
    assert cut.fault is None
    comparison = compare_logs(read_log(recorded.log("server")), cut)
    assert comparison.contradictions == [
        "run, round 1, reply to evaluate, ann: the coordinator has received it, and the site's "
        "log has not sent it."
    ]
    assert comparison.undelivered == [
        "run, round 1, evaluate, ann: the coordinator sent it, and the site has not got it."
    ]


def test_failures_are_entered_without_their_texts(tiny_project, tmp_path, capsys):
    recorded = build_recorded(tiny_project, tmp_path, min_clients=1)
    path = recorded.federation.output_dir / "run" / "clients" / "bob"

    def lose(message, reply):
        if read_task(message).client_id == "bob" and message.metadata.message_type == "train":
            for folder in path.glob("round_*"):
                (folder / "adapter_model.safetensors").unlink()
        return reply

    recorded.run(tamper=lose)
    entries = read_log(recorded.log("server")).entries
    (failed,) = [e for e in entries if e["event"] == "not_counted"]
    assert (failed["client"], failed["what"], failed["round"]) == ("bob", "failure", 1)
    (reply,) = [e for e in entries if e.get("is_error")]
    (sent,) = [e for e in read_log(recorded.log("bob")).entries if e.get("is_error")]
    assert reply["why_sha256"] == sent["why_sha256"] and "why" not in reply
    assert "never silently restarted" in capsys.readouterr().out
    assert "restarted" not in recorded.log("server").read_text() + recorded.log("bob").read_text()


def test_a_run_that_ends_with_an_error_says_so(tiny_project, tmp_path):
    recorded = build_recorded(tiny_project, tmp_path)

    def gone(message, reply):
        if message.metadata.message_type == "train":
            recorded.federation.grids[0].refused.add(12)
        return reply

    with pytest.raises(RoundError):
        recorded.run(tamper=gone)
    entries = read_log(recorded.log("server")).entries
    (missed,) = [e for e in entries if e["event"] == "no_reply"]
    assert missed["client"] == "bob" and missed["why"].startswith("Flower did not accept")
    assert (entries[-1]["event"], entries[-1]["error"]) == ("run_failed", "RoundError")


def test_a_client_that_cannot_keep_evidence_sends_nothing(tiny_project, tmp_path, capsys):
    recorded = build_recorded(tiny_project, tmp_path)
    recorded.log("bob").mkdir()
    with pytest.raises(ValueError, match="its evidence cannot be written") as refused:
        recorded.run()
    assert str(tmp_path) not in str(refused.value)
    assert "Nothing is sent without evidence of it." in capsys.readouterr().out


def test_logs_that_have_nothing_in_common_are_refused(recorded, tmp_path):
    Evidence(tmp_path / "other.jsonl").add("approved", client="ann")
    server = read_log(recorded.log("server"))
    for other in (read_log(tmp_path / "other.jsonl"), server):
        with pytest.raises(EvidenceError, match="nothing to compare"):
            compare_logs(server, other)


def test_the_command_prints_every_round_and_ends_with_status_2_if_something_is_wrong(
    recorded, tmp_path, fedlora
):
    server, ann = recorded.log("server"), recorded.log("ann")
    status, out, _ = fedlora("deploy", "audit", server, "--against", ann)
    assert status == 0
    assert "The chain is whole." in out and "run, round 1" in out
    assert "10 messages and replies are the same" in out
    status, out, _ = fedlora("deploy", "audit", ann, "--against", server, "--json")
    dumped = json.loads(out)
    assert status == 0 and dumped["fault"] is None and dumped["compared"]["num_agreed"] == 10
    assert [page["round"] for page in dumped["rounds"]] == [0, 1]

    broken = tmp_path / "broken.jsonl"
    lines = server.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join(lines[:5] + lines[6:]))
    status, out, _ = fedlora("deploy", "audit", broken)
    assert status == 2 and "BROKEN at line 6: removed before it: entry 5." in out
    assert fedlora("deploy", "audit", ann, "--against", broken)[0] == 2
    assert fedlora("deploy", "audit", tmp_path / "none.jsonl")[0] == 2


def test_what_a_policy_refused_stands_on_the_page_of_its_round(recorded, tmp_path):
    path = tmp_path / "ann.jsonl"
    path.write_bytes(recorded.log("ann").read_bytes())
    Evidence(path).add("refused", client="ann", round=1, rules={"rounds": "3 are asked for"})
    *_, page = describe_log(read_log(path)).split("run, round ")
    assert page.startswith("1") and "refused: client ann, round 1, rules rounds 3 are" in page
    words = "ann: its policy refuses: rounds, upload_dtype"
    assert describe_reason(words)["why"] == "its policy refuses: rounds, upload_dtype"
    assert "why" not in describe_reason("ann: its policy refuses: what Mrs Smith said!")


def test_a_digest_survives_the_wire_and_sees_every_change():
    def build(**changes):
        values = {
            "value": np.ones((2, 3), np.float32),
            "key": "a",
            "round": 1,
            "loss": 0.1,
        } | changes
        return RecordDict(
            {
                "arrays": ArrayRecord(
                    {values["key"]: Array(values["value"]), "b": Array(np.ones(2))}
                ),
                TASK_RECORD: ConfigRecord({"round": values["round"], "raw": b"\0", "none": []}),
                "metrics": MetricRecord({"loss": values["loss"], "each": [1, 0]}),
            }
        )

    first = Digester().digest(build())
    assert Digester().digest(recorddict_from_proto(recorddict_to_proto(build()))) == first
    flat = np.ones(6, np.float32)
    changes = [{"value": 1.5 * flat.reshape(2, 3)}, {"value": flat.reshape(3, 2)}, {"key": "c"}]
    for change in [*changes, {"value": flat.reshape(2, 3).view(np.int32)}]:
        assert Digester().digest(build(**change)).sha256 != first.sha256
    for change in ({"round": 2}, {"loss": 0.2}):
        changed = Digester().digest(build(**change))
        assert changed.sha256 == first.sha256 and changed.rest_sha256 != first.rest_sha256


def test_an_adapter_for_many_clients_is_hashed_once(monkeypatch):
    from fedlora_app.federation import digest as digest_module

    counted = []
    original = digest_module.hash_arrays
    monkeypatch.setattr(digest_module, "hash_arrays", lambda r: counted.append(1) or original(r))
    arrays, digester = ArrayRecord({"a": Array(np.ones(2))}), Digester()
    found = {digester.digest(RecordDict({"adapter": arrays})) for _ in range(5)}
    found.add(digester.digest(RecordDict({"adapter": ArrayRecord({"a": Array(np.ones(2))})})))
    assert len(found) == 1 and len(counted) == 2
