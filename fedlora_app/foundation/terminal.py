"""What a terminal shows: tables as text, and how far a command is.

Progress is a bar with the time left on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedlora_app.foundation.progress import Pace

WIDTH = 100
INTERVAL_SECONDS = 5.0

Report = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


def shell(argument: object) -> str:
    """Return an argument as a command line that is shown must have it.

    In double quotes where single ones are part of it and nothing needs more.
    """
    text = str(argument)
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!\n') else shlex.quote(text)


@contextmanager
def show_progress(unit: str = "prompts", *, quiet: bool = False) -> Iterator[Report]:
    """Yield a callback that shows a bar on a terminal and a line now and then elsewhere."""
    if sys.stderr.isatty() and not quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("loading", total=None)
            yield lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            )
        return
    pace, current = Pace(), 0

    def report(what: str, done: int, total: int) -> None:
        nonlocal pace, current
        if total != current:  # another stretch of work, at another speed
            pace, current = Pace(INTERVAL_SECONDS, done), total
        left = pace.time_left(done, total)
        if left is not None and not quiet:
            print(f"{what}: {done}/{total} {unit}, about {left} left", file=sys.stderr, flush=True)

    yield report


def render_table(table: Table) -> str:
    """Return a table as text, 100 columns wide and without colour."""
    table.title_justify = "left"
    # Names of runs are not markup, and in a notebook the text is wanted, not a display.
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        color_system=None,
        markup=False,
        emoji=False,
        force_jupyter=False,
    )
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")
