from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from flwr.cli.build import build_fab_from_disk
from flwr.cli.install import install_from_fab

from fedlora_app.foundation import project
from fedlora_app.foundation.project import (
    ProjectNotFoundError,
    describe_other_checkout,
    find_project_root,
    is_checkout,
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A process that runs an unpacked bundle in a foreign folder, with nothing installed."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    install_from_fab(build_fab_from_disk(ROOT), skip_prompt=True)
    (bundle,) = (tmp_path / "flower" / "apps").iterdir()
    (bundle / "fedlora_app" / "checkout.json").unlink(missing_ok=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    monkeypatch.chdir(foreign)
    monkeypatch.delenv(project.ROOT_VARIABLE, raising=False)
    monkeypatch.setattr(project, "PACKAGE_DIR", bundle / "fedlora_app")
    monkeypatch.setattr(project, "_editable_installation", lambda: None)
    return bundle


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    (folder / "conf").mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    return folder


def test_a_bundle_is_not_a_checkout(elsewhere, checkout):
    assert not is_checkout(elsewhere)
    assert is_checkout(checkout)


def test_the_note_in_the_bundle_leads_back(elsewhere, checkout):
    note = elsewhere / "fedlora_app" / "checkout.json"
    note.write_text(json.dumps({"root": str(checkout)}))
    assert find_project_root("conf/demo.yaml") == checkout


def test_an_absolute_config_decides(elsewhere, checkout):
    assert find_project_root(str(checkout / "conf" / "demo.yaml")) == checkout


def test_the_node_configuration_comes_first(elsewhere, checkout, tmp_path):
    note = elsewhere / "fedlora_app" / "checkout.json"
    note.write_text(json.dumps({"root": str(tmp_path)}))
    assert find_project_root(project_dir=str(checkout)) == checkout


def test_a_folder_that_was_named_and_is_no_checkout_is_an_error(elsewhere, checkout, tmp_path):
    note = elsewhere / "fedlora_app" / "checkout.json"
    note.write_text(json.dumps({"root": str(checkout)}))
    with pytest.raises(ProjectNotFoundError, match="which is not a checkout"):
        find_project_root(project_dir=str(tmp_path / "typo"))


def test_the_bundles_note_wins_over_an_inherited_variable(
    elsewhere, checkout, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    (other / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    monkeypatch.setenv(project.ROOT_VARIABLE, str(other))
    assert find_project_root("conf/demo.yaml") == other
    (elsewhere / "fedlora_app" / "checkout.json").write_text(json.dumps({"root": str(checkout)}))
    assert find_project_root("conf/demo.yaml") == checkout


def test_when_nothing_is_found_every_place_is_named(elsewhere, tmp_path):
    with pytest.raises(ProjectNotFoundError) as caught:
        find_project_root("conf/demo.yaml")
    text = str(caught.value)
    for expected in ("Searched", str(tmp_path / "foreign"), "FEDLORA_PROJECT_DIR", "pip install"):
        assert expected in text


def test_another_checkout_around_one_is_said(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    (tmp_path / "conf").mkdir()
    note = describe_other_checkout(tmp_path / "conf")
    assert f"the code of {ROOT}," in note and f"pip install -e {tmp_path}" in note
    assert describe_other_checkout(ROOT / "conf") is describe_other_checkout(Path("/")) is None
