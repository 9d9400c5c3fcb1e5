"""What ``flwr run`` would ship, and which configuration keys it declares."""

from __future__ import annotations

import io
import tomllib
import zipfile

import pytest
from conftest import ROOT
from flwr.cli.build import build_fab_from_disk


@pytest.fixture(scope="module")
def names() -> set[str]:
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))
    return set(bundle.namelist())


def test_no_data_test_result_or_adapter_is_in_the_bundle(names):
    folders = {name.split("/")[0] for name in names}
    assert folders <= {"fedlora_app", "conf", "README.md", "LICENSE", "pyproject.toml", ".info"}
    assert not any("adapter_config" in name or name.endswith(".jsonl") for name in names)
    json_files = {name for name in names if name.endswith(".json")}
    assert json_files <= {"fedlora_app/checkout.json", "conf/schema.json"}


def test_every_module_and_config_is(names):
    for path in (*ROOT.glob("fedlora_app/**/*.py"), *ROOT.glob("conf/*.yaml")):
        assert path.relative_to(ROOT).as_posix() in names


def test_files_in_an_unusual_output_folder_stay_out(names):
    """``output-dir`` may name any folder of the project; only code and conf are bundled."""
    folder = ROOT / "some-output"
    folder.mkdir()
    try:
        (folder / "history.json").write_text("[]")
        bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))
        assert "some-output/history.json" not in bundle.namelist()
    finally:
        (folder / "history.json").unlink()
        folder.rmdir()


def test_the_declared_run_configuration():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"] == {
        "config": "conf/demo.yaml",
        "num-rounds": 0,
        "mode": "",
        "output-dir": "results",
        "run-name": "",
        "resume": "",
        "overrides": "",
    }
