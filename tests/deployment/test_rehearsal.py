"""The whole of a deployment, as ``fedlora deploy rehearse`` holds it on one machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from flower_process import BIN, processes_with

from fedlora_app.demo.rehearsal import CITIES, KILLED, PAUSED, RUN_NAME, STRANGER
from fedlora_app.deployment.client_file import PRIVATE
from fedlora_app.runs.paths import RunPaths

MINUTES = 60


def simulate(flower, folder: Path, output_dir: Path) -> RunPaths:
    """Run the rehearsal's experiment in Flower's simulation, with what is the sites' own."""
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text())
    experiment["federated"]["clients"] = []
    for city in CITIES:
        own = yaml.safe_load((folder / city / "client.yaml").read_text())
        files = {key: own[key] for key in PRIVATE if key in own}
        for key in files.keys() - {"system_prompt"}:
            files[key] = str(folder / city / files[key])
        experiment["federated"]["clients"].append({"id": city, **files})
        experiment["data"] = {k: str(folder / city / v) for k, v in own["data"].items()}
    experiment["data"]["universal_train"] = None
    config = folder / "simulated.yaml"
    config.write_text(yaml.safe_dump(experiment))
    output = flower.run(
        ".",
        "--federation-config",
        f"num-supernodes={len(CITIES)}",
        run_config=f"config='{config}' run-name='simulated' output-dir='{output_dir}'",
    )
    paths = RunPaths(output_dir / "simulated")
    assert paths.final_global.is_dir(), output
    return paths


@pytest.mark.minutes
@pytest.mark.deployment
def test_a_deployment_survives_and_ends_in_the_bytes_of_the_simulation(flower, tmp_path):
    folder = tmp_path / "rehearsal"
    held = subprocess.run(
        [BIN / "fedlora", "deploy", "rehearse", "--output", folder],
        env=flower.env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=10 * MINUTES,
    )
    logs = "".join(path.read_text()[-3000:] for path in folder.rglob("*.log"))
    assert held.returncode == 0, held.stdout + held.stderr + logs
    for expected in (
        f"{KILLED}: killed while it trained.",
        f"{PAUSED}: stood still",
        f"{STRANGER}: its SuperNode, with a key of its own making, was refused",
        "may not list or start runs",
        "The logs of both ends are whole and say the same.",
    ):
        assert expected in held.stdout
    assert not processes_with(str(folder / "coordinator"))
    simulated = simulate(flower, folder, tmp_path / "results")
    deployed = RunPaths(folder / "results" / RUN_NAME)
    files = {"global": (simulated.final_global, deployed.final_global)}
    for city in CITIES:
        store = RunPaths(folder / city / "store" / RUN_NAME)
        files[city] = simulated.local_adapter(city, 1), store.local_adapter(city, 1)
    for name, (one, other) in files.items():
        weights = [(path / "adapter_model.safetensors").read_bytes() for path in (one, other)]
        assert weights[0] == weights[1], name
