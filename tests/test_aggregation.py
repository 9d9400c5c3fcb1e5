"""Every aggregation rule through whole rounds: what travels, what is kept, and resuming."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import build_tiny_config
from flwr.app import Error, Message
from loopback import Federation
from observation import find_windows
from safetensors.torch import load_file

from fedlora_app.config.loading import parse_config
from fedlora_app.config.participation import training_clients
from fedlora_app.config.schema import GLOBAL
from fedlora_app.evaluation.choices import Evaluator, open_round
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.evaluation.score_store import ScoreStore
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.messages import UPDATE_RECORD
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.federation.rules import RULES, build_rule
from fedlora_app.model.adapters import get_state
from fedlora_app.model.ranks import rank_axis, take_ranks
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.paths import MEMORY_FILE
from fedlora_app.runs.reading import load_run
from fedlora_app.serving.conversation import open_conversation
from fedlora_app.serving.export import export_adapter

CLIENTS = ("ann", "bob", "cy")
WEIGHTS = "adapter_model.safetensors"
IN_FAST_TESTS = ("svd", "share-a", "residual")


def configure(rule: str, clients=CLIENTS, of_clients=None, **federated):
    """Return the tiny experiment under a rule, without evaluation.

    Args:
        of_clients: settings by client.
    """
    if rule == "trimmed-mean":
        federated["trim_share"] = 0.34
    settings = {
        "federated": {"aggregation": rule, **federated},
        "evaluation": {"interval": 0},
        "data": {"conflict_test": None},
    }
    if of_clients:
        plain = build_tiny_config(clients).federated.clients
        settings["federated"]["clients"] = [
            client.model_dump() | of_clients.get(client.id, {}) for client in plain
        ]
    return build_tiny_config(clients, **settings)


def adapter_files(run):
    paths = sorted(run.rglob("*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def updates_in(federation, server_round: int):
    """Return what each client sent in a round, and the examples that it counts."""
    found = {}
    whole = {key: tensor.shape for key, tensor in server_state(federation.path, 0).items()}
    shapes = Aggregation(federation.config, whole).update_shapes(None, server_round)
    (grid,) = federation.grids
    for reply in grid.received:
        about = reply.content.config_records["about"]
        if UPDATE_RECORD in reply.content and about["server-round"] == server_round:
            update = unpack_state(reply.content.array_records[UPDATE_RECORD], shapes, "a client")
            found[about["client-id"]] = (update, reply.content["metrics"]["num-examples"])
    return found


def server_state(run, server_round: int):
    return load_file(run / "server" / f"round_{server_round:03d}" / WEIGHTS)


def entries(run, server_round: int, phase: str):
    """Return each client's metrics of a phase."""
    history = json.loads((run / "history.json").read_text())
    found = [e for e in history if (e["round"], e["phase"]) == (server_round, phase)]
    return {entry["client"]: entry["metrics"] for entry in found}


def global_state(run, project, client: str):
    """Return the client's global adapter as evaluation has it answer."""
    saved = open_round(load_run(run), project)
    model = SavedModel(saved.run, saved.server_round, saved.root)
    with model.answering(saved.own(client)) as (adapted, _):
        return get_state(adapted, GLOBAL)


def interrupt_in_round(server_round: int):
    """Return what stops the run once the first client has trained in a round."""

    def tamper(message, reply):
        about = reply.content.config_records["about"]
        if UPDATE_RECORD in reply.content and about["server-round"] == server_round:
            raise KeyboardInterrupt
        return reply

    return tamper


@pytest.mark.parametrize(
    "rule",
    [r if r in IN_FAST_TESTS else pytest.param(r, marks=pytest.mark.slow) for r in RULES],
)
def test_a_run_is_what_the_rule_says_and_resumes_to_the_byte(rule, tiny_project, tmp_path):
    config = configure(rule)
    whole = Federation(tiny_project, tmp_path / "whole", config)
    run = whole.run()
    expected = build_rule(config)
    for server_round in (1, 2):
        expected.begin(server_state(run, server_round - 1), server_round)
        for client, (update, weight) in updates_in(whole, server_round).items():
            expected.add(client, update, weight)
        result = expected.result()
        for key, tensor in server_state(run, server_round).items():
            torch.testing.assert_close(tensor, result[key], rtol=0, atol=1e-6)
    stopped = Federation(tiny_project, tmp_path / "stopped", config)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tamper=interrupt_in_round(2))
    again = stopped.run(resume=str(stopped.path))
    assert adapter_files(again) == adapter_files(run)
    kept = {path.name for path in run.rglob(MEMORY_FILE)}
    assert kept == ({MEMORY_FILE} if rule == "rest-of-world" else set())


