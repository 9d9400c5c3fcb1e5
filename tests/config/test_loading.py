from __future__ import annotations

import re

import pytest
import yaml
from conftest import ROOT

from fedlora_app.config.loading import (
    join_overrides,
    load_config,
    parse_config,
    parse_overrides,
)
from fedlora_app.config.schema import Config, ConfigError

STUDIES = sorted((ROOT / "conf").glob("study-*.yaml"))
CONFIGS = sorted(set((ROOT / "conf").glob("*.yaml")) - set(STUDIES))
ONE_CLIENT = {"clients": [{"id": "a", "system_prompt": "", "local_train": "a.json"}]}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_opens_with_its_question_and_command(path):
    load_config(path)
    _, first, *rest = path.read_text().splitlines()  # after the line that names the schema
    assert re.fullmatch(r"# .*\?", first)
    if path.name == "default.yaml":
        assert "A reference, not to be run" in rest[1]
        return
    command = r"#\s+(flwr run \.|fedlora train |fedlora deploy init )"
    assert any(re.match(command, line) for line in rest)
    if path.name != "demo.yaml":
        assert f"conf/{path.name}" in path.read_text()


def test_default_yaml_spells_out_exactly_the_defaults():
    raw = yaml.safe_load((ROOT / "conf" / "default.yaml").read_text())
    clients = raw["federated"]["clients"]
    defaults = parse_config({"federated": {"clients": clients}})
    assert load_config(ROOT / "conf" / "default.yaml") == defaults
    assert raw == defaults.dump()  # no field is left out


def test_all_faults_come_at_once_with_paths_and_suggestions():
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "modell": {},
                "adapters": {"global": {"rank": 0}},
                "training": {"learning_rat": 1.0, "batch_size": "4", "num_rounds": 3},
                "federated": {
                    "min_clients": 9,
                    "clients": [
                        {"id": "a", "system_prompt": "", "local_train": "x"},
                        {"id": "a", "system_prompt": "", "local_train": "x"},
                        {"id": "../x", "system_prompt": "", "local_train": "x"},
                    ],
                },
            }
        )
    text = str(caught.value)
    for expected in (
        'modell: unknown key. Did you mean "model"?',
        "adapters.global.rank: input should be greater than or equal to 1 (it is 0)",
        'training.learning_rat: unknown key. Did you mean "learning_rate"?',
        "training.batch_size: input should be a valid integer (it is '4')",
        'training.num_rounds: unknown key. It belongs at "federated.num_rounds".',
        "federated.clients.2.id: '../x' is not a name.",
        'federated.clients: 2 clients have the id "a"; ids must differ.',
        "federated.min_clients: 9 clients are required and only 3 are named.",
    ):
        assert expected in text
    assert "8 faults" in text


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 65, "-x", "a\n"])
def test_unsafe_client_ids_are_refused(name):
    with pytest.raises(ConfigError, match=r"clients\.0\.id"):
        parse_config(
            {"federated": {"clients": [{"id": name, "system_prompt": "", "local_train": "x"}]}}
        )


def test_ids_that_a_file_system_may_confuse_are_refused():
    clients = [{"id": name, "system_prompt": "", "local_train": "x"} for name in ("Ann", "ann")]
    with pytest.raises(ConfigError, match="only in case"):
        parse_config({"federated": {"clients": clients}})


def test_a_copy_is_of_the_same_rank_scale_and_modules_as_what_it_is_copied_from():
    path, finetuned = ROOT / "conf" / "demo.yaml", "federated.mode=finetuned"
    assert load_config(path, f"{finetuned} adapters.local.dropout=0.1").federated.mode
    other = "adapters.local.rank=4 adapters.local.target_modules=[q_proj] adapters.global.alpha=32"
    with pytest.raises(ConfigError) as caught:
        load_config(path, f"{finetuned} {other}")
    text = str(caught.value)
    for key in ("rank: it is 4 and adapters.global.rank is 8", "alpha: it is 16", "target_modules"):
        assert f"adapters.local.{key}" in text
    assert "3 faults" in text
    assert load_config(path, other)


def test_overrides_win_over_settings_and_yaml():
    path = ROOT / "conf" / "demo.yaml"
    config = load_config(
        path,
        overrides="training.learning_rate=1e-4 adapters.local.rank=3 federated.clients.0.id=here",
        federated__num_rounds=20,
        federated__mode=None,
    )
    assert config.training.learning_rate == 1e-4
    assert config.adapters.local.rank == 3
    assert config.federated.clients[0].id == "here"
    assert config.federated.num_rounds == 20
    assert config.federated.mode == "dual"


def test_overrides_are_checked_with_everything_else():
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "conf" / "demo.yaml", overrides="nonsense", federated__mode="duel")
    assert '"nonsense" is not of the form section.key=value' in str(caught.value)
    assert "federated.mode" in str(caught.value)
    with pytest.raises(ConfigError, match="adapters.local.rnk: unknown key"):
        load_config(ROOT / "conf" / "demo.yaml", overrides="adapters.local.rnk=3")


