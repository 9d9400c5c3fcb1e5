"""The command that attacks a run with what its server has kept."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedlora_app.cli.root import AsJson, RunName, app, choose_run, quiet_transformers
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import show_progress


@app.command()
def attack(
    run: RunName,
    server_round: Annotated[
        list[int] | None,
        typer.Option("--round", min=1, help="Of which the updates are attacked; all by default."),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=4, help="Records on each side of a set, at most.")
    ] = 100,
    texts: Annotated[
        int, typer.Option(min=1, help="Texts that are drawn from each client's model.")
    ] = 64,
    as_json: AsJson = False,
) -> None:
    """Try what a curious server can tell from the updates that a run has kept.

    RUN was trained with federated.keep_uploads; the clients' data must be here, since they judge
    the guesses. Writes attack.json and the report. Example: fedlora attack latest
    """
    from fedlora_app.attacks.meter import Effort, attack_run
    from fedlora_app.attacks.observed import require_same_data, require_uploads
    from fedlora_app.attacks.text import describe_attack
    from fedlora_app.evaluation.choices import open_round
    from fedlora_app.report.page import write_report
    from fedlora_app.runs.reading import load_run

    saved = load_run(choose_run(run))
    require_uploads(saved)
    root = find_project_root(str(saved.paths.config))
    opened = open_round(saved, root)
    require_same_data(saved, opened.files)
    quiet_transformers()
    with show_progress(quiet=as_json) as show:
        found = attack_run(opened, show, Effort(tuple(server_round or ()), sample, texts))
    page = write_report(saved.path)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    typer.echo(describe_attack(found))
    typer.echo(f"Written: {saved.paths.attack}\nReport: {page}")
