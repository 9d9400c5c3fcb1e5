"""New clients of a finished run, by the command that users type."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, build_tiny_config
from safetensors.torch import load_file, save_file

from fedlora_app.client import Client
from fedlora_app.config.loading import change_config
from fedlora_app.report.sections import describe_command
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.reading import load_run

WEIGHTS = "adapter_model.safetensors"
CY = build_tiny_config(("cy",)).dump()["federated"]["clients"][0]


def hash_all(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def hash_adapters(run):
    return {name: sha for name, sha in hash_all(run).items() if name.endswith(WEIGHTS)}


@pytest.fixture(scope="module")
def project(tiny_project, tmp_path_factory):
    return shutil.copytree(tiny_project, tmp_path_factory.mktemp("adapted") / "project")


@pytest.fixture
def adapt(fedlora, project, finished, unrendered):
    """Adapt the clients of a YAML to a run; return the status, what was printed, and the folder."""

    def call(given, name, run=None):
        path = project / "newcomer.yaml"
        path.write_text(yaml.safe_dump(given))
        arguments = (run or finished.path, "--config", path, "--run-name", name)
        return *fedlora("adapt", *arguments), project / "results" / name

    return call


@pytest.fixture(scope="module")
def newcomer():
    """What a new client has to say: who it is. Everything else is as in the run."""
    return {"federated": {"clients": [CY]}, "data": {"conflict_test": "conflict.json"}}


def test_a_new_client_gets_a_local_adapter_and_the_run_keeps_its_bytes(
    adapt, newcomer, finished, project, fedlora
):
    before = hash_all(finished.path)
    status, out, err, run = adapt(newcomer, "cy")
    assert (status, err) == (0, "")
    assert hash_all(finished.path) == before
    saved = load_run(run)
    assert saved.manifest["finished"] and saved.config.federated.mode == "adapted"
    origin = saved.manifest["adapted_from"]
    shared = finished.path / "final" / "global" / WEIGHTS
    sha256 = hashlib.sha256(shared.read_bytes()).hexdigest()
    assert origin == {
        **{"run": "run", "mode": "dual", "schedule": "phased"},
        **{"round": 2, "global_adapter": sha256},
    }
    assert (run / "final" / "global" / WEIGHTS).read_bytes() == shared.read_bytes()
    manifest, theirs = saved.manifest, load_run(finished.path).manifest
    assert manifest["base_model"]["fingerprint"] == theirs["base_model"]["fingerprint"]
    assert manifest["date"] == theirs["date"] and manifest["clients"]["cy"]["local_examples"] == 5
    rounds = {entry["round"]: entry["adapters"] for entry in manifest["rounds"]}
    assert list(rounds) == [0, 1, 2] and all(r["global"] == sha256 for r in rounds.values())
    assert len({r["local:cy"] for r in rounds.values()}) == 3
    # As many steps as a client of the run takes in its local phases: 8 records in batches of 2.
    history = json.loads((run / "history.json").read_text())
    steps = [e["metrics"]["train_local/num_steps"] for e in history if e["phase"] == "local"]
    assert steps == [4, 4]
    assert "nothing: no server takes part" in out and "server          no" not in out
    assert "What is done" not in out and f"Report: {run / 'report.html'}" in out

    status, out, _ = fedlora("evaluate", run)
    assert status == 0 and "cy, round 2: adapted, clients answer with global+local" in out
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["mode"] == "adapted" and evaluation["answering"] == "global+local"
    asked = {row["adapters"] for row in evaluation["swap_table"]}
    assert asked == {"base", "global", "local:cy", "global+local:cy"}
    conflicts = [q for q in evaluation["questions"] if q["question_set"] == "conflict"]
    assert {len(q["candidates"]) for q in conflicts} == {3}  # ann's and bob's answers are wrong
    status, out, _ = fedlora("ask", run, "--client", "cy", "What is the red rule?")
    assert status == 0 and out.strip()
    folder = project / "exported"
    status, out, _ = fedlora("export", run, "--client", "cy", "--output", folder)
    assert status == 0 and (folder / WEIGHTS).exists()
    page = (run / "report.html").read_text()
    assert "adapted_from.global_adapter" in page and "fedlora adapt run --config" in page
    assert hash_all(finished.path) == before


def test_the_same_command_gives_the_same_bytes_and_a_stopped_one_goes_on_to_them(
    adapt, newcomer, finished, tmp_path, monkeypatch
):
    whole = adapt(newcomer, "whole")[-1]
    handed_out = tmp_path / finished.path.name  # all that a server need give a new client
    shutil.copytree(finished.path / "final" / "global", handed_out / "final" / "global")
    for name in ("config.json", "manifest.json"):
        shutil.copy(finished.path / name, handed_out)
    again = adapt(newcomer, "again", handed_out)[-1]
    assert hash_adapters(again) == hash_adapters(whole)
    assert load_run(again).manifest["adapted_from"] == load_run(whole).manifest["adapted_from"]
    personalise = Client.personalise

    def stop(client, server_round, *args):
        if server_round == 2:
            raise KeyboardInterrupt
        return personalise(client, server_round, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "personalise", stop)
        status, _, err, stopped = adapt(newcomer, "stopped")
    assert status == 130 and "To go on: fedlora adapt " in err and "--name stopped" in err
    manifest = load_run(stopped).manifest
    assert manifest["finished"] is None and not (stopped / "final").exists()
    changed = newcomer | {"training": {"learning_rate": 1.0}}
    status, _, err, _ = adapt(changed, "stopped")
    assert status == 2 and "training.learning_rate: 0.01 in the run, 1.0 given" in err
    status, out, err, _ = adapt(newcomer, "stopped")
    assert (status, err) == (0, "") and "Going on after round 1 of 2." in out
    assert hash_adapters(stopped) == hash_adapters(whole)
    status, _, err, _ = adapt(newcomer, "stopped")
    assert status == 2 and "exists already and is left as it is" in err


def test_a_client_of_a_run_of_one_round_gets_its_own_local_adapter_again(
    adapt, tiny_project, tmp_path
):
    """What an adaptation trains is a local phase of the run, to the byte."""
    from loopback import Federation

    config = change_config(build_tiny_config(), "federated.num_rounds=1 training.replay=0.5")
    run = Federation(tiny_project, tmp_path, config).run()
    clients = config.dump()["federated"]["clients"]
    status, out, _, adapted = adapt({"federated": {"clients": clients}}, "both", run)
    assert status == 0 and "Note: ann is a client of run and has a local adapter there" in out
    for client in ("ann", "bob"):
        ours, theirs = (
            folder / "final" / "clients" / client / WEIGHTS for folder in (adapted, run)
        )
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_kept_share_of_the_local_adapter_is_that_of_the_run(adapt, newcomer):
    """Decay is a phase's, and the phases are the run's."""
    share = {"training": {"local_kept_share": 0.5}}
    status, out, _, _ = adapt(newcomer | share, "decayed")
    assert status == 0
    assert "leaves 50 % over a phase of 4 steps, and 25 % over the run's 2." in out


def test_whatever_averaged_the_global_adapter_new_clients_get_a_pair(
    adapt, newcomer, tiny_project, tmp_path
):
    from loopback import Federation

    config = build_tiny_config(
        federated={"mode": "fedavg", "num_rounds": 1, "min_clients": 2}, adapters={"gate": "prompt"}
    )
    run = Federation(tiny_project, tmp_path, config).run()
    status, _, _, adapted = adapt(newcomer, "of-fedavg", run)
    assert status == 0
    local = load_file(adapted / "final" / "clients" / "cy" / WEIGHTS)
    assert any(tensor.any() for key, tensor in local.items() if "lora_B" in key)
    assert (adapted / "clients" / "cy" / "gate" / "gate.json").exists()  # which no other one has
    assert not list(run.rglob("gate.json"))


def test_all_that_differs_is_refused_at_once_and_nothing_is_written(adapt, newcomer, finished):
    before = hash_all(finished.path)
    given = {
        "adapters": {"global": {"rank": 8}, "gate": "prompt"},
        "federated": {"clients": [CY], "num_round": 3},
        "training": {"epochs": 2},
    }
    status, _, err, run = adapt(given, "other")
    assert status == 2 and not run.exists()
    for fault in (
        "adapters.global.rank: it is 4 in the run and 8 in newcomer.yaml.",
        "adapters.gate: it is 'none' in the run and 'prompt' in newcomer.yaml.",
        'federated.num_round: unknown key. Did you mean "num_rounds"?',
        "training.epochs: unknown key.",
    ):
        assert fault in err
    missing = CY | {"local_train": "no.json", "local_test": "none.json"}
    given = newcomer | {"federated": {"clients": [missing]}, "model": {"name": "no-model"}}
    status, _, err, run = adapt(given, "other")
    assert status == 2 and not run.exists() and "local_test: " in err and "local_train: " in err
    assert err.count('The base model "no-model" was not found') == 1
    status, _, err, _ = adapt({"data": {}}, "other")
    assert status == 2 and "federated.clients: missing." in err
    assert hash_all(finished.path) == before


def test_another_base_model_is_refused_and_the_same_in_another_folder_is_not(
    adapt, newcomer, project
):
    shutil.copytree(project / "model", project / "moved", dirs_exist_ok=True)
    status, *_, run = adapt(newcomer | {"model": {"name": "moved"}}, "moved")
    assert status == 0 and load_run(run).config.model.name == "moved"
    shutil.copytree(project / "model", project / "changed", dirs_exist_ok=True)
    state = load_file(project / "changed" / "model.safetensors")
    state["model.norm.weight"] *= 1.5
    save_file(state, project / "changed" / "model.safetensors", metadata={"format": "pt"})
    status, _, err, run = adapt(newcomer | {"model": {"name": "changed"}}, "changed")
    assert status == 2 and not run.exists() and "model.name: changed is not the base model" in err


@pytest.mark.parametrize("fault", ["unfinished", "damaged", "local-only"])
def test_a_run_without_a_final_global_adapter_is_refused(
    adapt, newcomer, finished, tmp_path, fault
):
    run = shutil.copytree(finished.path, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    config = json.loads((run / "config.json").read_text())
    if fault == "unfinished":
        manifest["finished"] = None
    elif fault == "local-only":
        config["federated"]["mode"] = "local-only"
    else:
        path = run / "final" / "global" / WEIGHTS
        state = load_file(path)
        state[next(iter(state))] += 1
        save_file(state, path, metadata={"fedlora_role": "global"})
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.json").write_text(json.dumps(config))
    said = {
        "unfinished": "has not finished",
        "local-only": "share nothing",
        "damaged": "is not the file that the run wrote",
    }
    status, _, err, _ = adapt(newcomer, fault, run)
    assert status == 2 and said[fault] in err


def test_a_strangers_run_decides_neither_about_code_nor_about_trackers(
    adapt, newcomer, finished, tmp_path
):
    run = shutil.copytree(finished.path, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["trust_remote_code"] = True
    config["experiment"]["track"] = ["wandb"]
    (run / "config.json").write_text(json.dumps(config))
    status, *_, adapted = adapt(newcomer, "careful", run)
    found = load_run(adapted).config
    assert status == 0 and not found.model.trust_remote_code and found.experiment.track == []


def test_settings_of_a_server_are_said_to_have_no_effect(adapt, newcomer):
    federated = newcomer["federated"] | {"mode": "dual", "aggregation": "fedavg", "min_clients": 1}
    status, out, _, run = adapt(newcomer | {"federated": federated}, "whole-yaml")
    assert status == 0 and load_run(run).config.federated.min_clients is None
    assert "these have no effect: federated.aggregation, federated.min_clients." in out
    copied = [client | {"weight": 0.5, "first_round": 9} for client in federated["clients"]]
    status, out, _, run = adapt(newcomer | {"federated": {"clients": copied}}, "copied")
    assert status == 0 and load_run(run).config.federated.clients[0].first_round == 1
    assert "these have no effect: federated.clients.weight, federated.clients.first_round." in out


def test_the_mode_is_no_federation_s(fedlora, project):
    status, _, err = fedlora("train", ROOT / "conf" / "demo.yaml", "--mode", "adapted")
    assert status == 2 and "fedlora adapt RUN --config CONFIG" in err


def test_a_phase_that_fails_ends_in_one_sentence(adapt, newcomer, monkeypatch):
    status, _, err, run = adapt(newcomer | {"training": {"learning_rate": 1e30}}, "diverged")
    assert status == 2 and "Error: cy: " in err and "Traceback" not in err
    assert load_run(run).manifest["finished"] is None


def with_validation(*clients):
    """Return clients that are asked their own test questions for validation."""
    found = build_tiny_config(clients).dump()["federated"]["clients"]
    return [client | {"local_validation": client["local_test"]} for client in found]


def test_a_client_with_a_local_adapter_fits_only_its_scale(
    fedlora, project, finished, tiny_project, tmp_path, unrendered
):
    from loopback import Federation

    newer = Federation(tiny_project, tmp_path, build_tiny_config(("bob", "cy"))).run()
    path = project / "ann.yaml"
    scales = {"evaluation": {"local_scales": [0.5, 1.0, 2.0]}}
    path.write_text(yaml.safe_dump({"federated": {"clients": with_validation("ann")}} | scales))
    before = hash_all(finished.path), hash_all(newer)
    adapt = ["adapt", newer, "--config", path, "--run-name", "scaled", "--only-scale"]
    status, out, err = fedlora(*adapt, finished.path)
    assert (status, err) == (0, "") and "Nothing is trained" in out
    run = project / "results" / "scaled"
    history = json.loads((run / "history.json").read_text())
    (phase,) = (e["metrics"] for e in history if e["phase"] == "local")
    assert phase["train_local/num_steps"] == 0
    assert phase["train_local/score"] >= phase["train_local/score_unscaled"]
    assert len([line for line in out.splitlines() if line.startswith("ann: scale ")]) == 3
    weights = f"final/clients/ann/{WEIGHTS}"
    ours, theirs = load_file(run / weights), load_file(finished.path / weights)
    for key, tensor in theirs.items():
        factor = phase["train_local/scale"] if ".lora_B." in key else 1.0
        assert torch.equal(ours[key], factor * tensor)
    manifest = load_run(run).manifest
    assert manifest["adapted_from"]["local_adapters"] == {"run": "run", "round": 2}
    assert describe_command(read_what_is_left(run)).endswith(" --only-scale run")
    assert (run / "final" / "global" / WEIGHTS).read_bytes() == (
        newer / "final" / "global" / WEIGHTS
    ).read_bytes()
    assert (hash_all(finished.path), hash_all(newer)) == before
    status, out, _ = fedlora("ask", run, "--client", "ann", "What is the red rule?")
    assert status == 0


def test_a_scale_needs_an_adapter_that_fits_and_questions_to_choose_it_on(
    fedlora, project, finished
):
    path = project / "nobody.yaml"
    given = {"adapters": {"local": {"rank": 8}}, "federated": {"clients": with_validation("ann")}}
    given["federated"]["clients"] += [CY]
    path.write_text(yaml.safe_dump(given))
    adapt = ["adapt", finished.path, "--config", path, "--run-name", "no", "--only-scale"]
    status, _, err = fedlora(*adapt, finished.path)
    assert status == 2 and "cy: " in err and "has no client cy. It has: ann, bob." in err
    assert "ann: adapters.local: it is " in err and not (project / "results" / "no").exists()
    given = {"federated": {"clients": build_tiny_config(("ann",)).dump()["federated"]["clients"]}}
    path.write_text(yaml.safe_dump(given))
    status, _, err = fedlora(*adapt, finished.path)
    assert status == 2 and "ann: there are no validation questions" in err
