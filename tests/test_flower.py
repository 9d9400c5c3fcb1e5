"""Real runs: ``flwr run`` with its daemon and Ray workers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from flower_process import BIN

pytestmark = pytest.mark.slow


def events(run: Path, name: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_run_started_from_a_foreign_folder(flower, tiny_experiment, tiny_project, tmp_path):
    """Its results lie in the project and every message reached one process with one load."""
    output = flower.run(
        str(ROOT),
        cwd=tmp_path,
        run_config=f"config='{tiny_experiment}' run-name='foreign' num-rounds=3",
    )
    run = tiny_project / "results" / "foreign"
    assert run.is_dir(), output
    assert output.count(f"Run directory: {run}") == 2, output
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["round"] for entry in manifest["rounds"]] == [0, 1, 2, 3]
    processes = {event["process"] for event in events(run, "facts")}
    assert len(processes) == 1 and "base model loaded 1 times" in processes.pop()
    assert (tiny_project / "results" / "latest").resolve() == run
    assert not list(tmp_path.iterdir())
    assert "global + own local" in output and "round 3/3" in output
    assert output.count("CUDA_VISIBLE_DEVICES is '7'") == 2, output


def test_run_config_keys_do_what_they_say(flower, tiny_experiment, tmp_path):
    output = flower.run(
        ".",
        run_config=f"config='{tiny_experiment}' mode='local-only' output-dir='{tmp_path}' "
        "run-name='named' overrides='training.learning_rate=1e-4 adapters.local.rank=3' "
        "num-rounds=1",
    )
    run = tmp_path / "named"
    assert run.is_dir(), output
    config = json.loads((run / "config.json").read_text())
    assert config["federated"]["mode"] == "local-only"
    assert config["federated"]["num_rounds"] == 1
    assert config["training"]["learning_rate"] == 1e-4
    folder = run / "final" / "clients" / "ann"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3


def test_another_number_of_nodes_stops_with_the_line_that_fixes_it(flower, tiny_experiment):
    output = flower.run(
        ".", "--federation-config", "num-supernodes=3", run_config=f"config='{tiny_experiment}'"
    )
    assert "The federation has 3 nodes and federated.clients names 2." in output
    line = 'flwr run . --stream --federation-config "num-supernodes=2" --run-config '
    assert f"{line}\"config='{tiny_experiment}'\"" in output


def test_a_bad_configuration_is_one_clear_error(flower, tiny_experiment):
    output = flower.run(
        ".",
        run_config=f"config='{tiny_experiment}' mode='duel' overrides='training.epoch=1'",
    )
    assert "has 2 faults" in output
    assert "federated.mode" in output and "training.epoch: unknown key" in output


def test_a_study_runs_what_is_missing_and_evaluates_it(flower, tiny_experiment, tmp_path):
    path = tmp_path / "study.yaml"
    study = {
        "name": "tiny-study",
        "config": str(tiny_experiment),
        "seeds": [1],
        "overrides": "federated.num_rounds=1",
        "kept": str(tmp_path / "kept"),
    }
    folder = tmp_path / "results" / "tiny-study"

    def run(**variants: str) -> str:
        path.write_text(json.dumps(study | {"variants": variants}))
        result = subprocess.run(
            [BIN / "fedlora", "study", path, "--output-dir", tmp_path / "results"],
            env=flower.env | {"FEDLORA_PROJECT_DIR": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert "| pair | global + own local |" in run(pair="")
    evaluated = (folder / "pair-seed1" / "evaluation.json").stat().st_mtime_ns
    shutil.copytree(folder / "pair-seed1", folder / "one-seed1")
    (tmp_path / "kept" / "pair-seed1.json.gz").unlink()  # else the run would not be looked at
    manifest = json.loads((folder / "pair-seed1" / "manifest.json").read_text())
    (folder / "pair-seed1" / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    output = run(pair="", one="federated.mode=fedavg")
    assert "pair-seed1 is unfinished and resumed" in output
    assert "one-seed1 is of another configuration" in output
    assert (folder / "one-seed1.earlier-1").is_dir()
    kept = (folder / "pair-seed1" / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(folder / "one-seed1")  # as on another machine
    summary = (folder / "summary.md").read_text()
    again = run(pair="", one="federated.mode=fedavg")
    assert again.count("-seed1: kept in") == 2 and not (folder / "one-seed1").exists()
    assert (folder / "summary.md").read_text() == summary
    assert "| pair | global + own local |" in output and "| one | global alone |" in output
    assert json.loads((folder / "summary.json").read_text())["figures"].keys() == {"pair", "one"}
    assert (folder / "pair-seed1" / "manifest.json").stat().st_mtime_ns == kept
    assert (folder / "pair-seed1" / "evaluation.json").stat().st_mtime_ns == evaluated