@pytest.mark.slow
def test_fedalt_answers_with_the_mean_of_the_others_and_its_own(tiny_project, tmp_path):
    """As ``conf/study-methods.yaml`` has it: the local adapter beside that mean, then a mixer."""
    config = configure("rest-of-world").dump()
    config["training"] |= {"schedule": "mixed", "local_mixing_weight": 0.5, "global_epochs": 2}
    config["evaluation"] |= {"protocol": "core"}
    run = Federation(tiny_project, tmp_path, parse_config(config)).run()
    examples = {c: m["train_global/num_examples"] for c, m in entries(run, 2, "global").items()}
    reports = load_run(run).manifest["clients"]
    assert examples == {
        c: r["universal_examples"] + r["local_examples"] for c, r in reports.items()
    }
    found = evaluate_round(
        open_round(load_run(run), tiny_project, combine="mixer"), lambda *_: None
    )
    assert found["combination"] == "mixer"
    owners = {row["adapters"] for row in found["swap_table"] if row["client"] == "ann"}
    assert {"base", "global", "global+local:ann"} <= owners
    kept = load_file(run / "clients" / "ann" / "mixer" / "mixer.safetensors")
    assert all(matrix.abs().sum() > 0 for matrix in kept.values())


class TestGlobalAdaptersOfTheirOwn:
    """What stays with a client stays there, and is what its answers are made with."""

    @pytest.mark.parametrize("rule", ["share-a", "share-b"])
    def test_one_factor_is_the_mean_and_the_other_the_client_s(self, rule, tiny_project, tmp_path):
        federation = Federation(tiny_project, tmp_path, configure(rule, ("ann", "bob")))
        run = federation.run()
        mark = ".lora_A." if rule == "share-a" else ".lora_B."
        shared, first = server_state(run, 2), server_state(run, 0)
        states = {client: global_state(run, tiny_project, client) for client in ("ann", "bob")}
        for key, tensor in shared.items():
            ann, bob = (states[client][key] for client in ("ann", "bob"))
            if mark in key:
                assert torch.equal(ann, tensor) and torch.equal(bob, tensor)
            else:
                assert torch.equal(tensor, first[key]) and not torch.equal(ann, bob)
        kept = [
            tensor.numpy()
            for path in (run / "clients").glob("*/global/round_00[12]/*.safetensors")
            for key, tensor in load_file(path).items()
            if mark not in key
        ]
        assert len(kept) == 2 * 2 * len(shared) / 2
        grid = federation.grids[0]
        assert find_windows(kept, grid.bytes_received() + grid.bytes_sent()) == 0
        final = load_file(run / "final" / "globals" / "ann" / WEIGHTS)
        assert all(torch.equal(final[key], states["ann"][key]) for key in final)
        saved = SavedModel(load_run(run), 2, tiny_project)
        open_conversation(saved, "ann", max_new_tokens=2).ask("Which office is red?")

    def test_each_gets_the_mean_of_the_others_once_a_round(self, tiny_project, tmp_path):
        run = Federation(tiny_project, tmp_path, configure("rest-of-world")).run()
        states = [global_state(run, tiny_project, client) for client in CLIENTS]
        for key, tensor in server_state(run, 2).items():
            assert not torch.equal(states[0][key], states[1][key])
            assert not torch.equal(states[0][key], tensor)
        traffic = entries(run, 2, "traffic")
        assert {m["adapter_bytes_down"] for m in traffic.values()} == {
            m["adapter_bytes_up"] for m in traffic.values()
        }

    @pytest.mark.parametrize("rule", ["share-a", "rest-of-world"])
    def test_an_export_has_it_and_says_whether_it_is_private(self, rule, tiny_project, tmp_path):
        run = Federation(tiny_project, tmp_path, configure(rule, ("ann", "bob"))).run()
        saved = SavedModel(load_run(run), 2, tiny_project)
        export_adapter(saved, "ann", tmp_path / "alone", scale=0)
        exported = load_file(tmp_path / "alone" / WEIGHTS)
        own = global_state(run, tiny_project, "ann")
        for key, tensor in own.items():
            factor = 2 if ".lora_B." in key else 1  # alpha / rank, which an export multiplies in
            assert torch.equal(exported[key], factor * tensor)
        card = (tmp_path / "alone" / "README.md").read_text()
        assert ("a factor that ann trained and never sends" in card) == (rule == "share-a")
        assert ("made of the others' updates" in card) == (rule == "rest-of-world")

    def test_one_client_s_answers_are_not_taken_for_another_s(self, tiny_project, tmp_path):
        run = Federation(tiny_project, tmp_path, configure("share-a", ("ann", "bob"))).run()
        saved = open_round(load_run(run), tiny_project)
        evaluator = Evaluator(saved, ScoreStore(tmp_path / "scores", "x"), lambda *_: None)
        keys = {evaluator._identify(saved.alone(client)) for client in ("ann", "bob")}
        assert len(keys) == 2 and all(key.startswith("global ") for key in keys)


