"""Real runs: ``flwr run`` with its daemon and Ray workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from flower_process import BIN
from loopback import Federation

from fedlora_app.config.loading import load_config

pytestmark = pytest.mark.slow


def events(run: Path, name: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.minutes
def test_a_study_runs_what_is_missing_and_evaluates_it(
    flower, tiny_experiment, tiny_project, tmp_path
):
    """Also where no environment is activated, as for cron: here it starts Flower's daemon."""
    path = tmp_path / "study.yaml"
    study = {
        "name": "tiny-study",
        "config": str(tiny_experiment),
        "seeds": [1],
        "overrides": "federated.num_rounds=1",
        "kept": str(tmp_path / "kept"),
        "variants": {"pair": "", "one": "federated.mode=fedavg"},
    }
    path.write_text(json.dumps(study))
    folder = tmp_path / "results" / "tiny-study"

    def run() -> str:
        result = subprocess.run(
            [BIN / "fedlora", "study", path, "--output-dir", tmp_path / "results"],
            env=flower.env | {"FEDLORA_PROJECT_DIR": str(ROOT), "PATH": os.defpath},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    config = load_config(tiny_experiment, overrides="federated.num_rounds=1 experiment.seed=1")
    pair = Federation(tiny_project, folder, config).run("pair-seed1")
    manifest = json.loads((pair / "manifest.json").read_text())
    (pair / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    shutil.copytree(pair, folder / "one-seed1")
    output = run()
    assert "pair-seed1 is unfinished and resumed" in output
    assert "one-seed1 is of another configuration" in output
    assert (folder / "one-seed1.earlier-1").is_dir()
    assert "| pair | global + own local |" in output and "| one | global alone |" in output
    assert json.loads((folder / "summary.json").read_text())["figures"].keys() == {"pair", "one"}
    assert not (folder / ".base-answers.jsonl").exists()
    finished = (pair / "manifest.json").stat().st_mtime_ns
    evaluated = (pair / "evaluation.json").stat().st_mtime_ns
    shutil.rmtree(folder / "one-seed1")  # as on another machine
    (tmp_path / "kept" / "pair-seed1.json.gz").unlink()  # and this one must be looked at
    summary = (folder / "summary.md").read_text()
    again = run()
    assert again.count("-seed1: kept in") == 1 and not (folder / "one-seed1").exists()
    assert (folder / "summary.md").read_text() == summary
    assert (pair / "manifest.json").stat().st_mtime_ns == finished
    assert (pair / "evaluation.json").stat().st_mtime_ns == evaluated


def test_a_run_started_from_a_foreign_folder(flower, tiny_experiment, tiny_project, tmp_path):
    """Its results lie in the project and every message reached one process with one load."""
    output = flower.run(
        str(ROOT),
        cwd=tmp_path,
        run_config=f"config='{tiny_experiment}' run-name='foreign' num-rounds=3 "
        "overrides='training.learning_rate=1e-4 adapters.local.rank=3 federated.final=best "
        "data.universal_validation=universal_test.json'",
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
    assert json.loads((run / "config.json").read_text())["training"]["learning_rate"] == 1e-4
    folder = run / "final" / "clients" / "ann"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert output.count("CUDA_VISIBLE_DEVICES is '7'") == 2, output
    assert manifest["final"]["round"] == 2, "as good as the last, and earlier"
    for final, kept in (("global", "server"), ("clients/ann", "clients/ann")):
        folders = run / "final" / final, run / kept / "round_002"
        ours, theirs = (folder / "adapter_model.safetensors" for folder in folders)
        assert ours.read_bytes() == theirs.read_bytes()
    assert "final/ holds round 2 of 3, which does best" in output


@pytest.mark.minutes
def test_another_number_of_nodes_stops_with_the_line_that_fixes_it(flower, tiny_experiment):
    output = flower.run(
        ".", "--federation-config", "num-supernodes=3", run_config=f"config='{tiny_experiment}'"
    )
    assert "The federation has 3 nodes and federated.clients names 2." in output
    line = 'flwr run . --stream --federation-config "num-supernodes=2" --run-config '
    assert f"{line}\"config='{tiny_experiment}'\"" in output
