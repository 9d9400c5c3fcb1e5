"""The command that takes a client out of a finished run."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora_app.cli.root import RunName, app, choose_run, quiet_transformers
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import show_progress


@app.command()
def forget(
    run: RunName,
    client: Annotated[str, typer.Option(metavar="ID", help="Whose updates are left out.")],
    name: Annotated[
        str,
        typer.Option("--run-name", "--name", help="Of the new run; RUN-without-ID by default."),
    ] = "",
    evaluate: Annotated[
        bool, typer.Option(help="Also ask both runs the test questions, to see what changes.")
    ] = True,
) -> None:
    """Make a run's global adapter again without one client, of the updates that were kept.

    RUN, trained with federated.keep_uploads, is not changed; the new run lies beside it. It is an
    approximation: the others' updates stay as they were.
    Example: fedlora forget latest --client ayr
    """
    from fedlora_app.evaluation.choices import open_round
    from fedlora_app.evaluation.forgotten import describe_change, measure_change
    from fedlora_app.forgetting import (
        APPROXIMATION,
        Forgetting,
        ForgettingError,
        configure_without,
        default_name,
    )
    from fedlora_app.foundation.files import write_json
    from fedlora_app.runs.directory import RunDirectory
    from fedlora_app.runs.paths import check_run_name
    from fedlora_app.runs.reading import load_run
    from fedlora_app.training.shapes import build_shapes

    saved = load_run(choose_run(run))
    config = configure_without(saved, client)
    target = saved.path.parent / check_run_name(name or default_name(saved.name, client))
    RunDirectory.require_absent(target)
    root = find_project_root(str(saved.paths.config))
    quiet_transformers()
    try:
        before = open_round(saved, root) if evaluate else None
    except UserError as error:
        hint = "To forget without asking anything: --no-evaluate"
        raise ForgettingError(f"{error}\n{hint}") from None
    model, faults = build_shapes(saved.config, root)
    if model is None:
        raise ForgettingError("\n".join(faults))
    forgetting = Forgetting(saved, client, config, root, model)
    with show_progress("rounds") as show:
        forgetting.check(show)
        typer.echo("The updates that were kept make the run's own global adapters, to the byte.")
        about = forgetting.write(target, show)
    for note in forgetting.describe(about):
        typer.echo(f"Note: {note}")
    new = load_run(target)
    if before is not None:
        with show_progress() as show:
            change = measure_change(before, new, client, show)
        write_json(new.paths.forgetting, change | {"note": APPROXIMATION})
        typer.echo(describe_change(change))
        typer.echo(f"Written: {new.paths.forgetting}")
    typer.echo(f"Run directory: {target}")
