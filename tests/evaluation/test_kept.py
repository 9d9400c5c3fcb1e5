from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import build_tiny_config

from fedlora_app.evaluation.kept import find_kept, keep_evaluation
from fedlora_app.evaluation.tables import hash_settings
from fedlora_app.model.base import compute_fingerprint

FILES = {"ann": SimpleNamespace(all={"local_train": SimpleNamespace(sha256="1" * 64)})}
EVALUATION = {
    "format": 1,
    "files": {"ann": {"local_train": "1" * 64}},
    "base_model": {"fingerprint": "f" * 64},
    "summary": {"n": 3},
}
FOUND = EVALUATION | {
    "settings": hash_settings(build_tiny_config()),
    "max_new_tokens": build_tiny_config().evaluation.max_new_tokens,
}


def find(path, config=None, files=FILES, root=Path("nowhere")):
    return find_kept(path, config or build_tiny_config(), files, root)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "kept" / "dual-seed7.json.gz"
    keep_evaluation(path, build_tiny_config(), EVALUATION)
    return path


def test_a_kept_evaluation_takes_its_run_s_place(path):
    assert find(path) == FOUND
    before = path.read_bytes()
    keep_evaluation(path, build_tiny_config(), EVALUATION)
    assert path.read_bytes() == before


def test_one_of_a_version_that_had_fewer_settings_is_used(path):
    content = json.loads(gzip.decompress(path.read_bytes()))
    del content["config"]["data"]["public"], content["config"]["evaluation"]["protocol"]
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert find(path) == FOUND
    content["config"]["training"]["gone"] = 1
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert find(path) is None


def test_how_a_run_is_carried_out_is_no_other_experiment(path):
    shared = {"share_gpu": True, "client_timeout_seconds": 60.0}
    config = build_tiny_config(experiment={"track": ["tensorboard"]}, federated=shared)
    assert find(path, config) == FOUND
    assert find(path, build_tiny_config(federated={"num_rounds": 9})) is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"no gzip", gzip.compress(b"no json")[:10] + b"\xff" * 20),
        *(gzip.compress(b"no json"), gzip.compress(b"[]"), None),
    ],
    ids=["empty", "no gzip", "damaged", "no JSON", "a list", "no file"],
)
def test_what_cannot_be_read_is_not_used(path, content):
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert find(path) is None


def test_other_settings_data_or_formats_are_run_again(path):
    other = build_tiny_config(training={"learning_rate": 1e-3})
    assert find(path, other) is None
    changed = {"ann": SimpleNamespace(all={"local_train": SimpleNamespace(sha256="2" * 64)})}
    assert find(path, build_tiny_config(), changed) is None
    keep_evaluation(path, build_tiny_config(), EVALUATION | {"format": 0})
    assert find(path) is None


def test_the_base_model_has_to_be_the_one_that_was_evaluated(path, tiny_project):
    config = build_tiny_config()
    assert find(path, root=tiny_project) is None
    fingerprint = compute_fingerprint(config.model, tiny_project)
    keep_evaluation(path, config, EVALUATION | {"base_model": {"fingerprint": fingerprint}})
    assert find(path, root=tiny_project) is not None


def test_settings_are_alike_that_differ_in_how_a_run_is_carried_out_or_in_the_seed():
    alike = build_tiny_config(experiment={"seed": 8}, federated={"share_gpu": True})
    assert hash_settings(alike) == FOUND["settings"]
    assert hash_settings(build_tiny_config(federated={"num_rounds": 9})) != FOUND["settings"]
