"""``fedlora``, the command: a module a noun.

Exit status 0 only if it did what was asked; 2 for what the user can fix.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
import typer

from fedlora_app.cli import attacking, data, experiment, forgetting, training  # noqa: F401

# isort: split
from fedlora_app.cli import (  # noqa: F401, after them in what --help lists
    deploy_checks,
    deploy_processes,
    deploy_sites,
    model,
    runs,
)
from fedlora_app.cli.root import app
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import keep_files_private
from fedlora_app.foundation.project import describe_other_checkout

INTERRUPTED = 130  # what Typer makes of Ctrl-C
CONTINUED = {"evaluate", "study"}  # commands that resume where they stopped


def main() -> None:
    """Run the command; what the user can fix ends in one message and status 2.

    SIGTERM, which ``kill`` and batch systems send, does what Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_files_private()
    if note := describe_other_checkout(Path.cwd()):
        typer.echo(note, err=True)
    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:
            kept = " What is done is kept; the same command resumes here."
            typer.echo(f"Stopped.{kept * bool(CONTINUED & set(sys.argv))}", err=True)
        sys.exit(status)
    except click.ClickException as error:  # a mistyped command or option
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"Error: {error.filename or 'The disk'}: {error.strerror}.", err=True)
        sys.exit(2)
