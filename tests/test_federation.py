"""Invariants of a federation, over the real apps, messages and strategy in one process."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import ALIKE, build_tiny_config
from deployment.sites import build_bare_config, build_federation
from flwr.app import Array, Error, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from loopback import Federation, LoopbackGrid
from observation import find_windows
from safetensors.torch import load_file

from fedlora_app import client as client_module
from fedlora_app import client_app
from fedlora_app.client import Client
from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import GLOBAL, LOCAL, ConfigError
from fedlora_app.evaluation import client_round, room
from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.federation import registration
from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    METRIC_RECORD,
    UPDATE_RECORD,
    MessageError,
    build_need_reply,
    read_task,
)
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.model import base as model_module
from fedlora_app.model.adapters import lora_layers
from fedlora_app.model.base import ModelError
from fedlora_app.report.page import write_report
from fedlora_app.runs import client_folder
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import load_run
from fedlora_app.strategy import GlobalAdapterFedAvg, RoundError

WEIGHTS = "adapter_model.safetensors"


def server_state(run, server_round):
    return load_file(run / "server" / f"round_{server_round:03d}" / WEIGHTS)


def local_state(run, client, server_round):
    return load_file(run / "clients" / client / f"round_{server_round:03d}" / WEIGHTS)


def adapter_bytes(run):
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.parent.name.startswith(("round_", "global", "ann", "bob", "cy"))
        and path.name != "run.json"  # by which runs of one name are told apart
    }


MEASURED = re.compile(r".*seconds|(.*/)?peak_memory_bytes|bytes_(down|up)")
"""What differs from run to run: the last because of the run's name and the process id."""


def metric_rows(run):
    rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    return sorted(row for row in rows if not MEASURED.fullmatch(row[3]))


def entries(run, phase):
    history = json.loads((run / "history.json").read_text())
    return [entry for entry in history if entry["phase"] == phase]


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def train_replies(grid):
    return [reply for reply in grid.received if UPDATE_RECORD in reply.content.array_records]


def updates_in(replies, like, dtype="float32"):
    """Return the update in each reply; ``like`` is a state of the same tensors."""
    shapes = {key: tensor.shape for key, tensor in like.items()}
    records = [reply.content.array_records[UPDATE_RECORD] for reply in replies]
    return [unpack_state(record, shapes, "a client", dtype) for record in records]


