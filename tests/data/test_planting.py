from __future__ import annotations

import json
import shutil

import pytest
import yaml
from conftest import ROOT, build_tiny_config

from fedlora_app.config.loading import load_config
from fedlora_app.data import canaries
from fedlora_app.data.canaries import (
    CANARIES_FILE,
    Canary,
    draw_alternatives,
    draw_canaries,
    load_canaries,
)
from fedlora_app.data.client_files import load_all_files
from fedlora_app.data.linter import lint
from fedlora_app.data.planting import NO_UPLOADS, plant_canaries
from fedlora_app.data.records import DataError
from fedlora_app.foundation.files import hash_file


@pytest.fixture
def project(tiny_project, tmp_path):
    """A copy to plant in, with the tiny experiment's YAML."""
    project = shutil.copytree(tiny_project, tmp_path / "project")
    (project / "tiny.yaml").write_text(json.dumps(build_tiny_config().dump()))
    return project


def hash_data(project):
    return {path.name: hash_file(path) for path in project.glob("*.json")}


def test_the_command_writes_an_experiment_that_trains_on_a_copy(project, fedlora):
    before, output = hash_data(project), project / "planted"
    status, out, err = fedlora(
        "check", project / "tiny.yaml", "--plant", "3", "--output", output, "--json"
    )
    assert hash_data(project) == before
    original, config = load_config(project / "tiny.yaml"), load_config(output / "experiment.yaml")
    old, new = load_all_files(original, project), load_all_files(config, project)
    found = [vars(f) for f in lint(config, new, project)]
    assert [f for f in found if f in json.loads(out)] == found
    # The tiny clients are tested on what they train on: that is found before and after.
    rules = [(f.severity, f.rule) for f in lint(original, old, project)]
    assert [(f["severity"], f["rule"]) for f in found] == rules
    assert status == 2 and "12 canaries" in err and "fedlora attack latest" in err
    changed = original.dump()
    changed["federated"]["keep_uploads"] = True
    for client in changed["federated"]["clients"]:
        for role in ("local", "universal"):
            client[f"{role}_train"] = f"planted/{client['id']}/{role}_train.json"
    assert config.dump() == changed
    for client in ("ann", "bob"):
        planted = load_canaries(new[client])
        assert [c.role for c in planted] == ["local"] * 3 + ["universal"] * 3
        for role in ("local", "universal"):
            records = getattr(new[client], role).records
            assert records[:-3] == getattr(old[client], role).records
            assert records[-3:] == [c.record for c in planted if c.role == role]
    for path in output.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_demo_has_no_finding_with_canaries(tmp_path):
    config = load_config(ROOT / "conf" / "demo.yaml")
    planted = plant_canaries(config, ROOT, tmp_path / "planted", 20)
    config = load_config(planted.path)
    assert lint(config, load_all_files(config, ROOT), ROOT) == []


def test_one_client_and_one_file(project):
    config = load_config(project / "tiny.yaml")
    planted = plant_canaries(
        config, project, project / "out", 2, clients=["bob"], roles=["universal"]
    )
    raw = yaml.safe_load(planted.path.read_text())
    ann, bob = raw["federated"]["clients"]
    assert (ann["local_train"], ann["universal_train"]) == ("ann_local.json", "ann_universal.json")
    assert (bob["local_train"], bob["universal_train"]) == (
        "bob_local.json",
        "out/bob/universal_train.json",
    )
    assert sorted(p.name for p in (project / "out" / "bob").iterdir()) == [
        CANARIES_FILE,
        "universal_train.json",
    ]
    files = load_all_files(load_config(planted.path), project)
    assert load_canaries(files["ann"]) == []
    everybodys = plant_canaries(config, project, project / "all", 2)
    whole = load_all_files(load_config(everybodys.path), project)
    wanted = [c for c in load_canaries(whole["bob"]) if c.role == "universal"]
    assert load_canaries(files["bob"]) == wanted  # whoever else is planted at


def test_lines_and_unknown_fields_stay_and_invalid_records_do_not(project):
    lines = [{"instruction": "A?", "output": "B", "source": {"page": 3}}, {"instruction": "no"}]
    (project / "ann_local.json").write_text("\n".join(map(json.dumps, lines)))
    config = load_config(project / "tiny.yaml", data__skip_invalid=True)
    plant_canaries(config, project, project / "out", 1, clients=["ann"], roles=["local"])
    written = json.loads((project / "out" / "ann" / "local_train.json").read_text())
    assert written[:-1] == lines[:1]