def test_clients_of_lower_rank_train_and_answer_with_it(tiny_project, tmp_path):
    config = configure("svd", of_clients={"ann": {"rank": 2}})
    run = Federation(tiny_project, tmp_path, config).run()
    traffic = entries(run, 2, "traffic")
    for direction in ("up", "down"):
        ann, bob = (traffic[c][f"adapter_bytes_{direction}"] for c in ("ann", "bob"))
        assert ann < 0.8 * bob
    ann, bob = (global_state(run, tiny_project, client) for client in ("ann", "bob"))
    server = server_state(run, 2)
    for key, tensor in server.items():
        assert torch.equal(bob[key], tensor)
        assert torch.equal(take_ranks(ann, 0, 2)[key], take_ranks(server, 0, 2)[key])
        assert not take_ranks(ann, 2, 4)[key].any()


@pytest.mark.parametrize("rule", ["freeze-a", "alternate", "share-a"])
def test_half_of_the_adapter_travels_up_and_down(rule, tiny_project, tmp_path):
    config = configure(rule, ("ann", "bob"), num_rounds=3)
    federation = Federation(tiny_project, tmp_path, config)
    run = federation.run()
    whole = entries(run, 0, "traffic")["ann"]["adapter_bytes_down"]
    for server_round in (1, 2, 3):
        traffic = entries(run, server_round, "traffic")["ann"]
        for direction in ("up", "down"):
            assert 0.3 < traffic[f"adapter_bytes_{direction}"] / whole < 0.7
    before, after = server_state(run, 2), server_state(run, 3)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    mark = ".lora_A." if rule == "share-a" else ".lora_B."
    assert changed == {key for key in after if mark in key}


def test_who_has_lost_what_a_part_is_laid_over_gets_the_whole(tiny_project, tmp_path):
    config = configure("freeze-a", ("ann", "bob"))
    plain = Federation(tiny_project, tmp_path / "plain", config).run()
    federation = Federation(tiny_project, tmp_path / "lost", config)

    def lose(message, reply):
        if UPDATE_RECORD in reply.content:
            shutil.rmtree(federation.path / "clients" / "ann" / "received", ignore_errors=True)
        return reply

    run = federation.run(tamper=lose)
    lost = entries(run, 1, "traffic")["ann"]["adapter_bytes_down"]
    assert lost > 1.4 * entries(plain, 1, "traffic")["ann"]["adapter_bytes_down"]
    assert adapter_files(run) == adapter_files(plain)


@pytest.mark.parametrize("rule", ["alternate", "residual"])
def test_what_rounding_leaves_waits_until_its_factor_travels(rule, tiny_project, tmp_path):
    """Two rounds of nf4 through real messages: of half an adapter, and beside a frozen part."""
    config = configure(rule, ("ann", "bob"), upload_dtype="nf4", num_rounds=3)
    run = Federation(tiny_project, tmp_path, config).run()
    left = [
        load_file(run / "clients" / "ann" / "feedback" / f"round_{n:03d}.safetensors")
        for n in (1, 2, 3)
    ]
    shapes = {k: t.shape for k, t in take_ranks(server_state(run, 0), 0, 4).items()}
    assert {key: tensor.shape for key, tensor in left[1].items()} == shapes
    if rule == "alternate":  # B travels in the first and third round, A in the second
        of_b = [{k: t for k, t in found.items() if ".lora_B." in k} for found in left]
        assert set(left[0]) == set(of_b[0])
        assert all(torch.equal(of_b[1][key], of_b[0][key]) for key in of_b[0])
        assert not all(torch.equal(of_b[2][key], of_b[0][key]) for key in of_b[0])


def test_nothing_is_left_to_send_where_ranks_become_other_directions(tiny_project, tmp_path):
    config = configure("svd", ("ann", "bob"), upload_dtype="nf4")
    run = Federation(tiny_project, tmp_path, config).run()
    assert not list(run.rglob("feedback")) and len(load_run(run).manifest["rounds"]) == 3


