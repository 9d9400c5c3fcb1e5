"""``fedlora deploy``, the commands of a federation over several machines.

Modules beside this one hold them: who takes part (``deploy_sites``), what runs at an end
(``deploy_processes``), and what is looked at before, after and on trial (``deploy_checks``).
"""

from __future__ import annotations

from pathlib import Path

import click
import typer
from typer.core import TyperGroup

from fedlora_app.cli.root import app

FROM_NOTHING = "From nothing to a finished run"
LATER = "Later changes, at the coordinator"
LOOKING = "Looking back, and trying it out on one machine"
ORDER = (
    *("init", "request", "approve", "join", "doctor", "start", "status", "run", "stop"),
    *("package", "add", "rotate", "revoke", "renew"),
    *("audit", "rehearse"),
)
DEPLOYMENT = Path("deployment")


class _InOrderOfNeed(TyperGroup):
    """Lists commands in the order in which users come to need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names; one without a place is an error."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


deploy = typer.Typer(
    name="deploy",
    cls=_InOrderOfNeed,
    no_args_is_help=True,
    help="Run the federation over several machines: keys, packages, policies, evidence.",
)
app.add_typer(deploy)