def test_the_global_adapter_moves_by_the_weighted_mean_of_the_deltas(finished):
    """The predecessor never trained its global adapter: B stayed zero."""
    run = finished.path
    before, after = server_state(run, 0), server_state(run, 1)
    assert not any(before[key].any() for key in before if "lora_B" in key)
    assert all(after[key].any() for key in after if "lora_B" in key)
    replies = train_replies(finished.grids[0])[:2]
    counts = [reply.content.metric_records[METRIC_RECORD]["num-examples"] for reply in replies]
    assert counts == [4, 4]
    updates = updates_in(replies, before)
    for key in before:
        mean = sum(c * u[key] for c, u in zip(counts, updates, strict=True)) / sum(counts)
        torch.testing.assert_close(after[key] - before[key], mean, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def unequal(tiny_project, tmp_path_factory):
    """A finished run of two clients with 4 and 3 examples of what the global adapter learns."""
    folder = tmp_path_factory.mktemp("unequal")
    federation = Federation(tiny_project, folder, build_tiny_config(("ann", "cy")))
    federation.run()
    return federation


def test_weights_count_the_examples_of_the_global_phase_only(unequal):
    run = unequal.path
    counts = {}
    for entry in json.loads((run / "history.json").read_text()):
        if "num-examples" in entry["metrics"]:
            counts[entry["client"]] = entry["metrics"]["num-examples"]
    assert counts == {"ann": 4, "cy": 3}  # and not 7 and 8 with the local records
    before, after = server_state(run, 0), server_state(run, 1)
    ann, cy = updates_in(train_replies(unequal.grids[0])[:2], before)
    for key in before:
        mean = (4 * ann[key] + 3 * cy[key]) / 7
        torch.testing.assert_close(after[key] - before[key], mean, rtol=0, atol=1e-6)


def test_bf16_uploads_are_half_the_bytes_and_means_of_what_was_sent(tiny_project, tmp_path):
    config = build_tiny_config(federated={"upload_dtype": "bfloat16", "num_rounds": 1})
    federation = Federation(tiny_project, tmp_path, config)
    run = federation.run()
    before, after = server_state(run, 0), server_state(run, 1)
    ann, bob = updates_in(train_replies(federation.grids[0]), before, "bfloat16")
    for key in before:
        mean = (ann[key] + bob[key]) / 2
        torch.testing.assert_close(after[key] - before[key], mean, rtol=0, atol=1e-6)
    metrics = entries(run, "traffic")[-1]["metrics"]
    header = 128  # of the .npy format
    payload = metrics["adapter_bytes_down"] - header
    assert metrics["adapter_bytes_up"] - header == payload / 2


def test_a_local_adapter_continues_from_its_last_round(federation, monkeypatch):
    """The predecessor saved it under one name, looked under another, and began anew."""
    from fedlora_app import client

    prepared = []
    original = client.set_state

    def record(model, name, state):
        prepared.append((name, {key: tensor.clone() for key, tensor in state.items()}))
        original(model, name, state)

    monkeypatch.setattr(client, "set_state", record)
    run = federation.run()
    used = [state for name, state in prepared if name == "local"]
    rounds = [(0, None), (1, 0), (1, 0), (2, 1), (2, 1)]
    expected = [
        local_state(run, name, source if source is not None else server_round)
        for server_round, source in rounds
        for name in ("ann", "bob")
    ]
    assert len(used) == len(expected)
    assert all(equal(one, other) for one, other in zip(used, expected, strict=True))
    for name in ("ann", "bob"):
        states = [local_state(run, name, server_round) for server_round in range(3)]
        assert not equal(states[0], states[1]) and not equal(states[1], states[2])
        final = load_file(run / "final" / "clients" / name / WEIGHTS)
        assert equal(final, states[2])


def test_a_missing_local_adapter_stops_the_round(federation):
    def remove_local(message, reply):
        if message.metadata.message_type == "evaluate" and len(federation.grids[0].sent) == 6:
            folder = federation.output_dir / "run" / "clients" / "ann" / "round_000"
            (folder / WEIGHTS).unlink()
        return reply

    with pytest.raises(RoundError, match="never silently restarted"):
        federation.run(tamper=remove_local)


def test_nothing_of_one_client_reaches_another(tiny_project, tmp_path):
    """Without averaging, every client's result must be that of a federation of its own."""
    together = Federation(tiny_project, tmp_path / "all", _local_only(("ann", "bob", "cy"))).run()
    for client in ("ann", "bob", "cy"):
        alone = Federation(tiny_project, tmp_path / client, _local_only((client,))).run()
        for server_round in range(3):
            assert equal(
                local_state(together, client, server_round),
                local_state(alone, client, server_round),
            )


def _local_only(clients):
    return build_tiny_config(
        clients, federated={"mode": "local-only"}, data={"conflict_test": None}
    )


def test_each_phase_moves_only_its_adapter(federation, monkeypatch):
    from fedlora_app import client
    from fedlora_app.model.adapters import get_state

    moves = []
    original = client.train_phase

    def watch(model, examples, training, **settings):
        before = {name: get_state(model, name) for name in ("global", "local")}
        result = original(model, examples, training, **settings)
        moved = [n for n in before if not equal(before[n], get_state(model, n))]
        moves.append((settings["active"], settings["trainable"], moved))
        return result

    monkeypatch.setattr(client, "train_phase", watch)
    federation.run()
    round_moves = [(("global",), ("global",), ["global"])] * 2
    round_moves += [(("global", "local"), ("local",), ["local"])] * 2
    assert moves == round_moves * 2


def test_no_local_adapter_is_in_any_message(tiny_project, tmp_path, monkeypatch):
    """Plant a pattern in the local adapter and search everything that clients sent."""
    planted = 1.2345678
    pattern = torch.full((2,), planted).numpy().tobytes()
    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    original = client_folder.save_adapter

    def plant(folder, model, name, state, base_name):
        if name == "global":
            return original(folder, model, name, state, base_name)
        key = next(key for key in state if "lora_A" in key)
        state[key].fill_(planted)
        sha256 = original(folder, model, name, state, base_name)
        assert pattern in (folder / WEIGHTS).read_bytes()
        return sha256

    monkeypatch.setattr(client_folder, "save_adapter", plant)
    run = federation.run()
    sent = federation.grids[0].bytes_received()
    assert len(sent) > 10_000
    assert pattern not in sent + federation.grids[0].bytes_sent()
    for client in ("ann", "bob"):
        for server_round in range(3):
            for tensor in local_state(run, client, server_round).values():
                assert tensor.numpy().tobytes() not in sent or not tensor.any()
    state = server_state(run, 0)
    for reply in federation.grids[0].received:
        assert set(reply.content.array_records) <= {UPDATE_RECORD}
    updates_in(train_replies(federation.grids[0]), state)  # and holds the global tensors alone
    for text in (b"says red", b"What is the", b"You are ann"):  # data and prompts
        assert text not in sent


def test_the_same_seed_gives_the_same_bytes_in_any_order(finished, federation, monkeypatch):
    first = finished.path
    original = GlobalAdapterFedAvg.__init__

    def shuffle(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.serving_order = self.serving_order[::-1]

    monkeypatch.setattr(GlobalAdapterFedAvg, "__init__", shuffle)
    second = federation.run()
    served = [
        [m.metadata.dst_node_id for m in each.grids[0].sent[4:6]] for each in (finished, federation)
    ]
    assert served == [[11, 12], [12, 11]]
    assert adapter_bytes(first) == adapter_bytes(second)
    assert len(adapter_bytes(first)) == 2 * (3 + 2 * 3 + 3)
    assert metric_rows(first) == metric_rows(second)


def test_in_the_local_phase_alone_the_adapters_are_weighed(finished, federation, monkeypatch):
    """As FedDPA trains them; afterwards both are what they were."""
    scalings, original = [], client_module.train_phase

    def watch(model, examples, settings, *, trainable, **others):
        layer = lora_layers(model, GLOBAL)[0]
        scalings.append((trainable, layer.scaling[GLOBAL], layer.scaling[LOCAL]))
        return original(model, examples, settings, trainable=trainable, **others)

    monkeypatch.setattr(client_module, "train_phase", watch)
    run = federation.run(config=build_tiny_config(training={"local_mixing_weight": 0.25}))
    assert scalings == [*[((GLOBAL,), 2, 2)] * 2, *[((LOCAL,), 1.5, 0.5)] * 2] * 2
    assert equal(server_state(run, 2), server_state(finished.path, 2))
    assert not equal(local_state(run, "ann", 2), local_state(finished.path, "ann", 2))


def test_another_seed_gives_other_bytes(finished, federation):
    first = finished.path
    other = federation.run(config=build_tiny_config(experiment={"seed": 8}))
    assert not equal(server_state(first, 0), server_state(other, 0))
    assert not equal(local_state(first, "ann", 0), local_state(first, "bob", 0))


def test_the_base_is_loaded_once(federation):
    model_module._resident.clear()
    loads = model_module.num_loads
    config = build_tiny_config(federated={"num_rounds": 1})
    federation.run("one", config)
    federation.run("two", config)
    assert model_module.num_loads == loads + 1


@pytest.fixture(scope="module")
def federation_by_mode(finished, tiny_project, tmp_path_factory):
    """Finished federations of every mode, with the same clients and rounds."""
    federations = {"dual": finished}
    for mode in ("fedavg", "finetuned", "local-only", "centralized"):
        adapters = ALIKE if mode == "finetuned" else {}
        config = build_tiny_config(federated={"mode": mode}, adapters=adapters)
        federations[mode] = Federation(tiny_project, tmp_path_factory.mktemp(mode), config)
        federations[mode].run()
    return federations


@pytest.fixture(scope="module")
def finished_by_mode(federation_by_mode):
    """Their run directories."""
    return {mode: federation.path for mode, federation in federation_by_mode.items()}


@pytest.mark.parametrize(
    ("mode", "evaluated", "senders", "locals_kept", "error"),
    [
        ("fedavg", {"global"}, {"ann", "bob"}, False, pytest.approx(0.5, abs=0.5)),
        ("finetuned", {"global", "local"}, {"ann", "bob"}, True, pytest.approx(0.5, abs=0.5)),
        ("local-only", {"local"}, set(), True, None),
        ("centralized", {"global"}, {"ann"}, False, 0.0),
    ],
)
def test_the_baselines(finished_by_mode, mode, evaluated, senders, locals_kept, error):
    run = finished_by_mode[mode]
    history = json.loads((run / "history.json").read_text())
    labels = {name.split("/")[0] for e in history for name in e["metrics"] if name.count("/") == 2}
    assert labels == {"base"} | evaluated
    assert {e["client"] for e in history if "num-examples" in e["metrics"]} == senders
    assert (run / "clients").exists() == locals_kept
    assert equal(server_state(run, 0), server_state(run, 2)) == (mode == "local-only")
    server = [entry["metrics"] for entry in entries(run, "aggregate")]
    assert [metrics.get("aggregation_error") for metrics in server] == [None, error, error]
    assert all(metrics["round_seconds"] > 0 for metrics in server)


def test_all_modes_take_the_same_number_of_steps(finished_by_mode):
    steps = {
        mode: sum(
            value
            for entry in json.loads((run / "history.json").read_text())
            for name, value in entry["metrics"].items()
            if name.endswith("/num_steps")
        )
        for mode, run in finished_by_mode.items()
    }
    assert len(set(steps.values())) == 1, steps


def test_fine_tuning_follows_the_last_average_with_the_steps_of_all_local_phases(finished_by_mode):
    phases = {
        mode: [
            (entry["round"], entry["phase"], steps)
            for entry in json.loads((finished_by_mode[mode] / "history.json").read_text())
            for name, steps in entry["metrics"].items()
            if name.endswith("/num_steps") and entry["client"] == "bob"
        ]
        for mode in ("dual", "finetuned")
    }
    # 4 universal and 4 local records, 2 a step: 2 steps of a global phase, 4 of a local one.
    assert phases["dual"] == [(r, p, n) for r in (1, 2) for p, n in (("global", 2), ("local", 4))]
    assert phases["finetuned"] == [(1, "global", 2), (2, "global", 2), (2, "local", 8)]


def test_what_is_fine_tuned_is_a_copy_of_the_average(tiny_project, tmp_path):
    """So small a learning rate changes no weight, and leaves what it began with."""
    config = build_tiny_config(
        federated={"mode": "finetuned", "num_rounds": 1},
        adapters=ALIKE,
        training={"learning_rate": 1e-30},
    )
    client = Client(config, "ann", tmp_path / "run", tiny_project)
    generator = torch.Generator().manual_seed(3)
    average = {
        key: 0.1 * torch.randn(shape, generator=generator)
        for key, shape in client.global_shapes().items()
    }
    client.personalise(1, average, {})
    assert equal(local_state(tmp_path / "run", "ann", 1), average)


def test_a_fine_tuned_copy_stays_with_its_client(federation_by_mode):
    run, grid = federation_by_mode["finetuned"].path, federation_by_mode["finetuned"].grids[0]
    average = server_state(run, 2)
    needles = []
    for client in ("ann", "bob"):
        copy = local_state(run, client, 2)
        assert not equal(copy, average)
        needles += [tensor.numpy() for tensor in copy.values()]
        needles += [(copy[key] - average[key]).numpy() for key in copy]
    files = [p for p in run.rglob("*") if p.is_file() and "clients" not in p.parts]
    seen = [grid.bytes_received(), grid.bytes_sent(), *(path.read_bytes() for path in files)]
    assert not any(find_windows(needles, content) for content in seen)
    assert find_windows(needles, (run / "final" / "clients" / "bob" / WEIGHTS).read_bytes())


def test_who_has_no_fine_tuned_copy_is_named(tiny_project, tmp_path, capsys):
    config = build_tiny_config(
        federated={"mode": "finetuned", "num_rounds": 1, "min_clients": 1}, adapters=ALIKE
    )

    def lose(message, reply):
        is_last = message.metadata.message_type == "evaluate" and read_task(message).server_round
        if is_last and read_task(message).client_id == "bob":
            return Message(Error(0, "gone"), reply_to=message)
        return reply

    run = Federation(tiny_project, tmp_path, config).run(tamper=lose)
    said = "bob did not report in the last round and has no copy that was fine-tuned after it"
    assert said in capsys.readouterr().out
    assert any(said in problem for problem in read_what_is_left(run).problems)
    assert open_round(load_run(run), tiny_project).absent == ("bob",)  # and is not asked


def test_the_joint_schedule_refreshes_local_against_the_final_global(federation):
    config = build_tiny_config(training={"schedule": "joint"})
    run = federation.run(config=config)
    phases = [
        (entry["round"], entry["phase"])
        for entry in json.loads((run / "history.json").read_text())
        if entry["client"] == "ann" and entry["phase"] not in ("evaluate", "traffic")
    ]
    assert phases == [(1, "global+local"), (2, "global+local"), (2, "local")]


def test_the_run_directory_holds_what_the_contract_names(finished):
    run = finished.path
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "manifest.json", "metrics.jsonl", "history.json", "history.csv"} <= names
    assert (finished.output_dir / "latest").resolve() == run.resolve()
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["round"] for entry in manifest["rounds"]] == [0, 1, 2]
    assert set(manifest["rounds"][2]["adapters"]) == {"global", "local:ann", "local:bob"}
    assert manifest["finished"] and manifest["versions"]["torch"]
    header, *rows = (run / "history.csv").read_text().splitlines()
    assert header == "round,client,phase,metric,value" and len(rows) > 50
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"time", "event", "round", "client", "phase"} <= set(events[0])
    assert run.stat().st_mode & 0o077 == 0


