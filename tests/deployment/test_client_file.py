"""A client's own file: read with all of its faults at once, laid over what the server sends."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from conftest import ROOT, build_tiny_config
from deployment.sites import (
    build_bare_config,
    build_federation,
    make_site,
    names_of,
    prompt_of,
)
from loopback import Federation, LoopbackGrid

from fedlora_app.config.loading import parse_config
from fedlora_app.config.private import PRIVATE
from fedlora_app.config.schema import ConfigError
from fedlora_app.deployment.client_file import (
    ClientFile,
    ConfidentialError,
    find_own_settings,
    load_own_settings,
)
from fedlora_app.deployment.policy import Policy
from fedlora_app.federation.messages import read_task
from fedlora_app.foundation.files import WEIGHTS_FILE
from fedlora_app.strategy import RoundError

NODES = {"ann": 11, "bob": 12}


@pytest.fixture
def site(tiny_project, tmp_path):
    return make_site(tiny_project, tmp_path / "ann", "ann")


def rewrite(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return path


class TestReading:
    def test_paths_are_relative_to_its_folder(self, site):
        own = load_own_settings(site)
        assert own.store == site.parent / "store"
        assert own.policy_path is None
        (site.parent / "policy.yaml").write_text("{}")
        assert own.policy_path == site.parent / "policy.yaml"
        rewrite(site, policy="/etc/policy.yaml")
        assert str(load_own_settings(site).policy_path) == "/etc/policy.yaml"

    def test_all_faults_are_told_at_once(self, site):
        rewrite(
            site,
            id="a b",
            sytem_prompt="x",
            universal_train=None,
            model={"quantisation": "4bit", "dtype": "float16"},
            training={"batch_size": 0},
        )
        with pytest.raises(ConfigError) as caught:
            load_own_settings(site)
        text = str(caught.value)
        assert "6 faults" in text
        assert 'sytem_prompt: unknown key. Did you mean "system_prompt"?' in text
        assert 'model.quantisation: unknown key. Did you mean "quantization"?' in text
        for beginning in ("id: 'a b' is not", "model.dtype:", "training.batch_size:"):
            assert f"\n  {beginning}" in text
        assert "universal_train: missing, and data.universal_train too." in text

    def test_a_node_that_names_none_has_none(self):
        assert find_own_settings({"client-id": "ann"}) is None

    @pytest.mark.parametrize(
        ("node_config", "why"),
        [
            ({"client-id": "bob"}, "says client-id 'bob', and .* says 'ann'"),
            ({"output-dir": "x", "project-dir": "y"}, "project-dir and output-dir .* no effect"),
        ],
    )
    def test_the_nodes_configuration_may_not_say_otherwise(self, site, node_config, why):
        with pytest.raises(ConfidentialError, match=why) as caught:
            find_own_settings(node_config | {"client-file": str(site)})
        assert str(site) not in caught.value.told
        assert find_own_settings({"client-id": "ann", "client-file": str(site)}) is not None


class TestMerging:
    def test_what_is_its_own_is_replaced_and_the_rest_is_the_experiments(self, site):
        rewrite(
            site,
            model={"name": "m", "quantization": "4bit", "dtype": "bfloat16"},
            training={"batch_size": 1, "gradient_checkpointing": True},
            evaluation={"batch_size": 3},
        )
        # A server that says something of this client's own, and tells it of another's.
        sent = build_tiny_config(
            data={"universal_test": "/etc/passwd", "public": None},
            model={"trust_remote_code": True},
        )
        merged = load_own_settings(site).merge(sent)
        ann = merged.client("ann")
        assert ann.system_prompt == prompt_of("ann")
        assert ann.local_train == f"data/{names_of('ann')[0]}"
        assert merged.entry("bob").is_bare
        assert merged.data.universal_test == f"data/{names_of('ann')[2]}"
        assert merged.data.conflict_test is None
        assert (merged.model.name, merged.model.quantization) == ("m", "4bit")
        assert not merged.model.trust_remote_code
        assert merged.evaluation.batch_size == 3
        before, after = sent.training.model_dump(), merged.training.model_dump()
        assert after == before | {
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        }
        assert merged.adapters == sent.adapters
        assert merged.federated.num_rounds == sent.federated.num_rounds

    @pytest.mark.parametrize(
        "training", [{"batch_size": 3}, {"batch_size": 2, "gradient_accumulation_steps": 2}]
    )
    def test_a_step_has_the_experiments_examples(self, site, training):
        own = load_own_settings(rewrite(site, training=training))
        with pytest.raises(ConfidentialError, match="and the experiment has 2. Their product"):
            own.merge(build_tiny_config())

    def test_texts_that_leave_name_nothing_of_it(self, site):
        own = load_own_settings(site)
        text = f"{site.parent / 'data' / names_of('ann')[0]} and data/{names_of('ann')[0]} are bad."
        assert own.hide(text) == "<local_train> and <local_train> are bad."
        assert own.hide(f"{own.store}/run-1 exists.") == "<store>/run-1 exists."
        assert own.hide(f"It says {prompt_of('ann')!r}.") == "It says '<system_prompt>'."
        assert own.hide("federated.clients.ann.local_train") == "federated.clients.ann.local_train"


class TestClientsByTheirIdsAlone:
    def test_everything_but_a_deployment_needs_their_settings(self, tiny_project, fedlora):
        config = build_bare_config()
        path = tiny_project / "bare.yaml"
        path.write_text(json.dumps(config.dump()))
        for command in ("check", "plan", "train"):
            status, _, err = fedlora(command, str(path))
            assert status == 2
            for client in ("ann", "bob"):
                assert f"federated.clients: {client} has no system_prompt and no local_train" in err

    def test_a_simulation_refuses_them_before_it_asks_anybody(self, tiny_project, tmp_path):
        federation = build_federation(tiny_project, tmp_path)
        federation.grid_class = InMemoryGrid
        with pytest.raises(ConfigError) as caught:
            federation.run()
        for client in ("ann", "bob"):
            assert f"{client} has no system_prompt and no local_train here" in str(caught.value)
        assert federation.grids[0].sent == []

    def test_simulated_nodes_get_all_settings_once(self, federation):
        """They share the server's disk, so that nothing is gained by a second message."""
        federation.grid_class = InMemoryGrid
        federation.run(config=build_tiny_config(federated={"num_rounds": 1}))
        first, second, *others = federation.grids[0].sent
        for message in (first, second):
            assert not any(c.is_bare for c in read_task(message).config.federated.clients)
        for message in others:
            bare = [c.id for c in read_task(message).config.federated.clients if c.is_bare]
            assert bare == [c for c in ("ann", "bob") if c != read_task(message).client_id]
        assert len(others) == 2 + 2 * 2

    def test_a_part_of_them_is_a_fault(self):
        clients = [{"id": "ann", "system_prompt": "x"}, {"id": "bob", "local_test": "x"}]
        with pytest.raises(ConfigError) as caught:
            build_tiny_config(federated={"clients": clients})
        assert '"ann" has no local_train' in str(caught.value)
        assert '"bob" has no system_prompt and no local_train' in str(caught.value)

    def test_who_reads_everybodys_data_needs_their_settings(self):
        with pytest.raises(ConfigError, match='centralized .* and "bob" names none here'):
            build_tiny_config(
                federated={"mode": "centralized", "clients": [{"id": "ann"}, {"id": "bob"}]}
            )

    def test_a_node_without_a_file_is_told_what_is_missing(self, tiny_project, tmp_path):
        federation = build_federation(tiny_project, tmp_path)
        del federation.own_files["bob"]
        with pytest.raises(ValueError, match="bob: its node has no file of its own") as caught:
            federation.run()
        assert "ann:" not in str(caught.value)


