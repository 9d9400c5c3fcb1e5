"""Commands that make a deployment and say who takes part: keys, requests and packages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedlora_app.cli.deploy import DEPLOYMENT, FROM_NOTHING, LATER, deploy
from fedlora_app.cli.root import find_config
from fedlora_app.foundation.terminal import shell

if TYPE_CHECKING:
    from fedlora_app.deployment.coordinator import Coordinator
    from fedlora_app.deployment.keys import Request

Folder = Annotated[Path, typer.Option("--deployment", help="The coordinator's folder.")]
SiteId = Annotated[str, typer.Argument(metavar="ID", help="Of a client of the experiment.")]
RequestFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The request.json that the site has sent.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask: the fingerprint was compared.")]


@deploy.command(rich_help_panel=FROM_NOTHING)
def init(
    host: Annotated[str, typer.Option(help="Name or IP address by which sites reach this one.")],
    config: Annotated[Path, typer.Option(help="The experiment's YAML.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the SuperLink.")] = 8000,
    output: Annotated[Path, typer.Option(help="The folder to make.")] = DEPLOYMENT,
) -> None:
    """Make a deployment at the coordinator: an authority, a certificate and who is invited.

    Example: fedlora deploy init --host fed.example.org --config conf/demo.yaml
    """
    from fedlora_app.deployment.coordinator import create
    from fedlora_app.deployment.keys import fingerprint_certificate

    path, root = find_config(config)
    coordinator = create(output, host, port, path, root)
    settings = coordinator.settings
    fingerprint = fingerprint_certificate(coordinator.folder.root_certificate.read_bytes())
    typer.echo(f"{output}: a deployment of {settings.config} at {settings.address}.")
    typer.echo(f"Invited: {', '.join(settings.sites)}.")
    typer.echo(
        f"The fingerprint of its root certificate, which sites compare:\n{_fold(fingerprint)}"
    )
    typer.echo(
        f"{coordinator.folder.root_key} signs the SuperLink's certificate and is needed for "
        "nothing else until that one is renewed: keep it on a medium of its own."
    )


@deploy.command(rich_help_panel=FROM_NOTHING)
def approve(request: RequestFile, yes: Yes = False, deployment: Folder = DEPLOYMENT) -> None:
    """Let a site in by the key of its request, and write its package.

    Example: fedlora deploy approve ayr/request.json
    """
    from fedlora_app.deployment import membership

    coordinator, asked = _open_request(request, deployment)
    membership.check_newcomer(coordinator, asked)
    _confirm(asked, yes)
    typer.echo(membership.approve(coordinator, asked))
    _describe_package(asked.client, coordinator.folder.package(asked.client))


@deploy.command(rich_help_panel=LATER)
def rotate(request: RequestFile, yes: Yes = False, deployment: Folder = DEPLOYMENT) -> None:
    """Let a site in by a new key, and no longer by the one that it had.

    Example: fedlora deploy rotate ayr/request.json
    """
    from fedlora_app.deployment import membership

    coordinator, asked = _open_request(request, deployment)
    membership.check_rotation(coordinator, asked)
    _confirm(asked, yes)
    typer.echo(membership.rotate(coordinator, asked))
    _describe_package(asked.client, coordinator.folder.package(asked.client))


@deploy.command(rich_help_panel=LATER)
def revoke(site: SiteId, deployment: Folder = DEPLOYMENT) -> None:
    """Let a site in no longer. Its SuperNode ends by itself, and its key is never let in again.

    Example: fedlora deploy revoke ayr
    """
    from fedlora_app.deployment import membership
    from fedlora_app.deployment.coordinator import load_coordinator

    coordinator = load_coordinator(deployment)
    typer.echo(membership.revoke(coordinator, site))
    typer.echo(f"{site} is revoked. What it had is in {coordinator.folder.former}.")


@deploy.command(rich_help_panel=LATER)
def add(site: SiteId, deployment: Folder = DEPLOYMENT) -> None:
    """Invite a client that the experiment names by now, or one that was revoked.

    Example: fedlora deploy add cumnock
    """
    from fedlora_app.deployment import membership
    from fedlora_app.deployment.coordinator import load_coordinator

    coordinator = load_coordinator(deployment)
    membership.add(coordinator, site)
    typer.echo(f"{site} is invited. When its request has come: fedlora deploy approve FILE")
    if others := [i for i in coordinator.approved if i != site]:
        typer.echo(
            f"The packages of {', '.join(others)} stay as they were. A policy that names the "
            f"participants refuses {site} until its site adds it there."
        )


@deploy.command(rich_help_panel=LATER)
def package(site: SiteId, deployment: Folder = DEPLOYMENT) -> None:
    """Write an approved site's package again, as code, base and experiment are now.

    Example: fedlora deploy package ayr
    """
    from fedlora_app.deployment.coordinator import load_coordinator
    from fedlora_app.deployment.membership import write_package

    path = write_package(load_coordinator(deployment), site)
    _describe_package(site, path)


@deploy.command(rich_help_panel=LATER)
def renew(deployment: Folder = DEPLOYMENT) -> None:
    """Give the SuperLink a new certificate by the same authority; sites notice nothing.

    Example: fedlora deploy renew
    """
    from fedlora_app.deployment.coordinator import load_coordinator, renew_certificate

    coordinator = load_coordinator(deployment)
    renew_certificate(coordinator)
    typer.echo(f"{coordinator.folder.certificate} is new.")
    if coordinator.is_running:
        typer.echo("The SuperLink has it from its next start on.")


@deploy.command(rich_help_panel=FROM_NOTHING)
def request(
    site: SiteId,
    output: Annotated[
        Path | None, typer.Option(help="The site's folder; by default its id.")
    ] = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Another key, in the place of the one it has.")
    ] = False,
) -> None:
    """Make a site's key pair at the site, and the request to send to the coordinator.

    Example: fedlora deploy request ayr
    """
    from fedlora_app.deployment.layout import SiteFolder
    from fedlora_app.deployment.site import make_request

    folder = output or Path(site)
    made = make_request(site, folder, new_key)
    files = SiteFolder(folder)
    typer.echo(f"Send to the coordinator: {files.request}")
    typer.echo(
        f"The fingerprint of the key, which the coordinator compares:\n{_fold(made.fingerprint)}"
    )
    typer.echo(f"{files.next_key if new_key else files.key} never leaves this machine.")


@deploy.command(rich_help_panel=FROM_NOTHING)
def join(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="From the coordinator.")],
    site: Annotated[Path | None, typer.Option(help="The site's folder; by default its id.")] = None,
    yes: Yes = False,
) -> None:
    """Unpack the coordinator's package at the site that it is for.

    Example: fedlora deploy join ayr.zip
    """
    from fedlora_app.deployment.package import fingerprint_package
    from fedlora_app.deployment.policy import list_open_rules
    from fedlora_app.deployment.site import join as unpack
    from fedlora_app.deployment.site import open_package

    opened, folder = open_package(package, site)
    facts = opened.facts
    typer.echo(f"{facts.experiment} at {facts.address}, with {', '.join(facts.participants)}.")
    typer.echo(f"The fingerprint of its root certificate:\n{_fold(facts.root)}")
    typer.echo(f"The fingerprint of the package:\n{_fold(fingerprint_package(package))}")
    _ask("Does the coordinator name the same of both, by telephone or in person?", yes)
    done = unpack(opened, folder)
    for path in done.kept:
        typer.echo(f"{path} stays as it is; the new draft is in {folder.package}.")
    for path in done.written:
        typer.echo(f"{path} is a draft: complete it.")
    if folder.policy in done.written and (open_rules := list_open_rules(folder.policy)):
        typer.echo(f"It permits everything in: {', '.join(open_rules)}.")
    typer.echo(f"Then: fedlora deploy doctor {shell(folder.folder)}")


def _open_request(request: Path, deployment: Path) -> tuple[Coordinator, Request]:
    from fedlora_app.deployment.coordinator import load_coordinator
    from fedlora_app.deployment.membership import read_request

    return load_coordinator(deployment), read_request(request)


def _describe_package(site: str, path: Path) -> None:
    from fedlora_app.deployment.package import fingerprint_package

    typer.echo(f"Send to {site}: {path}")
    typer.echo(f"Its fingerprint, which the site compares:\n{_fold(fingerprint_package(path))}")


def _confirm(asked: Request, yes: bool) -> None:
    typer.echo(f"{asked.client}: the fingerprint of its key:\n{_fold(asked.fingerprint)}")
    _ask("Does the site name the same, by telephone or in person?", yes)


def _ask(question: str, is_known: bool) -> None:
    """Go on with a yes, be it given beforehand or here, and with nothing else."""
    try:
        if is_known or typer.confirm(question):
            return
    except click.Abort:  # nobody is there to answer
        typer.echo("", err=True)
    typer.echo("Nothing was done. With --yes nobody is asked.", err=True)
    raise typer.Exit(2)


def _fold(fingerprint: str) -> str:
    """Return a fingerprint in two indented lines."""
    groups = fingerprint.split()
    half = len(groups) // 2
    return f"  {' '.join(groups[:half])}\n  {' '.join(groups[half:])}"