def test_who_fails_after_training_goes_on_with_its_own_factor(tiny_project, tmp_path):
    config = configure("share-a", ("ann", "bob"), num_rounds=3, min_clients=1)

    def lose_evaluation(message, reply):
        about = reply.content.config_records["about"]
        is_lost = (about["client-id"], about["server-round"]) == ("bob", 1)
        if not is_lost or UPDATE_RECORD in reply.content:
            return reply
        return Message(Error(0, "lost"), reply_to=message)

    def tamper(message, reply):
        lost = lose_evaluation(message, reply)
        return lost if lost is not reply else interrupt_in_round(2)(message, reply)

    run = Federation(tiny_project, tmp_path / "whole", config).run(tamper=lose_evaluation)
    failed = [e["round"] for e in load_run(run).manifest["rounds"] if e.get("failures")]
    assert failed == [1]
    saved = SavedModel(load_run(run), 1, tiny_project)
    assert saved.global_sha256("bob")
    stopped = Federation(tiny_project, tmp_path / "stopped", config)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tamper=tamper)
    assert adapter_files(stopped.run(resume=str(stopped.path))) == adapter_files(run)


def test_a_server_optimizer_is_of_averages_alone(tiny_project, tmp_path):
    finals = []
    for name in ("none", "adam"):
        settings = {"mode": "centralized", "num_rounds": 1, "server_optimizer": name}
        config = configure("fedavg", ("ann", "bob"), **settings)
        finals.append(server_state(Federation(tiny_project, tmp_path / name, config).run(), 1))
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_a_frozen_part_answers_and_is_not_trained(tiny_project, tmp_path):
    run = Federation(tiny_project, tmp_path, configure("stack", ("ann", "bob"))).run()
    rank, num_clients = 4, 2
    for server_round in (1, 2):
        state = server_state(run, server_round)
        for key, tensor in state.items():
            assert tensor.shape[rank_axis(key)] == rank + num_clients * rank
            if ".lora_B." in key:
                assert not tensor[:, :rank].any() and tensor[:, rank:].any()
    config = json.loads((run / "final" / "global" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 24)  # PEFT loads it as one adapter
    state = global_state(run, tiny_project, "ann")
    assert all(torch.equal(state[key], tensor) for key, tensor in server_state(run, 2).items())


class TestWhoTakesPart:
    def test_a_sample_of_the_clients_trains_and_all_fit_their_own(self, tiny_project, tmp_path):
        config = configure("fedavg", fraction=0.5)
        run = Federation(tiny_project, tmp_path, config).run()
        for server_round in (1, 2):
            trained = set(entries(run, server_round, "global"))
            assert trained == set(training_clients(config, server_round)) and len(trained) == 2
            assert set(entries(run, server_round, "local")) == set(CLIENTS)

    def test_clients_join_and_leave(self, tiny_project, tmp_path):
        of_clients = {"ann": {"last_round": 1}, "bob": {"first_round": 2}}
        config = configure("fedavg", of_clients=of_clients)
        run = Federation(tiny_project, tmp_path, config).run()
        for phase in ("global", "local", "evaluate"):
            assert set(entries(run, 1, phase)) == {"ann", "cy"}
            assert set(entries(run, 2, phase)) == {"bob", "cy"}
        assert load_run(run).local_round(2, "ann") == 1
        (about_ann,) = [p for p in read_what_is_left(run).problems if "ann" in p]
        assert about_ann.startswith("ann left after round 1, with the local adapter")
        assert not any(entry.get("failures") for entry in load_run(run).manifest["rounds"])

    @pytest.mark.parametrize(
        ("weighting", "weights"), [("equal", (1, 1, 1)), ("given", (0.5, 2.0, 1.0))]
    )
    def test_updates_count_as_the_weighting_says(self, weighting, weights, tiny_project, tmp_path):
        by_client = dict(zip(CLIENTS, weights, strict=True))
        of_clients = {c: {"weight": w} for c, w in by_client.items()}
        config = configure(
            "fedavg",
            of_clients=of_clients if weighting == "given" else None,
            weighting=weighting,
            num_rounds=1,
        )
        federation = Federation(tiny_project, tmp_path, config)
        run = federation.run()
        updates = updates_in(federation, 1)
        before, after = server_state(run, 0), server_state(run, 1)
        for key in after:
            mean = sum(w * updates[c][0][key] for c, w in by_client.items()) / sum(weights)
            torch.testing.assert_close(after[key], before[key] + mean, rtol=0, atol=1e-6)


def test_a_server_optimizer_goes_on_after_a_stop(tiny_project, tmp_path):
    config = configure("fedavg", ("ann", "bob"), server_optimizer="adam")
    run = Federation(tiny_project, tmp_path / "whole", config).run()
    stopped = Federation(tiny_project, tmp_path / "stopped", config)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tamper=interrupt_in_round(2))
    assert adapter_files(stopped.run(resume=str(stopped.path))) == adapter_files(run)
    assert (run / "server" / "round_002" / MEMORY_FILE).is_file()
