"""Commands that run one end of a deployment, and the federated run itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.deploy import DEPLOYMENT, FROM_NOTHING, deploy
from fedlora_app.foundation.terminal import shell

End = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder, or a site's.")]


@deploy.command(rich_help_panel=FROM_NOTHING)
def start(
    folder: End = Path("."),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay in front, as systemd and containers want it.")
    ] = False,
) -> None:
    """Start what runs at this end: the SuperLink, or a SuperNode with its executor.

    What ends by itself is started again. Example: fedlora deploy start ayr
    """
    if foreground:
        from fedlora_app.deployment.supervisor import supervise

        raise typer.Exit(supervise(folder, typer.echo))
    from fedlora_app.deployment.control import start_in_background

    for process in start_in_background(folder):
        typer.echo(f"{process.name}: process {process.pid}")
    named = shell(folder)
    typer.echo(f"Running. fedlora deploy status {named} says how; fedlora deploy stop {named}.")


@deploy.command(rich_help_panel=FROM_NOTHING)
def status(folder: End = Path(".")) -> None:
    """Say what runs at this end since when, and at the coordinator which sites are online.

    Example: fedlora deploy status deployment
    """
    from fedlora_app.deployment.control import describe_status

    for line in describe_status(folder):
        typer.echo(line)


@deploy.command(rich_help_panel=FROM_NOTHING)
def stop(folder: End = Path(".")) -> None:
    """End what runs at this end, in order; nothing of it is left.

    A site that is stopped in the middle of its work says so to the coordinator.
    Example: fedlora deploy stop ayr
    """
    from fedlora_app.deployment.control import stop as stop_end

    ended = stop_end(folder)
    typer.echo(f"Stopped: {', '.join(ended)}." if ended else f"{folder}: nothing was running.")


@deploy.command(rich_help_panel=FROM_NOTHING)
def run(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")
    ] = DEPLOYMENT,
    rounds: Annotated[
        int, typer.Option(min=0, help="In the place of federated.num_rounds.", show_default=False)
    ] = 0,
    name: Annotated[str, typer.Option(help="Of the run directory.")] = "",
    output_dir: Annotated[str, typer.Option(help="Relative to the project.")] = "results",
    resume: Annotated[str, typer.Option(metavar="RUN", help="Go on with a stopped run.")] = "",
    overrides: Annotated[str, typer.Option(help='As "training.learning_rate=1e-4".')] = "",
) -> None:
    """Run the deployment's experiment with the sites, and show its log; at the coordinator.

    Status 2 if the run failed. Ctrl-C stops it; what is done is kept.
    Example: fedlora deploy run deployment
    """
    from fedlora_app.deployment.coordinator import CoordinatorError, load_coordinator
    from fedlora_app.foundation.project import find_project_root
    from fedlora_app.launch import run_with_flower

    coordinator = load_coordinator(folder)
    if not coordinator.is_running:
        raise CoordinatorError(
            f"The SuperLink of {folder} does not run. First: fedlora deploy start {shell(folder)}"
        )
    run_config = {
        "config": str(coordinator.config_path),
        "num-rounds": rounds,
        "output-dir": output_dir,
        "run-name": name,
        "resume": resume,
        "overrides": overrides,
    }
    # There the SuperLink's address and root certificate stand, as the only connection.
    os.environ["FLWR_HOME"] = str(coordinator.folder.flower_home.resolve())
    run_with_flower(find_project_root(), run_config, None, typer.echo)
