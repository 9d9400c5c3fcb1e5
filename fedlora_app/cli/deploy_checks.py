"""Commands that look at a deployment: before it runs, at what it did, and at one on trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedlora_app.cli.deploy import FROM_NOTHING, LOOKING, deploy
from fedlora_app.cli.root import AsJson


@deploy.command(rich_help_panel=FROM_NOTHING)
def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A coordinator's folder or a site's.")
    ] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Look at everything that a deployment needs at this end, and say what to do.

    Example: fedlora deploy doctor ayr
    """
    from fedlora_app.deployment.doctor import examine
    from fedlora_app.deployment.finding import FAULT

    findings = examine(folder)
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], ensure_ascii=False))
    else:
        typer.echo("\n".join(map(str, findings)))
    if any(finding.level == FAULT for finding in findings):
        raise typer.Exit(2)


@deploy.command(rich_help_panel=LOOKING)
def audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An evidence.jsonl.")],
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="The other end's, to compare with.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an evidence log and print a page per round; status 2 if it is not as it was written.

    Example: fedlora deploy audit deployment/evidence.jsonl --against ayr/evidence.jsonl
    """
    from fedlora_app.deployment.audit import compare_logs, read_log
    from fedlora_app.deployment.audit_pages import describe_comparison, describe_log, dump_log

    log = read_log(file)
    other = against and read_log(against)
    is_sound = log.fault is None
    comparison = None
    if other is not None:
        is_sound &= other.fault is None
        comparison = compare_logs(log, other)
        is_sound &= not comparison.contradictions
    if as_json:
        typer.echo(json.dumps(dump_log(log, comparison), indent=2))
    else:
        typer.echo(describe_log(log))
        if other is not None and other.fault is not None:
            typer.echo(f"\n{other.path}, BROKEN at line {other.fault.line}: {other.fault.what}.")
        if comparison is not None:
            typer.echo(f"\n{describe_comparison(comparison)}")
    if not is_sound:
        raise typer.Exit(2)


@deploy.command(rich_help_panel=LOOKING)
def rehearse(
    output: Annotated[Path, typer.Option(help="The folder to make.")] = Path("rehearsal"),
) -> None:
    """Hold one round of a deployment on this machine, with what goes wrong in one.

    A coordinator and three sites as separate processes with separate folders, keys and data; a
    site is killed, another paused, and strangers try to come in. It takes some four minutes.
    Example: fedlora deploy rehearse
    """
    from fedlora_app.demo.rehearsal import Rehearsal, RehearsalError

    if output.exists():
        raise RehearsalError(f"{output} exists already. Name another folder with --output.")
    if faults := Rehearsal(output, typer.echo).hold():
        typer.echo("Not as it has to be:\n" + "\n".join(f"  {fault}" for fault in faults), err=True)
        raise typer.Exit(2)
    typer.echo(f"All as it has to be. {output} can be removed.")