def test_run_config_keys_do_what_they_say(federation, tmp_path):
    federation.run(
        "named",
        **{"mode": "local-only", "num-rounds": 1, "output-dir": str(tmp_path / "elsewhere")},
        overrides="training.learning_rate=1e-4 adapters.local.rank=3",
    )
    config = json.loads((tmp_path / "elsewhere" / "named" / "config.json").read_text())
    assert config["federated"]["mode"] == "local-only"
    assert config["federated"]["num_rounds"] == 1
    assert config["training"]["learning_rate"] == 1e-4
    assert config["adapters"]["local"]["rank"] == 3


def test_all_faults_of_a_run_configuration_are_one_error(federation):
    with pytest.raises(ConfigError, match="has 2 faults") as caught:
        federation.run(mode="duel", overrides="training.epoch=1")
    assert "federated.mode" in str(caught.value)
    assert "training.epoch: unknown key" in str(caught.value)
    assert not federation.path.exists()


def test_public_records_hold_the_pair_near_the_global_adapter(finished, tiny_project, tmp_path):
    """They are read and hashed like the rest, reach the local phase alone, and change it."""
    public = [{"instruction": f"Say {n}.", "output": f"{n}, as asked."} for n in ("one", "two")]
    (tmp_path / "public.json").write_text(json.dumps(public))
    training = finished.config.training.model_dump() | {"local_kl_weight": 5.0, "replay": 0}
    config = build_tiny_config(training=training, data={"public": str(tmp_path / "public.json")})
    run = Federation(tiny_project, tmp_path, config).run()
    assert server_state(run, 1).keys() == server_state(finished.path, 1).keys()
    assert equal(server_state(run, 2), server_state(finished.path, 2))
    penalties = [e["metrics"]["train_local/penalty"] for e in entries(run, "local")]
    assert len(penalties) == 4 and all(penalty > 0 for penalty in penalties)
    steps = [e["metrics"]["train_local/num_steps"] for e in entries(run, "local")]
    assert set(steps) == {3, 4}  # 3 or 4 local records and as many public ones, two a step
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["clients"]["ann"]["sha256/public"]
    asked = build_tiny_config(training=training, data={"public": "universal_test.json"})
    Federation(tiny_project, tmp_path, asked).run("asked")
    manifest = json.loads((tmp_path / "asked" / "manifest.json").read_text())
    findings = manifest["clients"]["ann"]["findings"]
    assert {"test-in-training"} == {
        f["rule"]
        for f in findings
        if f["file"] == "universal_test.json" and f["severity"] == "error"
    }


