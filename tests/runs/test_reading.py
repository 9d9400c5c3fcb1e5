"""What strict reading refuses is what tolerant reading names."""

from __future__ import annotations

import json

import pytest
from synthetic import write_run

from fedlora_app.runs.manifest import check_manifest
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.paths import RunDirectoryError, RunPaths
from fedlora_app.runs.reading import MOST_FAULTS, load_run


@pytest.fixture
def paths(tmp_path) -> RunPaths:
    """A whole run of four rounds, with the hashes that ``write_run`` leaves out."""
    found = RunPaths(write_run(tmp_path / "run", num_conflicts=2))
    manifest = json.loads(found.manifest.read_text())
    for entry in manifest["rounds"]:
        entry.setdefault("adapters", {"global": "0" * 64})
    manifest["base_model"] = {"name": "model", "revision": None}
    manifest.setdefault("versions", {})
    found.manifest.write_text(json.dumps(manifest))
    return found


def test_of_a_whole_run_both_read_the_same(paths):
    strict, tolerant = load_run(paths.folder), read_what_is_left(paths.folder)
    assert tolerant.problems == []
    assert tolerant.manifest == strict.manifest == json.loads(paths.manifest.read_text())
    assert tolerant.config == strict.config.dump()
    assert tolerant.evaluation == strict.evaluation
    assert tolerant.last_round == strict.last_round == 4


@pytest.mark.parametrize(
    ("change", "fault", "rounds"),
    [
        ({"rounds": 5}, "it lists no rounds", []),
        ({"rounds": [{}, {"round": 1, "adapters": {}}]}, 'entry 1 of "rounds" is not a round', [1]),
        ({"rounds": [{"round": 1, "adapters": {}}] * 2}, "round 1 is there twice", [1]),
        ({"rounds": [{"round": 1, "adapters": {}, "seconds": "x"}]}, "entry 1 of", []),
        ({"clients": [1]}, '"clients" is not an object', None),
        ({"clients": {"ann": 1}}, "\"clients\" has no object for 'ann'", None),
        ({"clients": {"ann": {"local_examples": ""}}}, "no number of examples for 'ann'", None),
        ({"base_model": {"name": None}}, "\"base_model\" has no text as 'name'", None),
        ({"final": {"round": 9}}, '"final" names no complete round', None),
        ({"final": {"round": [1]}}, '"final" names no complete round', None),
        ({"versions": None}, '"versions" is not an object', None),
    ],
)
def test_a_fault_of_the_manifest_is_an_error_or_a_problem(paths, change, fault, rounds):
    manifest = json.loads(paths.manifest.read_text()) | change
    paths.manifest.write_text(json.dumps(manifest))
    with pytest.raises(RunDirectoryError) as caught:
        load_run(paths.folder)
    found = read_what_is_left(paths.folder)
    assert fault in str(caught.value)
    assert str(caught.value) == f"{paths.folder}/{found.problems[0]}"
    assert rounds is None or [entry["round"] for entry in found.manifest["rounds"]] == rounds
    assert check_manifest(found.manifest)[1] == [] or change.keys() & {"base_model"}


def test_many_faults_are_counted(paths):
    paths.manifest.write_text(json.dumps({"rounds": [{}] * 100}))
    with pytest.raises(RunDirectoryError, match=f"and {103 - MOST_FAULTS} more.$"):
        load_run(paths.folder)


@pytest.mark.parametrize("name", ["config", "manifest", "history", "evaluation"])
def test_what_cannot_be_read_is_named_and_the_rest_is_there(paths, name):
    file = getattr(paths, name)
    file.write_text("[1, 2")
    found = read_what_is_left(paths.folder)
    assert "is damaged" in found.problems[0]
    for other in {"config", "manifest", "history", "evaluation"} - {name}:
        is_left_out = (name, other) == ("manifest", "evaluation")  # of which round it is unknown
        assert bool(getattr(found, other)) != is_left_out
