"""The schema that editors use says what the code says."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator

from fedlora_app.config.json_schema import SCHEMA_FILE, build_json_schema

CONFIGS = [path for path in (ROOT / "conf").glob("*.yaml") if not path.stem.startswith("study")]


def test_the_file_is_current():
    kept = json.loads((ROOT / SCHEMA_FILE).read_text(encoding="utf-8"))
    assert kept == build_json_schema(), "run: python -m fedlora_app.config.json_schema"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_experiment_names_it_and_fits_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    Draft202012Validator(build_json_schema()).validate(yaml.safe_load(text))


@pytest.mark.parametrize("fault", ["training: {epoch: 1}", "training: {batch_size: 0}"])
def test_it_finds_mistyped_keys_and_impossible_values(fault):
    raw = yaml.safe_load((ROOT / "conf" / "demo.yaml").read_text(encoding="utf-8"))
    raw |= yaml.safe_load(fault)
    assert not Draft202012Validator(build_json_schema()).is_valid(raw)