def test_an_existing_run_is_left_alone(finished):
    run = finished.path
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match="exists already and is left as it is"):
        finished.run()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_traffic_is_what_the_grid_saw(finished):
    run = finished.path
    grid = finished.grids[0]
    seen = {}
    for direction, messages in (("down", grid.sent[4:]), ("up", grid.received[4:])):
        # After who asks for its own settings has registered; 2 clients take turns.
        for index, message in enumerate(messages):
            server_round = (index // 2 + 1) // 2  # one pair in round 0, then two in each
            metadata = message.metadata
            node = metadata.dst_node_id if direction == "down" else metadata.src_node_id
            counts = seen.setdefault((server_round, {11: "ann", 12: "bob"}[node]), {})
            content = message.content
            arrays = sum(
                len(array.data)
                for record in content.array_records.values()
                for array in record.values()
            )
            size = len(recorddict_to_proto(content).SerializeToString())
            for name, value in (
                (f"bytes_{direction}", size),
                (f"adapter_bytes_{direction}", arrays),
            ):
                counts[name] = counts.get(name, 0) + value
    traffic = {(e["round"], e["client"]): e["metrics"] for e in entries(run, "traffic")}
    assert set(traffic) == set(seen) == {(r, c) for r in range(3) for c in ("ann", "bob")}
    for key, counts in traffic.items():
        for direction in ("down", "up"):
            name = f"adapter_bytes_{direction}"
            assert counts[name] == seen[key][name]
            # Flower counts no field numbers and lengths, and 8 bytes for each number of a list.
            total = counts[f"bytes_{direction}"]
            assert total == pytest.approx(seen[key][f"bytes_{direction}"], rel=0.1)
            assert total > counts[name]
    assert traffic[0, "ann"]["adapter_bytes_up"] == 0
    once = traffic[0, "ann"]["adapter_bytes_down"]
    assert traffic[1, "ann"]["adapter_bytes_down"] == once
    assert traffic[1, "ann"]["adapter_bytes_up"] == once


@pytest.mark.parametrize("clients_at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_average_is_sent_once_and_again_to_who_has_lost_it(
    tiny_project, tmp_path, clients_at_once
):
    """A client keeps it for its next training, and asks for it where it cannot be read."""
    settings = {"num_rounds": 3, "clients_at_once": clients_at_once}
    federation = Federation(tiny_project, tmp_path, build_tiny_config(federated=settings))
    kept = tmp_path / "run" / "clients" / "bob" / "received" / WEIGHTS

    def damage(message, reply):
        task = read_task(message)
        kind = message.metadata.message_type
        if (task.client_id, task.server_round, kind) == ("bob", 1, "evaluate"):
            kept.write_bytes(kept.read_bytes()[:-1] + b"!")
        if (task.client_id, task.server_round, kind) == ("bob", 2, "evaluate"):
            shutil.rmtree(kept.parent)
        return reply

    run = federation.run(tamper=damage)
    brings = {}
    for message in federation.grids[0].sent[4:]:
        task = read_task(message)
        key = task.client_id, task.server_round, message.metadata.message_type
        brings.setdefault(key, []).append(bool(message.content.array_records))
    asked_again = {("bob", 2, "train"), ("bob", 3, "train")}
    for key, arrays in brings.items():
        assert arrays == ([False, True] if key in asked_again else [key[2] == "evaluate"])
    assert asked_again < set(brings)
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    lost = [(e["round"], e["client"]) for e in events if e["event"] == "lost_adapter"]
    assert lost == [(2, "bob"), (3, "bob")]
    rounds = json.loads((run / "manifest.json").read_text())["rounds"]
    assert not any("failures" in entry for entry in rounds)
    traffic = {(e["round"], e["client"]): e["metrics"] for e in entries(run, "traffic")}
    down = {key: counts["adapter_bytes_down"] for key, counts in traffic.items()}
    assert down[2, "bob"] == 2 * down[2, "ann"] == 2 * down[1, "bob"]
    assert not list(run.glob("clients/*/received"))
    if clients_at_once == 1:
        whole = Federation(tiny_project, tmp_path / "whole", federation.config).run()
        assert adapter_bytes(run) == adapter_bytes(whole)


def test_who_loses_the_average_that_it_was_just_sent_has_failed(federation):
    def always_ask(message, reply):
        task = read_task(message)
        if (task.client_id, task.server_round) == ("bob", 1):
            return build_need_reply(message, "bob", 1)
        return reply

    with pytest.raises(RoundError, match="bob lost the global adapter that it was just sent"):
        federation.run(tamper=always_ask)
    asked = [read_task(m) for m in federation.grids[0].sent]
    assert [t.client_id for t in asked if t.server_round == 1] == ["ann", "bob", "bob"]


def test_the_aggregation_error_is_that_of_the_updates(unequal):
    run = unequal.path
    replies = train_replies(unequal.grids[0])[:2]
    before, after = server_state(run, 0), server_state(run, 1)
    sent = updates_in(replies, before)
    exact, products = {}, {}
    for a in (key for key in before if "lora_A" in key):
        b = a.replace("lora_A", "lora_B")
        mean = after[b] @ after[a]
        clients = [(before[b] + update[b]) @ (before[a] + update[a]) for update in sent]
        module = a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        exact[module] = (4 * clients[0] + 3 * clients[1]) / 7 - mean
        products[module] = mean
    (event, _) = [
        event
        for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if event["event"] == "aggregation"
    ]
    assert set(event["relative_error"]) == set(exact) and len(exact) == 7
    for module, value in event["relative_error"].items():
        assert 0.3 < value / (exact[module].norm() / products[module].norm()).item() < 3
    total = [sum(m.square().sum() for m in matrices.values()) for matrices in (exact, products)]
    server = [entry for entry in entries(run, "aggregate") if entry["round"] == 1]
    assert [entry["client"] for entry in server] == ["(server)"]
    error = server[0]["metrics"]["aggregation_error"]
    assert error == pytest.approx((total[0] / total[1]).sqrt().item(), rel=0.3)
    assert 0 < server[0]["metrics"]["aggregation_seconds"] < server[0]["metrics"]["round_seconds"]


def test_peak_memory_is_reported_for_every_phase_and_evaluation(finished):
    run = finished.path
    for phase, name in (
        ("global", "train_global/peak_memory_bytes"),
        ("local", "train_local/peak_memory_bytes"),
        ("evaluate", "peak_memory_bytes"),
    ):
        found = entries(run, phase)
        assert len(found) == (6 if phase == "evaluate" else 4)
        assert all(2**26 < entry["metrics"][name] < 2**40 for entry in found)


def test_a_tracked_run_shows_the_history_in_tensorboard(tiny_project, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = build_tiny_config(experiment={"track": ["tensorboard"]})
    run = Federation(tiny_project, tmp_path, config).run()
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {
        (event.step, tag): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()[1:]]
    assert len(shown) == len(rows) > 100
    for server_round, client, phase, metric, value in rows:
        tag = f"{phase}/{metric.removeprefix(f'train_{phase}/')}/{client}"
        assert shown[int(server_round), tag] == pytest.approx(float(value))


def test_trackers_are_closed_when_a_run_ends_with_an_error(tiny_project, tmp_path, monkeypatch):
    from fedlora_app.runs import tracking

    seen = []

    class Recorder:
        name = "tensorboard"

        def __init__(self, config, run_dir) -> None:
            seen.append("built")

        def log(self, event) -> None:
            seen.append(event["event"])

        def close(self) -> None:
            seen.append("closed")

    def lose(message, reply):
        if message.metadata.message_type == "train":
            del reply.content[UPDATE_RECORD]
        return reply

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Recorder)
    config = build_tiny_config(experiment={"track": ["tensorboard"]})
    with pytest.raises(RoundError):
        Federation(tiny_project, tmp_path, config).run(tamper=lose)
    assert seen[0] == "built" and seen[-1] == "closed" and seen.count("closed") == 1
    assert {"metrics", "facts", "failure"} <= set(seen)


def test_a_tracker_that_is_not_installed_stops_a_run_before_anything(federation, monkeypatch):
    from fedlora_app.runs import tracking

    monkeypatch.setattr(tracking, "_is_installed", lambda name: False)
    config = build_tiny_config(experiment={"track": ["wandb"]})
    with pytest.raises(ConfigError, match="experiment.track names wandb, which is not installed"):
        federation.run(config=config)
    assert not (federation.output_dir / "run").exists()
    assert not federation.grids[0].sent


def test_long_work_says_how_far_it_is(federation, monkeypatch, capsys):
    from fedlora_app.foundation import progress

    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    federation.run()
    output = capsys.readouterr().out
    for line in (
        r"round 1/2, train: 1 of 2 clients, about \d+ s left",
        r"round 2/2, evaluate: 1 of 2 clients, about \d+ s left",
        r"ann, round 1, global: step 1/2, loss \d\.\d{3}, \d+ s left",
        r"bob, round 2, evaluation \[global\+local\]: \d/10 prompts, \d+ s left",
    ):
        assert re.search(rf"^{line}$", output, re.MULTILINE), output


class TestFaultyClients:
    """One client of three misbehaves in round 1."""

    @pytest.fixture
    def federation(self, tiny_project, tmp_path):
        return Federation(tiny_project, tmp_path, build_tiny_config(("ann", "bob", "cy")))

    def spoil(self, change):
        def tamper(message, reply):
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 12:
                change(reply)
            return reply

        return tamper

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda r: _arrays(r).popitem(), "sent another adapter"),
            (lambda r: _replace(r, lambda a: a * float("nan")), "not finite"),
            (lambda r: _replace(r, lambda a: a * 1e13), "probably diverged"),
            (lambda r: _replace(r, lambda a: a[:1]), "in an array of shape (1,), expected"),
            (lambda r: _replace(r, lambda a: a.astype("float64")), "float64, expected float32"),
            (lambda r: _metrics(r).update({"num-examples": 0}), "0 examples"),
            (lambda r: _metrics(r).update({"num-examples": 1.5}), "1.5 examples"),
            (lambda r: _metrics(r).update({"num-examples": 10**6}), "at registration it had"),
            (lambda r: r.content.pop(UPDATE_RECORD), "sent no update"),
            (lambda r: r.content[ABOUT_RECORD].update({"server-round": 7}), "for round 7"),
            (lambda r: r.content[ABOUT_RECORD].update({"client-id": "ann"}), "as 'ann'"),
        ],
    )
    def test_a_bad_reply_stops_the_run_with_its_sender(self, federation, change, expected):
        with pytest.raises(RoundError) as caught:
            federation.run(tamper=self.spoil(change))
        text = str(caught.value)
        assert "Round 1: 2 of 3 clients returned valid results and 3 are required" in text
        assert "bob" in text and expected in text
        run = federation.output_dir / "run"
        manifest = json.loads((run / "manifest.json").read_text())
        assert [entry["round"] for entry in manifest["rounds"]] == [0]
        assert not (run / "server" / "round_001").exists()

    def test_with_fewer_required_the_others_are_averaged_by_their_weights(self, federation):
        config = build_tiny_config(("ann", "bob", "cy"), federated={"min_clients": 2})
        spoil = self.spoil(lambda r: _replace(r, lambda a: a * float("nan")))
        run = federation.run(config=config, tamper=spoil)
        before, after = server_state(run, 0), server_state(run, 1)
        replies = train_replies(federation.grids[0])
        ann, cy = updates_in([replies[0], replies[2]], before)
        for key in before:
            mean = (4 * ann[key] + 3 * cy[key]) / 7
            torch.testing.assert_close(after[key] - before[key], mean, rtol=0, atol=1e-6)
        manifest = json.loads((run / "manifest.json").read_text())
        assert "not finite" in manifest["rounds"][1]["failures"]["bob"]

    @pytest.mark.parametrize(
        ("schedule", "kind", "fact"),
        [
            ("phased", "evaluate", "local_adapter"),
            ("phased", "evaluate", "global_adapter"),
            ("joint", "train", "local_adapter"),
        ],
    )
    def test_who_does_not_say_what_it_has_kept_has_failed(self, federation, schedule, kind, fact):
        """Else the next round would go on from an older adapter without a word."""

        def leave_out(message, reply):
            task, about = read_task(message), reply.content.config_records[ABOUT_RECORD]
            metadata = message.metadata
            if (metadata.dst_node_id, task.server_round) == (
                12,
                1,
            ) and kind in metadata.message_type:
                facts = json.loads(about["facts"])
                del facts[fact]
                about["facts"] = json.dumps(facts)
            return reply

        config = build_tiny_config(("ann", "bob", "cy"), training={"schedule": schedule})
        with pytest.raises(RoundError, match=f"bob did not say which {fact.replace('_', ' ')} it"):
            federation.run(config=config, tamper=leave_out)

    def test_a_reply_that_is_sent_twice_counts_once(self, finished, tiny_project, tmp_path):
        federation = Federation(tiny_project, tmp_path, finished.config)
        strategy_calls = []
        original = GlobalAdapterFedAvg.aggregate_train

        def repeat(self, server_round, replies):
            replies = list(replies)
            strategy_calls.append(len(replies))
            return original(self, server_round, [*replies, replies[0]])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GlobalAdapterFedAvg, "aggregate_train", repeat)
            run = federation.run()
        assert strategy_calls == [2, 2]
        assert equal(server_state(run, 2), server_state(finished.path, 2))
        manifest = json.loads((run / "manifest.json").read_text())
        assert not any("failures" in entry for entry in manifest["rounds"])
        assert not entries(run, "failure")
        assert not any(
            "continued without" in problem for problem in read_what_is_left(run).problems
        )
        events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        unasked = [(e["round"], e["client"]) for e in events if e["event"] == "unasked_reply"]
        assert unasked == [(1, "ann"), (2, "ann")]


