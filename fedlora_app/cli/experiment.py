"""Commands on an experiment's YAML: check and plan it, and run a study of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora_app.cli.root import AsJson, ConfigPath, app, find_config, quiet_transformers
from fedlora_app.foundation.environment import prepare_environment
from fedlora_app.foundation.terminal import shell, show_progress

if TYPE_CHECKING:
    from fedlora_app.config.schema import Config


@app.command()
def check(
    config: ConfigPath,
    overrides: Annotated[str, typer.Option(help='As in run-config: "training.replay=0.5".')] = "",
    every: Annotated[
        bool, typer.Option("--all", help="A line for every finding, and not one for each kind.")
    ] = False,
    as_json: AsJson = False,
    plant: Annotated[
        int | None,
        typer.Option(min=1, help="Write a copy of the data with so many canaries in each file."),
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="With --plant: whose files; everybody's by default.")
    ] = None,
    into: Annotated[
        Literal["local", "universal", "both"], typer.Option(help="With --plant: which files.")
    ] = "both",
    output: Annotated[
        Path | None, typer.Option(help="With --plant: a folder that is empty or not there.")
    ] = None,
) -> None:
    """Check a configuration, its data and its question sets, without the model's weights.

    The model's tokenizer is used where it is on this machine. Example: fedlora check conf/demo.yaml

    Canaries are records with made-up secrets. What a run remembers of them, fedlora attack says.
    Example: fedlora check conf/demo.yaml --plant 10 --output data/planted
    """
    if (plant is None) != (output is None):
        raise typer.BadParameter("--plant and --output go together.")
    if plant is None and (client or into != "both"):
        raise typer.BadParameter("--client and --into need --plant.")
    _look_at_nothing_remote()
    from fedlora_app.config.idle import describe_idle
    from fedlora_app.config.loading import load_config
    from fedlora_app.data.linter import describe_findings
    from fedlora_app.preflight import inspect_experiment
    from fedlora_app.runs.settings import require_federation
    from fedlora_app.training.decay import describe_decay
    from fedlora_app.training.selection import describe_long_phases

    path, root = find_config(config)
    experiment = load_config(path, overrides)
    if plant is not None and output is not None:
        path = _plant(experiment, root, output, plant, client or [], into, str(path))
        experiment = load_config(path)
    require_federation(experiment)
    found = inspect_experiment(experiment, root)
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in found.findings], ensure_ascii=False))
    else:
        typer.echo(f"{path}: the configuration and {len(experiment.client_ids)} clients' data.")
        counts = {
            c: (len(f.universal.records), len(f.local.records)) for c, f in found.files.items()
        }
        for line in (
            *describe_idle(experiment),
            *describe_decay(experiment, counts),
            *describe_long_phases(experiment, counts),
        ):
            typer.echo(line)
        typer.echo(describe_findings(found.findings, every=every))
    if found.note:
        typer.echo(found.note, err=True)
    if found.has_errors:
        raise typer.Exit(2)


def _plant(
    experiment: Config,
    root: Path,
    output: Path,
    count: int,
    clients: list[str],
    into: str,
    source: str,
) -> Path:
    """Write the experiment with canaries; say on stderr what there is, return its YAML's path."""
    from fedlora_app.data.canaries import ROLES
    from fedlora_app.data.planting import plant_canaries

    roles = ROLES if into == "both" else (into,)
    planted = plant_canaries(
        experiment, root, output, count, clients=clients, roles=roles, source=source
    )
    for line in (
        f"Written: {output}, with {planted.num_canaries} canaries. Next:",
        f"  fedlora train {shell(planted.path)}",
        "  fedlora attack latest",
        *filter(None, [planted.note]),
    ):
        typer.echo(line, err=True)
    return planted.path


@app.command()
def plan(
    config: ConfigPath,
    gpu_memory: Annotated[
        str, typer.Option(help="24GB or 7.5GiB. Default: this machine's GPU, or its CPU.")
    ] = "",
    overrides: Annotated[str, typer.Option(help='As in run-config: "training.batch_size=2".')] = "",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Load the base and measure steps and answers here."),
    ] = False,
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="With --measure: random weights, from configuration and tokenizer."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict a run's memory, bytes per round and time, and say what would make it fit.

    No weights are loaded unless it is to measure. Example: fedlora plan conf/demo.yaml --measure
    """
    if measure and gpu_memory:
        raise typer.BadParameter("--measure is for this machine; leave out --gpu-memory.")
    if random and not measure:
        raise typer.BadParameter("--random needs --measure.")
    _look_at_nothing_remote()
    if measure:
        prepare_environment()  # as a client has it, before torch is imported
    from fedlora_app.config.loading import load_config
    from fedlora_app.planning.plan import build_plan
    from fedlora_app.planning.text import describe_plan

    path, root = find_config(config)
    experiment = load_config(path, overrides)
    planned = build_plan(experiment, root, gpu_memory)
    if not measure:
        typer.echo(
            json.dumps(planned.dump(), ensure_ascii=False) if as_json else describe_plan(planned)
        )
        return
    from fedlora_app.planning.measured_text import describe_measurement
    from fedlora_app.planning.measurement import measure_run

    quiet_transformers()
    with show_progress("parts", quiet=as_json) as show:
        found = measure_run(experiment, root, planned, is_random=random, report=show)
    if as_json:
        typer.echo(json.dumps({"plan": planned.dump(), "measured": found.dump()}))
    else:
        typer.echo(describe_measurement(experiment, planned, found))


@app.command()
def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML.")],
    output_dir: Annotated[
        Path, typer.Option(help="Where its folder goes, relative to the project.")
    ] = Path("results"),
) -> None:
    """Run and evaluate every variant and seed of a study, and write one summary table.

    What is finished is not repeated. Example: fedlora study conf/study-demo.yaml
    """
    from fedlora_app.study import load_study, run_study

    path, root = find_config(config)
    quiet_transformers()
    with show_progress() as show:
        text = run_study(load_study(path), root, (root / output_dir).resolve(), show)
    typer.echo(text)


def _look_at_nothing_remote() -> None:
    """Keep the hub's client, once it is imported, from asking for anything."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there