@pytest.mark.parametrize(
    ("overrides", "rounds", "expected"),
    [
        (
            "federated.num_rounds=5",
            2,
            "federated.num_rounds: it is 2 by a setting of its own and 5",
        ),
        ("federated.num_rounds=5 federated.num_rounds=6", None, "is there twice, as 5 and as 6"),
        ("training.replay=0.5 training.replay=null", None, "is there twice, as 0.5 and as null"),
    ],
)
def test_what_contradicts_itself_is_a_fault(overrides, rounds, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(ROOT / "conf" / "demo.yaml", overrides, federated__num_rounds=rounds)


def test_what_is_said_twice_alike_is_none():
    twice = "federated.num_rounds=5 federated.num_rounds=5"
    config = load_config(ROOT / "conf" / "demo.yaml", twice, federated__num_rounds=5)
    assert config.federated.num_rounds == 5


def test_joined_overrides_lie_over_one_another():
    joined = join_overrides("a.b=1 c='x y'", "", "d=it\\'s a.b=2")
    assert parse_overrides(joined) == ({"a.b": 2, "c": "x y", "d": "it's"}, [])
    assert "No closing quotation" in parse_overrides(join_overrides("a='", "b=1"))[1][0]


def test_scientific_notation_is_a_number():
    changes, faults = parse_overrides("a.b=1e-4 c='x y' d=null e=[1,2]")
    assert changes == {"a.b": 1e-4, "c": "x y", "d": None, "e": [1, 2]}
    assert not faults


@pytest.mark.parametrize(
    "override",
    [
        "federated.clients.5.id=x",
        "federated.clients.northgate.system_prompt=hi",
        "federated.clients.0=x",
        "training.learning_rate.x=3",
        "experiment.name=2026-13-45",
        "model.name=[",
        "training.learning_rate=.inf",
        "=3",
    ],
)
def test_an_override_that_leads_nowhere_is_a_fault(override):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "conf" / "demo.yaml", overrides=f"{override} training.epochs=1")
    assert "2 faults" in str(caught.value) and "training.epochs: unknown" in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "other.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"demo\.yaml does not exist.*other\.yaml"):
        load_config(tmp_path / "demo.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="no sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")


def test_no_clients_or_no_universal_data_is_a_fault():
    with pytest.raises(ConfigError, match=r"federated\.clients: at least one is needed"):
        parse_config({"federated": {"clients": []}})
    with pytest.raises(ConfigError, match="has no universal_train"):
        parse_config({"federated": ONE_CLIENT, "data": {"universal_train": None}})


def test_the_dump_reads_back_equal():
    config = load_config(ROOT / "conf" / "demo.yaml")
    assert parse_config(config.dump()) == config
    assert isinstance(config, Config)


def test_a_penalty_that_could_not_act_is_a_fault():
    weighed = {"local_kl_weight": 1.0, "replay": 0.5, "local_mixing_weight": 0.5}
    with pytest.raises(ConfigError, match="local_kl_weight: it holds the pair near the global"):
        parse_config({"training": weighed, "federated": ONE_CLIENT})
    raw = {"training": {"local_kl_weight": 1.0, "replay": 0}, "federated": ONE_CLIENT}
    with pytest.raises(ConfigError, match="local_kl_weight: it acts on replayed records"):
        parse_config(raw)
    raw["data"] = {"public": "public.json"}
    assert parse_config(raw).data.public == "public.json"
    raw["training"] = {}
    with pytest.raises(ConfigError, match="public: its records are used by training.local_kl_w"):
        parse_config(raw)


def test_trackers_are_known_and_named_once():
    raw = {"federated": ONE_CLIENT, "experiment": {"track": ["wandb", "tensorboard", "wandb"]}}
    with pytest.raises(
        ConfigError, match=r"experiment\.track: wandb is named 2 times; once is eno"
    ):
        parse_config(raw)
    raw["experiment"]["track"] = ["tensorboard", "mlflow"]
    with pytest.raises(ConfigError, match=r"experiment\.track\.1: .*'wandb' \(it is 'mlflow'\)"):
        parse_config(raw)
    config = load_config(ROOT / "conf" / "demo.yaml", overrides="experiment.track=[tensorboard]")
    assert config.experiment.track == ["tensorboard"]


@pytest.mark.parametrize(
    ("federated", "message"),
    [
        ({"aggregation": "median", "min_clients": 2}, "median needs the updates of 3 clients"),
        ({"aggregation": "rest-of-world", "fraction": 0.3}, "one may have 1; there are no others"),
        ({"aggregation": "stack", "mode": "finetuned"}, "stack. gives the global adapter a frozen"),
        ({"clients": 3}, r"federated\.clients: input should be a valid list"),
    ],
)
def test_rounds_that_a_rule_can_make_nothing_of_are_refused(federated, message):
    clients = [ONE_CLIENT["clients"][0] | {"id": name} for name in ("ann", "bob", "cy")]
    with pytest.raises(ConfigError, match=message):
        parse_config({"federated": {"clients": clients} | federated})


def test_rounds_with_too_few_members_are_refused_however_many_rounds_there_are():
    clients = [ONE_CLIENT["clients"][0] | {"id": name} for name in ("ann", "bob", "cy")]
    clients[0]["first_round"] = 2
    federated = {"clients": clients, "num_rounds": 2**31 - 1}
    assert parse_config({"federated": federated}).federated.num_rounds == 2**31 - 1
    with pytest.raises(ConfigError, match="a round may have 2; of two there is no middle"):
        parse_config({"federated": federated | {"aggregation": "median"}})
    left = [client | {"first_round": 1, "last_round": 7} for client in clients]
    with pytest.raises(ConfigError, match="nobody takes part in round 8"):
        parse_config({"federated": federated | {"clients": left}})