def _arrays(reply):
    return reply.content.array_records[UPDATE_RECORD]


def _metrics(reply):
    return reply.content.metric_records[METRIC_RECORD]


def _replace(reply, change):
    record = _arrays(reply)
    ((key, array),) = record.items()
    record[key] = Array(change(array.numpy()))


def test_what_an_unexpected_error_says_stays_at_the_client(federation, monkeypatch):
    from fedlora_app import client

    def fail(*args, **kwargs):
        raise KeyError("the text of a private record")

    monkeypatch.setattr(client, "train_phase", fail)
    with pytest.raises(RoundError, match="ann: KeyError in builtins; this client's log has"):
        federation.run()
    assert b"private record" not in federation.grids[0].bytes_received()


def test_a_reply_that_cannot_be_decoded_names_its_sender(federation):
    def cut(message, reply):
        if message.metadata.message_type == "train":
            record = _arrays(reply)
            ((key, array),) = record.items()
            record[key] = Array(array.dtype, tuple(array.shape), array.stype, array.data[:40])
        return reply

    with pytest.raises(RoundError, match="ann sent .* as a damaged array"):
        federation.run(tamper=cut)


def test_a_clients_folder_is_its_own_and_never_overwritten(finished, federation):
    """In a deployment the run directory is new at the server and may be old at a client."""
    assert (finished.path / "clients" / "ann").stat().st_mode & 0o077 == 0
    shutil.copytree(finished.path / "clients" / "ann", federation.path / "clients" / "ann")
    with pytest.MonkeyPatch.context() as patch:
        from fedlora_app.runs.directory import RunDirectory

        patch.setattr(RunDirectory, "require_absent", staticmethod(lambda path: None))
        with pytest.raises(ValueError, match=r"ann: .*clients/ann exists already"):
            federation.run()


class TestRegistration:
    """Bad input is reported before anything is loaded, and no run directory is made."""

    def test_all_clients_faults_come_together(self, tiny_project, tmp_path):
        clients = build_tiny_config().dump()["federated"]["clients"]
        clients[0]["local_train"] = "nowhere.json"
        (tmp_path / "bad.json").write_text(json.dumps([{"instruction": "x", "output": ""}]))
        clients[1]["universal_train"] = str(tmp_path / "bad.json")
        clients[1]["local_test"] = "gone.json"
        config = build_tiny_config(federated={"clients": clients})
        federation = Federation(tiny_project, tmp_path, config)
        with pytest.raises(ValueError) as caught:
            federation.run()
        text = str(caught.value)
        assert "ann: " in text and "nowhere.json does not exist" in text
        assert "bob: " in text and 'record 1: "output" is empty' in text
        assert "gone.json does not exist" in text
        assert not (tmp_path / "run").exists()

    def test_the_base_model_s_fault_comes_with_those_of_the_data(self, tiny_project, tmp_path):
        clients = build_tiny_config(("ann", "bob")).dump()["federated"]["clients"]
        clients[1]["local_test"] = "gone.json"
        missing = {"model": {"name": "no/such/folder"}, "federated": {"clients": clients}}
        config = build_tiny_config(("ann", "bob"), **missing)
        with pytest.raises(ValueError) as caught:
            Federation(tiny_project, tmp_path, config).run()
        first, *lines = str(caught.value).splitlines()
        assert first == "The run cannot start:"
        assert lines[0].startswith(f"model.name: {tiny_project}/no/such/folder does not exist.")
        assert lines[1] == (
            f"bob: federated.clients.bob.local_test: {tiny_project}/gone.json does not exist."
        )
        assert len(lines) == 2  # what both clients find as well is said once
        assert caught.value.__cause__ is None and not (tmp_path / "run").exists()

    def test_a_conflict_record_of_an_unknown_client(self, tiny_project, tmp_path):
        config = build_tiny_config(("ann", "bob"), data={"conflict_test": "conflict.json"})
        with pytest.raises(
            ValueError, match="names 'cy', which is not a client. Clients: ann, bob"
        ):
            Federation(tiny_project, tmp_path, config).run()

    def test_an_error_in_the_question_sets_stops_the_run(self, tiny_project, tmp_path, capsys):
        config = build_tiny_config(data={"on_lint_error": "stop"})
        with pytest.raises(ValueError) as caught:
            Federation(tiny_project, tmp_path, config).run()
        text = str(caught.value)
        assert "ann_local.json: test-in-training" in text and "fedlora check" in text
        assert "red rule" not in text and "ann says" not in text  # what the file holds stays
        assert "error: ann_local.json, record 1" in capsys.readouterr().out
        assert not (tmp_path / "run").exists()

    def test_findings_are_in_the_manifest_without_their_texts(self, finished):
        manifest = json.loads((finished.path / "manifest.json").read_text())
        findings = manifest["clients"]["ann"]["findings"]
        assert {"severity": "error", "rule": "test-in-training", "file": "ann_local.json"} in [
            {k: v for k, v in finding.items() if k != "record"} for finding in findings
        ]
        sent = finished.grids[0].bytes_received()
        assert b"test-in-training" in sent
        assert b"red rule" not in sent and b"also stands" not in sent

    def test_a_client_that_does_not_say_what_it_has(self, federation):
        def forget(message, reply):
            _metrics(reply).pop("local_examples", None)
            return reply

        with pytest.raises(MessageError, match="did not say how many local_examples it has"):
            federation.run(tamper=forget)

    def test_two_nodes_that_are_one_client(self, federation):
        from fedlora_app import client_app

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_app, "identify_client", lambda context, config: "ann")
            with pytest.raises(ValueError, match='Two nodes are the client "ann"'):
                federation.run()

    def test_other_code_at_a_client(self, federation):
        from fedlora_app import client_app

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_app, "PACKAGE_SHA256", "other")
            with pytest.raises(ValueError, match="other code than this client"):
                federation.run()

    def test_a_missing_base_model_names_both_ways_out(self, tiny_project, tmp_path):
        config = build_tiny_config(model={"name": "Qwen/Qwen2.5-7B-Instruct"})
        with pytest.raises(ValueError, match="hf download Qwen/Qwen2.5-7B-Instruct.*local folder"):
            Federation(tiny_project, tmp_path, config).run()

    def test_truncation_is_reported(self, tiny_project, tmp_path, capsys):
        config = build_tiny_config(training={"max_seq_length": 40}, data={"skip_invalid": True})
        Federation(tiny_project, tmp_path, config).run()
        assert "examples were cut at 40 tokens" in capsys.readouterr().out