@pytest.fixture(scope="module")
def sites(tiny_project, tmp_path_factory):
    """A finished run of two clients with files of their own, and a report that is written."""
    federation = build_federation(tiny_project, tmp_path_factory.mktemp("sites"))
    federation.run(report=True)
    return federation


class TestARun:
    def test_nothing_of_a_clients_own_reaches_the_server_or_the_other(self, sites):
        (grid,) = sites.grids
        written = b"".join(p.read_bytes() for p in sites.output_dir.rglob("*") if p.is_file())
        for client in NODES:
            own = [*names_of(client), prompt_of(client), str(sites.own_files[client].parent)]
            for text in map(str.encode, own):
                assert text not in grid.bytes_sent() + grid.bytes_received() + written
        assert b"ann" in grid.bytes_sent_to(NODES["bob"])  # by its id

    def test_each_keeps_its_own_run_and_the_server_none_of_it(self, sites):
        for client in NODES:
            run = sites.own_files[client].parent / "store" / "run"
            assert (run / "final" / "clients" / client / WEIGHTS_FILE).is_file()
            assert [path.name for path in (run / "clients").iterdir()] == [client]
        assert not (sites.path / "clients").exists()
        assert not list((sites.path / "final").glob("clients/*"))

    def test_it_is_the_run_of_clients_whose_settings_the_server_has(
        self, sites, tiny_project, tmp_path
    ):
        config = build_tiny_config().dump()
        for client in config["federated"]["clients"]:
            client["system_prompt"] = prompt_of(client["id"])
        other = Federation(tiny_project, tmp_path, build_tiny_config(federated=config["federated"]))
        other.run()
        for name in ("server/round_002", "final/global"):
            ours, theirs = (run.path / name / WEIGHTS_FILE for run in (sites, other))
            assert ours.read_bytes() == theirs.read_bytes()
        local = f"final/clients/ann/{WEIGHTS_FILE}"
        ours = sites.own_files["ann"].parent / "store" / "run" / local
        assert ours.read_bytes() == (other.path / local).read_bytes()
        # Who has no file asks for its own settings, and gets them and nobody else's.
        (grid,) = other.grids
        for client, node in NODES.items():
            (neighbour,) = NODES.keys() - {client}
            got = grid.bytes_sent_to(node)
            assert prompt_of(client).encode() in got
            assert prompt_of(neighbour).encode() not in got
            assert f"{neighbour}_local.json".encode() not in got
        first = read_task(grid.sent[0])
        assert not [
            key
            for c in json.loads(first.experiment)["federated"]["clients"]
            for key in c
            if key in PRIVATE
        ]

    @pytest.mark.parametrize(
        "command",
        [
            ("evaluate",),
            ("ask", "--client", "ann", "Why?"),
            ("export", "--client", "ann", "--output", "exported"),
            ("adapt", "--config", "bare.yaml"),
        ],
        ids=lambda command: command[0],
    )
    def test_what_needs_a_prompt_says_where_it_is(
        self, sites, tmp_path, monkeypatch, fedlora, command
    ):
        monkeypatch.chdir(tmp_path)
        newcomer = {"federated": {"clients": [{"id": "ann"}]}}
        (tmp_path / "bare.yaml").write_text(json.dumps(newcomer))
        name, *rest = command
        status, _, err = fedlora(name, str(sites.path), *rest)
        assert status == 2
        assert "ann has no system_prompt and no local_train here" in err

    def test_what_needs_none_works(self, sites, fedlora):
        assert fedlora("runs", str(sites.output_dir))[0] == 0
        assert fedlora("report", str(sites.path))[0] == 0

    def test_the_report_says_of_no_prompt_that_it_is_shared(self, sites):
        page = (sites.path / "report.html").read_text()
        assert "No verdict" not in page.split("</title>")[0]
        assert "same system prompt" not in page


