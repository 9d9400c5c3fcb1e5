"""Commands that train: a federation with Flower, and new clients of a finished run without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora_app.cli.root import RunName, app, choose_run, find_config, quiet_transformers
from fedlora_app.foundation.environment import prepare_environment
from fedlora_app.foundation.terminal import shell

if TYPE_CHECKING:
    from fedlora_app.runs.settings import Settings


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The experiment's YAML.")
    ] = None,
    mode: Annotated[str, typer.Option(help="In the place of federated.mode.")] = "",
    rounds: Annotated[
        int, typer.Option(min=0, help="In the place of federated.num_rounds.", show_default=False)
    ] = 0,
    name: Annotated[str, typer.Option(help="Of the run directory.")] = "",
    output_dir: Annotated[str, typer.Option(help="Relative to the project.")] = "results",
    resume: Annotated[
        str, typer.Option(metavar="RUN", help="Go on with a stopped run; CONFIG may be left out.")
    ] = "",
    overrides: Annotated[str, typer.Option(help='As "training.learning_rate=1e-4".')] = "",
) -> None:
    """Check an experiment and run it with Flower, one SuperNode a client, and show its log.

    As flwr run . --stream does, but for the end: status 2 if the run failed, and one sentence.
    Ctrl-C stops the run; what is done is kept. Example: fedlora train conf/demo.yaml
    """
    if config is None and not resume:
        raise typer.BadParameter("Name an experiment's YAML, or with --resume a run.")
    from fedlora_app.foundation.project import find_project_root
    from fedlora_app.launch import run_with_flower, wait_for_release
    from fedlora_app.preflight import require_sound
    from fedlora_app.runs.directory import RunDirectory
    from fedlora_app.runs.settings import read_settings

    given = "" if config is None else str(find_config(config)[0].resolve())
    run_config = {
        "config": given or "conf/demo.yaml",
        "mode": mode,
        "num-rounds": rounds,
        "output-dir": output_dir,
        "run-name": name,
        "resume": resume,
        "overrides": overrides,
    }
    settings = read_settings(run_config)
    if not resume:
        RunDirectory.require_makeable(settings.run_dir)
    require_sound(settings.config, settings.root)
    run_config["run-name"] = "" if resume else settings.run_name  # so that its name is known here
    code = find_project_root()  # the checkout whose code runs
    try:
        run_with_flower(code, run_config, len(settings.config.federated.clients), typer.echo)
    except KeyboardInterrupt:
        wait_for_release(settings.run_dir)
        # Without a CONFIG the run's own counts; one of another checkout says where its data lie.
        other = f"{shell(config)} " if config is not None and settings.root != code else ""
        typer.echo(_describe_resuming(settings, other), err=True)
        raise


def _describe_resuming(settings: Settings, config: str) -> str:
    """Return what is left of a run that was stopped, and the command that goes on with it."""
    from fedlora_app.runs.paths import RunPaths

    if not RunPaths(settings.run_dir).manifest.exists():
        return "The run had not begun; nothing is kept."
    return (
        f"What is done is kept. To go on: fedlora train {config}--resume {shell(settings.run_dir)}"
    )


@app.command()
def adapt(
    run: RunName,
    config: Annotated[
        Path,
        typer.Option(help="A YAML with the new clients; what it does not say is as in the run."),
    ],
    name: Annotated[str, typer.Option("--run-name", "--name", help="Of the run directory.")] = "",
    output_dir: Annotated[str, typer.Option(help="Relative to the project.")] = "results",
    only_scale: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="Train nothing: scale the local adapters that they have in this run.",
        ),
    ] = "",
) -> None:
    """Fit local adapters of new clients to a finished run's global one, which stays as it is.

    Nothing of the run is changed, and no server takes part. Ctrl-C stops the work, and the same
    command with --name goes on. Example: fedlora adapt latest --config ayr.yaml
    """
    prepare_environment()  # as a client has it, before torch is imported
    from fedlora_app.adaptation import Adaptation, describe_newcomers, find_origin
    from fedlora_app.config.adapted import load_adapted_config
    from fedlora_app.config.loading import change_config
    from fedlora_app.evaluation.learning import describe_end
    from fedlora_app.model.base import choose_device
    from fedlora_app.model.device import compute_reproducibly
    from fedlora_app.report.page import write_report
    from fedlora_app.runs.history import read_history
    from fedlora_app.runs.paths import check_run_name, default_run_name
    from fedlora_app.runs.reading import load_run
    from fedlora_app.runs.settings import resolve_output_dir

    origin = find_origin(choose_run(run))
    path, root = find_config(config)
    experiment, unused = load_adapted_config(path, origin.run.config)
    earlier = load_run(choose_run(only_scale)) if only_scale else None
    notes = list(describe_newcomers(experiment, origin, unused))
    if earlier is not None:
        notes = [f"Nothing is trained: local adapters of {earlier.path} get a scale."]
        experiment = change_config(experiment, federated__num_rounds=1)
    run_name = check_run_name(name or default_run_name(experiment))
    run_dir = resolve_output_dir(root, output_dir) / run_name
    for note in notes:
        typer.echo(note)
    quiet_transformers()
    compute_reproducibly(experiment.federated.at_once)
    choose_device(run_name, may_share=experiment.federated.share_gpu)
    typer.echo(f"Run directory: {run_dir}")
    try:
        Adaptation(origin, experiment, root, run_dir, earlier, typer.echo).run()
    except KeyboardInterrupt:
        command = (
            f"fedlora adapt {shell(origin.run.path)} --config {shell(config)} --name {run_name}"
        )
        command += f" --only-scale {shell(earlier.path)}" if earlier else ""
        command += f" --output-dir {shell(output_dir)}" * (output_dir != "results")
        typer.echo(f"What is done is kept. To go on: {command}", err=True)
        raise
    typer.echo(describe_end(read_history(run_dir), experiment))
    typer.echo(f"Run directory: {run_dir}\nReport: {write_report(run_dir)}")