def test_rounds_between_evaluations_are_trained_and_not_evaluated(tiny_project, tmp_path, capsys):
    config = build_tiny_config(
        federated={"num_rounds": 3},
        evaluation={"batch_size": 8, "max_new_tokens": 4, "interval": 2},
    )
    run = Federation(tiny_project, tmp_path, config).run()
    history = json.loads((run / "history.json").read_text())
    scored = {
        entry["round"]
        for entry in history
        if any(name.endswith("/exact_match") for name in entry["metrics"])
    }
    trained = {entry["round"] for entry in history if entry["phase"] == "local"}
    assert scored == {0, 2, 3} and trained == {1, 2, 3}
    output = capsys.readouterr().out
    assert re.search(r"round 0/3 \[base\] .* \(\d+ s\)", output)
    assert re.search(r"round 1/3 not evaluated \(\d+ s, about \d+ s left\)", output)
    assert re.search(r"round 3/3 \[global\+local\] .* \(\d+ s\)", output)


def test_the_ablation_trains_local_adapters_as_the_run_itself_did(finished, tmp_path):
    """So its figures are those of whole runs, at the price of their local phases."""
    from fedlora_app.client import Client
    from fedlora_app.demo.ablation import load_global_states, retrain
    from fedlora_app.foundation.files import WEIGHTS_FILE

    run = finished.path
    states = load_global_states(run, finished.config, finished.project)
    for name in ("ann", "bob"):
        client = Client(finished.config, name, tmp_path / "again", finished.project)
        retrain(client, states)
        path = Path("clients", name, "round_002", WEIGHTS_FILE)
        assert (tmp_path / "again" / path).read_bytes() == (run / path).read_bytes()


def test_the_ablation_changes_one_thing_at_a_time_and_no_steps(finished):
    from fedlora_app.demo.ablation import VARIANTS, change, count_local_steps
    from fedlora_app.runs.reading import load_run

    run = load_run(finished.path)
    steps = count_local_steps(run, "ann")
    plain = change(run, finished.project, "", steps)
    assert (plain.adapters.gate, plain.training.replay) == ("none", 0)
    for name, overrides in VARIANTS.items():
        changed = change(run, finished.project, overrides, steps, "public.json")
        assert (changed == plain) == (name in ("nothing", "rank 2"))  # it has rank 2 anyway
        assert changed.training.max_steps == steps
    protected = {"max_replay_ratio": 0.1, "local_mixing_weight": 0.5, "local_kept_share": 0.5}
    raw = run.config.dump()
    raw["training"] |= protected
    other = replace(run, config=parse_config(raw))
    assert change(other, finished.project, VARIANTS["replay 1"], steps) == change(
        run, finished.project, VARIANTS["replay 1"], steps
    )


def test_the_ablation_reports_what_a_variant_reaches(tiny_project, tmp_path):
    from fedlora_app.demo.ablation import ablate

    questions = {
        "universal_validation": "universal_test.json",
        "conflict_validation": "conflict.json",
        "conflict_test": "conflict.json",
    }
    config = build_tiny_config(("ann", "bob", "cy"), federated={"num_rounds": 1}, data=questions)
    raw = config.dump()
    for client in raw["federated"]["clients"]:
        client["local_validation"] = client["local_test"]
    run = Federation(tiny_project, tmp_path, parse_config(raw)).run()
    figures = ablate(run, tiny_project, "gate", ["ann"])
    assert figures["steps"] >= 1
    assert {name for name in figures if name != "steps"} == {
        f"{part}/{name}"
        for part in ("validation", "test")
        for name in ("universal", "universal_unseen", "local", "conflict")
    }
    assert not (run / "ablation").exists()


def test_the_ablation_leaves_out_what_clients_are_not_asked(tiny_project, tmp_path):
    from fedlora_app.demo.ablation import ablate, tabulate

    config = build_tiny_config(federated={"num_rounds": 1}, evaluation={"interval": 0})
    raw = config.dump()
    raw["data"]["universal_test"] = None
    raw["federated"]["clients"][0]["local_validation"] = "ann_local.json"
    run = Federation(tiny_project, tmp_path, parse_config(raw)).run()
    figures = ablate(run, tiny_project, "nothing", ["ann"])
    assert figures.keys() == {"steps", "validation/local", "test/local"}
    (*_, row) = tabulate({"nothing": {"run": figures}})
    assert row.count("|") == 8 and row.split("|")[3].isspace()
    with pytest.raises(ConfigError, match="Client bob of .* has no validation questions"):
        ablate(run, tiny_project, "nothing")


def test_the_ablation_takes_no_other_run_for_one_of_its_name(finished, tmp_path):
    from fedlora_app.demo.ablation import name_run

    run = finished.path
    name = name_run(run, run.parent)
    assert name.startswith(f"{run.name}@") and name_run(run, tmp_path) != name
    again = tmp_path / run.name
    shutil.copytree(run, again)
    manifest = json.loads((again / "manifest.json").read_text())
    (again / "manifest.json").write_text(json.dumps(manifest | {"id": "another"}))
    assert name_run(again, tmp_path) == f"{run.name}@another"
    del manifest["id"]
    (again / "manifest.json").write_text(json.dumps(manifest))
    assert name_run(again, tmp_path) == run.name


def test_the_ablation_refuses_other_runs(tiny_project, tmp_path):
    from fedlora_app.demo.ablation import ablate

    config = build_tiny_config(federated={"mode": "fedavg", "num_rounds": 1})
    run = Federation(tiny_project, tmp_path, config).run()
    with pytest.raises(ConfigError, match="is not a phased run of mode dual"):
        ablate(run, tiny_project, "nothing")


def test_a_client_without_memory_begins_again_with_smaller_batches(
    finished, federation, monkeypatch, capsys
):
    """The steps see the same examples; only their sums are taken in smaller parts."""
    from fedlora_app.training import batches as training

    original, length = training.split_into_packs, federation.config.training.max_seq_length

    def full(examples, max_tokens):
        if max_tokens > length:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return original(examples, max_tokens)

    monkeypatch.setattr(training, "split_into_packs", full)
    run = federation.run("run")
    said = "out of memory with batches of 2; once more, and from here on, with 1 x 2"
    assert capsys.readouterr().out.count(said) == 2  # for each kind of phase
    rows = json.loads((run / "history.json").read_text())
    phases = [e["metrics"] for e in rows if e["phase"] == "global"]
    assert [m["train_global/memory_retries"] for m in phases] == [1, 0, 0, 0]
    assert {m["train_global/gradient_checkpointing"] for m in phases} == {1}
    for name in ("server/round_002", "clients/ann/round_002"):
        ours, theirs = (
            load_file(r / name / "adapter_model.safetensors") for r in (run, finished.path)
        )
        for key, tensor in theirs.items():
            assert torch.allclose(ours[key], tensor, atol=2e-3)
    assert "ran out of memory" in " ".join(read_what_is_left(run).problems)


def test_a_client_that_has_no_memory_at_all_says_what_to_lower(federation, monkeypatch):
    from fedlora_app.training import phase as training

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "compute_losses", full)
    with pytest.raises(RoundError, match=r"also with batches of 1 and.*training\.max_seq_length"):
        federation.run("run")


