"""The commands of a federation over several machines."""

from __future__ import annotations

import typer

from fedlora_app.cli.root import app

deploy = typer.Typer(
    name="deploy",
    no_args_is_help=True,
    help="Run the federation over several machines: keys, packages, policies, evidence.",
)
app.add_typer(deploy)