class TestDifferentMachines:
    def test_one_base_in_4_bit_here_and_in_fp32_there(self, tiny_project, tmp_path):
        own = {
            "bob": {
                "model": {"name": str(tiny_project / "model"), "quantization": "4bit"},
                "training": {"batch_size": 1},
            }
        }
        config = build_bare_config(federated={"num_rounds": 1})
        run = build_federation(tiny_project, tmp_path, config, own).run()
        manifest = json.loads((run / "manifest.json").read_text())
        assert [entry["round"] for entry in manifest["rounds"]] == [0, 1]
        assert not any("failures" in entry for entry in manifest["rounds"])

    def test_another_base_is_refused(self, tiny_project, tmp_path, tokenizer):
        from conftest import build_tiny_model

        other = tmp_path / "other"
        build_tiny_model(len(tokenizer), seed=1, num_hidden_layers=1).save_pretrained(other)
        tokenizer.save_pretrained(other)
        own = {"bob": {"model": {"name": str(other)}}}
        federation = build_federation(tiny_project, tmp_path, own=own)
        with pytest.raises(RoundError, match="do not hold the same base model"):
            federation.run()


class InMemoryGrid(LoopbackGrid):
    """Bears the name by which the server knows a simulation."""


class BackwardsGrid(LoopbackGrid):
    """Hands out what has come in the reverse order, when all of it has come."""

    def pull_messages(self, message_ids):
        return super().pull_messages(message_ids)[::-1]


def test_all_at_once_in_whatever_order_they_come(tiny_project, tmp_path):
    config = build_bare_config(
        ("ann", "bob", "cy"), federated={"clients_at_once": 0, "num_rounds": 1}
    )
    assert config.federated.at_once == 3
    runs = []
    for grid_class in (LoopbackGrid, BackwardsGrid):
        federation = build_federation(tiny_project, tmp_path / grid_class.__name__, config)
        federation.grid_class = grid_class
        runs.append(federation.run())
        orders = [read_task(m).client_id for m in federation.grids[0].sent][-3:]
        assert orders == ["ann", "bob", "cy"]
    first, second = (sorted(run.rglob(WEIGHTS_FILE)) for run in runs)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert len(first) == 3


def test_errors_at_a_client_name_keys_and_no_files(tiny_project, tmp_path, capsys):
    federation = build_federation(tiny_project, tmp_path)
    (federation.own_files["ann"].parent / "data" / names_of("ann")[0]).write_text("[]")
    rewrite(federation.own_files["bob"], id="bo b")
    with pytest.raises(ValueError) as caught:
        federation.run()
    told = str(caught.value)
    assert re.search(r"ann: federated.clients.ann.local_train: <local_\w+> holds no record", told)
    assert "this client's own file (client-file) cannot be used; its log says why" in told
    received = federation.grids[0].bytes_received().decode(errors="replace")
    log = capsys.readouterr().out
    for private in (names_of("ann")[0], "bo b", str(tmp_path)):
        assert private not in received and private in log


def test_the_examples_of_the_documentation_are_read():
    """And every key of the two files stands there."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    (own,) = (block for block in blocks if "id" in block)
    file = ClientFile.model_validate(own)
    (rules,) = (block for block in blocks if "rounds" in block)
    Policy.model_validate(rules)
    keys = [*Policy.model_fields, *ClientFile.model_fields]
    for section in ("data", "model", "training", "evaluation"):
        keys += type(getattr(file, section)).model_fields
    assert [key for key in keys if key not in text] == []
    (experiment,) = (block for block in blocks if "federated" in block)
    parse_config(experiment)