def test_an_evaluation_without_memory_goes_on_with_smaller_batches(
    finished, federation, tiny_project, monkeypatch, capsys
):
    """What a client reports is the same, and that it happened stands in the history."""
    monkeypatch.setattr(room, "_fitting", WeakKeyDictionary())  # other tests share the base model
    decoder = model_module.load_base_model(federation.config.model, tiny_project).model.base_model

    def check(module, args, settings):
        if len(settings["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = decoder.register_forward_pre_hook(check, with_kwargs=True)
    try:
        run = federation.run("run")
    finally:
        handle.remove()
    assert "Note: out of memory while generating" in capsys.readouterr().err
    retries = [e["metrics"].get("evaluation_memory_retries", 0) for e in entries(run, "evaluate")]
    assert retries[0] > 0
    for ours, theirs in zip(
        entries(run, "evaluate"), entries(finished.path, "evaluate"), strict=True
    ):
        for name, value in theirs["metrics"].items():
            if name.count("/") == 2:
                assert ours["metrics"][name] == pytest.approx(value, abs=1e-5), name
    assert "ran out of memory in evaluation" in " ".join(read_what_is_left(run).problems)


def test_rounds_before_the_last_ask_a_sample(tiny_project, tmp_path, capsys):
    clients = ("ann", "bob", "cy")
    config = build_tiny_config(clients, evaluation={"interval": 1, "sample": 2})
    run = Federation(tiny_project, tmp_path, config).run()
    asked: dict[str, list] = {"universal": [], "local": [], "conflict": []}
    verdicts = []
    for entry in entries(run, "evaluate"):
        label = "global+local" if entry["round"] else "base"
        for name, found in asked.items():
            found.append((entry["round"], entry["metrics"][f"{label}/{name}/n"]))
        each = entry["metrics"][f"{label}/conflict/exact_match_each"]
        verdicts.append((entry["round"], tuple(value >= 0 for value in each)))
    for name, most in (("universal", 6), ("local", 5), ("conflict", 3)):
        counts = {number: {n for r, n in asked[name] if r == number} for number in (0, 1, 2)}
        assert counts[0] == counts[1] == {2} and max(counts[2]) == most
    assert len({v for number, v in verdicts if number < 2}) == 1  # the same ones for everybody
    assert {v for number, v in verdicts if number == 2} == {(True,) * 3}
    out = capsys.readouterr().out
    assert "(of 2 questions a set at most; " in out
    assert "questions a set" not in next(x for x in out.splitlines() if "round 2/2" in x)


def test_no_memory_outside_of_training_names_what_to_lower(federation, monkeypatch):
    def full(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(client_round, "evaluate_questions", full)
    with pytest.raises(RoundError, match=r"outside of training\. Lower evaluation\.batch_size"):
        federation.run("run")


ONE_OF_TWO = {"min_clients": 1, "client_timeout_seconds": 0.2}


def build_late(tiny_project, tmp_path, appears_in: tuple[int, str], **federated):
    """A federation whose second client appears once the first has been asked for something."""
    config = build_tiny_config(federated={"num_rounds": 3} | ONE_OF_TWO | federated)
    federation = Federation(tiny_project, tmp_path, config)

    def appear(message, reply):
        task = read_task(message)
        if (task.server_round, message.metadata.message_type) == appears_in:
            federation.grids[-1].refused.clear()
        return reply

    return federation, appear


def test_a_client_that_is_not_there_at_the_start_joins_later(tiny_project, tmp_path, capsys):
    federation, appear = build_late(tiny_project, tmp_path, (1, "evaluate"))
    run = federation.run(tamper=appear, gone={12})
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["clients"]) == {"ann", "bob"}
    assert "sha256/local_train" in manifest["clients"]["bob"]
    assert [set(entry.get("failures", {})) for entry in manifest["rounds"]] == [
        {"bob"},
        {"bob"},
        set(),
        set(),
    ]
    assert "local:bob" in manifest["rounds"][2]["adapters"]
    assert (run / "final" / "clients" / "bob" / WEIGHTS).exists()
    updates = [e["client"] for e in entries(run, "global") if e["round"] == 2]
    assert sorted(updates) == ["ann", "bob"]
    output = capsys.readouterr().out
    assert "bob is not there, and is taken in as soon as it is." in output
    assert "bob joins from round 2 on." in output
    load_run(run)


def test_who_comes_late_does_not_write_over_another_run_of_the_name(tiny_project, tmp_path, capsys):
    """As where a coordinator begins anew in another folder while a site is away."""
    earlier = build_federation(tiny_project, tmp_path / "earlier", build_bare_config())
    earlier.run()
    bobs = earlier.own_files["bob"].parent / "store" / "run"
    before = {path: path.read_bytes() for path in bobs.rglob("*") if path.is_file()}
    assert bobs / "final" / "clients" / "bob" / WEIGHTS in before
    shutil.rmtree(earlier.output_dir)
    shutil.rmtree(earlier.own_files["ann"].parent / "store")
    config = build_bare_config(federated={"num_rounds": 3} | ONE_OF_TWO)
    federation = Federation(tiny_project, tmp_path / "again", config)
    federation.own_files = earlier.own_files

    def appear(message, reply):
        if read_task(message).server_round == 1:
            federation.grids[-1].refused.clear()
        return reply

    run = federation.run(tamper=appear, gone={12})
    assert {path: path.read_bytes() for path in bobs.rglob("*") if path.is_file()} == before
    rounds = json.loads((run / "manifest.json").read_text())["rounds"]
    assert all("bob" in entry["failures"] for entry in rounds)
    assert "is of another run of this name and is left as it is" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_no_message_reaches_what_a_client_keeps_of_another_run(tiny_project, tmp_path, kind):
    """A server may register under one name and then send another one."""
    federation = build_federation(tiny_project, tmp_path, build_bare_config())
    federation.run("first")
    stores = [own.parent / "store" / "first" for own in federation.own_files.values()]
    before = {p: p.read_bytes() for store in stores for p in store.rglob("*") if p.is_file()}
    deliver = federation.grid_class.push_messages

    class Renaming(federation.grid_class):
        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                record = message.content.config_records["task"]
                is_first = kind == "query" and not record["client_id"]
                if message.metadata.message_type == kind and (kind != "query" or is_first):
                    record["run_name"], record["resumes"] = "first", True
            return deliver(self, messages)

    federation.grid_class = Renaming
    refused = pytest.raises((ValueError, RoundError), match="is of another run of this name and")
    with refused:
        federation.run("second")
    after = {p: p.read_bytes() for store in stores for p in store.rglob("*") if p.is_file()}
    assert after == before


def test_a_file_with_a_tab_in_its_name_is_one_like_others(tiny_project, tmp_path):
    """What is found in it goes to the server, where no text may write over a terminal."""
    shutil.copy(tiny_project / "ann_local.json", tiny_project / "ann\tlocal.json")
    raw = build_tiny_config(federated={"num_rounds": 1}).dump()
    raw["federated"]["clients"][0]["local_test"] = "ann\tlocal.json"
    run = Federation(tiny_project, tmp_path, parse_config(raw)).run()
    findings = json.loads((run / "manifest.json").read_text())["clients"]["ann"]["findings"]
    assert {"ann local.json"} <= {finding["file"] for finding in findings}


def test_a_first_attempt_that_kept_nothing_blocks_no_second_one(
    tiny_project, tmp_path, monkeypatch
):
    """As where the base model cannot be loaded at the sites, and the coordinator begins anew."""
    federation = build_federation(tiny_project, tmp_path, build_bare_config())

    def fail(self):
        raise ModelError("no weights")

    with monkeypatch.context() as patched:
        patched.setattr(Client, "_load_model", fail)
        with pytest.raises(RoundError, match="no weights"):
            federation.run()
    shutil.rmtree(federation.path)
    assert (federation.run() / "final" / "global").is_dir()


def test_a_run_is_evaluated_without_a_client_that_never_came(tiny_project, tmp_path):
    federation, _ = build_late(tiny_project, tmp_path, (9, "never"))
    run = federation.run(gone={12})
    saved = open_round(load_run(run), tiny_project)
    assert saved.absent == ("bob",) and list(saved.files) == ["ann"]
    evaluation = evaluate_round(saved, lambda *_: None, full=False)
    assert {row["client"] for row in evaluation["questions"]} == {"ann"}
    asked = [row for row in evaluation["questions"] if row["question_set"] == "conflict"]
    assert all(len(row["candidates"]) > 1 for row in asked)  # bob's answer is still a wrong one
    assert any("without a local adapter of their own: bob." in n for n in evaluation["notes"])
    write_report(run)


def test_a_node_that_goes_while_it_registers_is_a_client_that_is_not_there(
    tiny_project, tmp_path, capsys
):
    federation, _ = build_late(tiny_project, tmp_path, (0, ""))

    def die(message, reply):
        is_bob = message.metadata.dst_node_id == 12
        if is_bob and read_task(message).client_id == "":
            return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
        return reply

    run = federation.run(tamper=die)
    manifest = json.loads((run / "manifest.json").read_text())
    assert list(manifest["clients"]) == ["ann"] and len(manifest["rounds"]) == 4
    assert "bob is not there, and is taken in as soon as it is." in capsys.readouterr().out


def test_a_late_client_with_another_base_model_has_failed_and_the_run_goes_on(
    tiny_project, tmp_path
):
    """Its update would be of the right shapes, and must not count."""
    federation, appear = build_late(tiny_project, tmp_path, (1, "evaluate"))

    def come_otherwise(message, reply):
        reply = appear(message, reply)
        about = reply.content.config_records.get("about", {})
        if about.get("client-id") == "bob" and "base_model" in str(about.get("facts")):
            facts = json.loads(about["facts"]) | {"base_model": "0" * 64}
            about["facts"] = json.dumps(facts)
        return reply

    run = federation.run(tamper=come_otherwise, gone={12})
    manifest = json.loads((run / "manifest.json").read_text())
    assert "bob holds another base model" in manifest["rounds"][2]["failures"]["bob"]
    updates = [e["client"] for e in entries(run, "global") if e["round"] == 2]
    assert updates == ["ann"] and len(manifest["rounds"]) == 4


def test_a_resumed_run_names_who_has_taken_part_and_is_not_there(tiny_project, tmp_path):
    federation, appear = build_late(tiny_project, tmp_path, (0, ""))
    federation.run(config=_until(federation.config, 1), tamper=appear)
    with pytest.raises(MessageError, match="bob: it has taken part, and its SuperNode is not"):
        federation.run(resume=str(federation.path), gone={12}, **{"num-rounds": 2})


@pytest.mark.parametrize("changes", [{"min_clients": None}, {"client_timeout_seconds": None}])
def test_without_both_settings_all_clients_are_waited_for(tiny_project, tmp_path, changes):
    federation, _ = build_late(tiny_project, tmp_path, (0, ""), **changes)
    polls = []

    def appear(seconds):
        polls.append(seconds)
        if len(polls) == 3:
            federation.grids[-1].refused.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.time, "sleep", appear)
        patch.setattr(registration.time, "monotonic", lambda: 1000.0 * len(polls))
        run = federation.run(gone={12})
    rounds = json.loads((run / "manifest.json").read_text())["rounds"]
    assert [entry.get("failures") for entry in rounds] == [None] * 4


def test_a_run_resumes_before_a_client_has_ever_come(tiny_project, tmp_path, capsys):
    federation, appear = build_late(tiny_project, tmp_path, (3, "train"))
    federation.run(gone={12}, config=_until(federation.config, 1))
    run = federation.run(resume="run", gone={12}, tamper=appear, **{"num-rounds": 3})
    manifest = json.loads((run / "manifest.json").read_text())
    assert [set(entry.get("failures", {})) for entry in manifest["rounds"]] == [{"bob"}] * 4
    assert set(manifest["clients"]) == {"ann"}


def test_who_has_taken_part_must_be_there_to_resume(tiny_project, tmp_path, monkeypatch):
    federation, _ = build_late(tiny_project, tmp_path, (0, ""))
    federation.run(config=_until(federation.config, 1))
    monkeypatch.setattr(registration, "wait_for_nodes", lambda grid, *_: grid.get_node_ids())
    with pytest.raises(MessageError, match="ann: it has taken part, and its SuperNode is not"):
        federation.run(resume="run", gone={11}, **{"num-rounds": 3})


def test_a_node_that_is_away_for_a_round_is_asked_again_in_the_next(tiny_project, tmp_path):
    """With a registered key it is the same node to Flower, and does not register again."""
    config = build_tiny_config(federated={"num_rounds": 3} | ONE_OF_TWO)
    federation = Federation(tiny_project, tmp_path, config)

    def go_and_come(message, reply):
        task, refused = read_task(message), federation.grids[0].refused
        if (task.client_id, message.metadata.message_type) == ("ann", "train"):
            refused.update({12} if task.server_round == 1 else ())
        elif task.server_round == 1 and task.client_id == "ann":
            refused.clear()
        return reply

    run = federation.run(tamper=go_and_come)
    manifest = json.loads((run / "manifest.json").read_text())
    failures = [entry.get("failures", {}) for entry in manifest["rounds"]]
    assert list(failures[1]) == ["bob"] and not failures[2] and not failures[3]
    registrations = [m for m in federation.grids[0].sent if read_task(m).client_id == ""]
    assert len(registrations) == 4  # of two clients, each with and without its own settings


def _until(config, num_rounds):
    federated = config.federated.model_copy(update={"num_rounds": num_rounds})
    return config.model_copy(update={"federated": federated})


def test_a_client_that_comes_back_as_another_node_is_asked_again(tiny_project, tmp_path, capsys):
    """As a SuperNode does that restarts; one that nobody misses takes no part."""
    config = build_tiny_config(federated={"num_rounds": 3, "min_clients": 1})
    federation = Federation(tiny_project, tmp_path, config)

    def restart(message, reply):
        task, grid = read_task(message), federation.grids[0]
        kind = message.metadata.message_type
        if (task.client_id, task.server_round, kind) == ("ann", 1, "evaluate"):
            for node in (13, 14):
                changes = {"node_id": node, "state": RecordDict()}
                grid.contexts[node] = replace(grid.contexts[25 - node], **changes)
            grid.refused.add(12)
        return reply

    run = federation.run(tamper=restart)
    rounds = json.loads((run / "manifest.json").read_text())["rounds"]
    assert [list(entry.get("failures", {})) for entry in rounds] == [[], ["bob"], [], []]
    sent = federation.grids[0].sent
    assert {m.metadata.dst_node_id for m in sent if read_task(m).server_round > 1} == {11, 13}
    output = capsys.readouterr().out
    assert "bob is back, as another node." in output
    assert "A new node cannot take part: Node 14 is ann, which is not missing." in output


def test_the_local_adapter_of_who_comes_late_has_a_schedule_of_its_own(
    tiny_project, tmp_path, monkeypatch
):
    spans, train = {}, client_module.train_phase

    def note(*args, **options):
        phase = "+".join(options["trainable"])
        spans.setdefault(phase, []).append((options["run_span"], options["weight_decays"][LOCAL]))
        return train(*args, **options)

    monkeypatch.setattr(client_module, "train_phase", note)
    training = {"local_kept_share": 0.5, "local_weight_decay": None}
    raw = build_tiny_config(("bob",), federated={"num_rounds": 4}, training=training).dump()
    raw["federated"]["clients"][0] |= {"first_round": 3, "last_round": 4}
    raw["federated"]["clients"] += build_tiny_config(("ann",)).dump()["federated"]["clients"]
    Federation(tiny_project, tmp_path / "late", parse_config(raw)).run()
    late = [span for span, _ in spans[LOCAL] if span in ((0, 0.5), (0.5, 1.0))]
    whole = [span for span, _ in spans[LOCAL] if span not in late]
    assert late == [(0, 0.5), (0.5, 1.0)]
    assert whole == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert [s for s, _ in spans[GLOBAL]].count((0.5, 0.75)) == 2  # the shared one has the run's
    assert len({decay for _, decay in spans[LOCAL]}) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"schedule": "joint"}},
        {"federated": {"aggregation": "share-a"}},
        {"training": {"schedule": "joint"}, "federated": {"aggregation": "share-b"}},
    ],
)
def test_the_second_half_of_a_round_may_be_asked_for_twice(changes, tiny_project, tmp_path):
    """A SuperNode that dies after the work and before the reply is sent the message once more."""
    config = build_tiny_config(("ann", "bob", "cy"), **changes)
    once = Federation(tiny_project, tmp_path / "once", config).run()
    federation, grids = Federation(tiny_project, tmp_path / "twice", config), []

    class Grid(LoopbackGrid):
        def __init__(self, contexts):
            super().__init__(contexts)
            grids.append(self)

    def repeat(message, reply):
        if message.metadata.message_type != "evaluate":
            return reply
        return client_app.app(message, grids[-1].contexts[message.metadata.dst_node_id])

    federation.grid_class = Grid
    twice = federation.run(tamper=repeat)
    rounds = [json.loads((run / "manifest.json").read_text())["rounds"] for run in (once, twice)]
    assert [e["adapters"] for e in rounds[0]] == [e["adapters"] for e in rounds[1]]
