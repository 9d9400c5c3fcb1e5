from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from fedlora_app.config.loading import load_config
from fedlora_app.config.schema import ConfigError
from fedlora_app.data.client_files import load_all_files
from fedlora_app.data.linter import lint
from fedlora_app.data.records import DataError
from fedlora_app.demo.starter import DEMO_MODEL, start_experiment
from fedlora_app.preflight import inspect_experiment


def start(folder: Path, *clients: str) -> Path:
    return start_experiment(folder, clients, ROOT, str(ROOT / DEMO_MODEL))


def test_nothing_is_wrong_with_it(tmp_path):
    path = start(tmp_path / "desk", "ayr", "bath", "cork")
    found = inspect_experiment(load_config(path), ROOT)
    assert (found.findings, found.note) == ([], "")
    taught, tested, conflicts = (
        json.loads((tmp_path / "desk" / name).read_text())
        for name in ("ayr/local_train.json", "ayr/local_test.json", "conflict_test.json")
    )
    assert {r["fact"] for r in taught} == {r["fact"] for r in tested} and len(taught) == 30
    assert all(len(set(record["answers"].values())) == 3 for record in conflicts)
    text = path.read_text()
    assert text.startswith("# Do 3 clients") and f"#   fedlora train {path}" in text


@pytest.mark.parametrize("num", [2, 29])
def test_so_few_and_so_many_clients(tmp_path, num):
    path = start(tmp_path / "desk", *(f"c{number}" for number in range(num)))
    config = load_config(path)
    assert lint(config, load_all_files(config, ROOT), ROOT) == []


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (["ayr"], "there are 1; expected 2 to 29"),
        (["ayr", "AYR"], "differ in nothing but case"),
        (["ayr", "../bath"], '"../bath" is not a name'),
    ],
)
def test_clients_that_cannot_be_called_so(tmp_path, clients, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        start(tmp_path / "desk", *clients)
    assert not (tmp_path / "desk").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        start(tmp_path, "ayr", "bath")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_does_not_see_it(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    start(tmp_path / "desk", "ayr", "bath")
    command = ["git", "-C", tmp_path, "status", "--porcelain"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
