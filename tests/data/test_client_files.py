from __future__ import annotations

import re

import pytest
from conftest import ROOT

from fedlora_app.config.loading import load_config
from fedlora_app.data.client_files import load_all_files, load_client_files
from fedlora_app.data.linter import lint
from fedlora_app.data.records import DataError

DEMO = ROOT / "conf" / "demo.yaml"
CONFIGS = sorted(
    path
    for path in (ROOT / "conf").glob("*.yaml")
    if not path.name.startswith("study-")
    and path.name not in ("default.yaml", "deployed-demo.yaml")  # a reference; data at the sites
)
MISSING = (
    "data.universal_test=data/demo/universal_tst.json data.conflict_test=data/dmo/x.json "
    "federated.clients.1.local_test=data/demo/riverton/x.json"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_project_ships_the_data_of_every_configuration(path):
    config = load_config(path)
    assert load_all_files(config, ROOT).keys() == set(config.client_ids)


def test_the_large_model_s_data_have_no_findings():
    config = load_config(ROOT / "conf" / "qwen2.5-7b-4090.yaml")
    assert lint(config, load_all_files(config, ROOT), ROOT) == []


def test_missing_files_are_told_at_once_by_key_and_once_each():
    config = load_config(DEMO, MISSING)
    with pytest.raises(DataError) as error:
        load_all_files(config, ROOT)
    demo = ROOT / "data" / "demo"
    assert sorted(str(error.value).splitlines()) == [
        f"data.conflict_test: {ROOT}/data/dmo/x.json does not exist. Did you mean {demo}?",
        f"data.universal_test: {demo}/universal_tst.json does not exist. Did you mean "
        f"{demo}/universal_test.json?",
        f"federated.clients.riverton.local_test: {demo}/riverton/x.json does not exist. "
        f"{demo}/riverton has: local_test.json, local_train.json, local_validation.json, "
        "universal_train.json.",
    ]


def test_a_client_names_nothing_to_a_server_but_what_the_server_named():
    config = load_config(DEMO, MISSING)
    with pytest.raises(DataError) as error:
        load_client_files(config, config.client("riverton"), ROOT)
    assert str(error.value).count("does not exist.") == 3
    assert not re.search("Did you mean|has:", str(error.value))