def test_uploads_are_not_kept_where_the_experiment_forbids_it(project):
    config = load_config(project / "tiny.yaml", federated__keep_rounds=1)
    planted = plant_canaries(config, project, project / "out", 1)
    assert planted.note == NO_UPLOADS
    assert not load_config(planted.path).federated.keep_uploads


def test_a_stale_or_damaged_listing_is_refused(project):
    config = load_config(project / "tiny.yaml")
    planted = plant_canaries(config, project, project / "out", 1)
    config = load_config(planted.path)
    path = project / "out" / "ann" / "local_train.json"
    original = path.read_text()
    path.write_text(original + "\n")
    with pytest.raises(DataError, match=r"canaries of another local_train\.json"):
        load_canaries(load_all_files(config, project)["ann"])
    path.write_text(original)
    listing = project / "out" / "ann" / CANARIES_FILE
    kept = listing.read_text()
    for damage in (
        "{}",
        "[",
        "[]",
        kept.replace('"format": 1', '"format": 2'),
        kept.replace('"secret": "', '"secret": "x'),
        kept.replace('"case"', '"name"'),
    ):
        listing.write_text(damage)
        with pytest.raises(DataError, match="is not what fedlora check --plant writes"):
            load_canaries(load_all_files(config, project)["ann"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plant", "0", "--output", "out"], "0 is not in the range"),
        (["--plant", "1"], "go together"),
        (["--output", "out"], "go together"),
        (["--client", "ann"], "need --plant"),
        (["--plant", "1", "--output", "out", "--client", "eve"], 'No client is called "eve"'),
        (["--plant", "1", "--output", "full"], "full is not empty"),
        (["--plant", "1", "--output", "tiny.yaml"], "tiny.yaml is a file"),
        (
            ["--plant", "1", "--output", "out", "--overrides", "training.max_seq_length=9"],
            "training would cut it at 9",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    project, fedlora, monkeypatch, arguments, message
):
    monkeypatch.chdir(project)
    (project / "full").mkdir()
    (project / "full" / "file").touch()
    status, _, err = fedlora("check", "tiny.yaml", *arguments)
    assert status == 2 and message in " ".join(err.replace("│", " ").split())
    assert not (project / "out").exists()


def test_missing_files_and_planted_ones_are_refused(project):
    config = load_config(project / "tiny.yaml")
    planted = plant_canaries(config, project, project / "out", 1)
    with pytest.raises(DataError, match="seems to hold canaries already"):
        plant_canaries(load_config(planted.path), project, project / "again", 1)
    (project / "bob_local.json").unlink()
    with pytest.raises(DataError, match="bob_local.json does not exist"):
        plant_canaries(config, project, project / "again", 1)
    (project / "bob_local.json").write_bytes(b"\x1f\x8b rest")
    with pytest.raises(DataError, match="compressed with gzip"):
        plant_canaries(config, project, project / "again", 1)
    assert not (project / "again").exists()


def test_canaries_differ_and_depend_on_seed_client_and_file_alone():
    clients = ["ann", "bob"]
    drawn = {
        (client, role): draw_canaries(1, clients, client, role, 50)
        for client in clients
        for role in ("local", "universal")
    }
    everything = [canary for group in drawn.values() for canary in group]
    assert len({canary.case for canary in everything}) == 200
    assert len({canary.secret for canary in everything}) > 195
    assert drawn["bob", "local"] == draw_canaries(1, ["bob", "ann"], "bob", "local", 50)
    assert drawn["bob", "local"] != draw_canaries(2, clients, "bob", "local", 50)


@pytest.mark.parametrize("own", [0, 4, 9])
def test_alternatives_are_all_the_other_secrets(own, monkeypatch):
    monkeypatch.setattr(canaries, "NUM_SECRETS", 10)
    secrets = [f"00000{digit}" for digit in range(10)]
    canary = Canary("ann", "local", "K1", secrets[own])
    assert sorted([*draw_alternatives(canary, 9, seed=1), canary.secret]) == secrets
    assert draw_alternatives(canary, 9, seed=1) != draw_alternatives(canary, 9, seed=2)
