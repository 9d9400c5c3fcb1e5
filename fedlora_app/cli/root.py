"""The command itself, and what several of its commands share.

Modules beside this one hold the commands; what a command needs it imports when it is called, so
that ``fedlora --help`` is there at once.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import find_project_root

if TYPE_CHECKING:
    from fedlora_app.config.combination import Combination
    from fedlora_app.evaluation.saved_model import SavedModel

app = typer.Typer(
    name="fedlora",
    suggest_commands=False,  # click does, and would so twice
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML.")]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help='A run directory, its name below results, or "latest".')
]
ServerRound = Annotated[
    int | None, typer.Option("--round", min=0, help="A complete round; the final one by default.")
]
Scale = Annotated[float, typer.Option(help="Of the local adapter (lambda).")]
Combine = Annotated[
    Literal["scale", "gate", "instance", "search", "mixer"] | None,
    typer.Option(help="How both adapters answer together; as the run is configured by default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fedlora-app {version('fedlora-app')}")
        raise typer.Exit


@app.callback()
def _fedlora(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Of fedlora-app."),
    ] = False,
) -> None:
    """Make, check, plan and train an experiment; evaluate, compare, ask, serve and export it."""


def find_config(config: Path) -> tuple[Path, Path]:
    """Return a YAML's path, which may be relative to the project, and the project's root."""
    try:
        resolved = config.resolve()
    except (OSError, RuntimeError) as error:  # links that lead to one another
        raise UserError(f"{config} cannot be read: {error}. Name the file itself.") from None
    root = find_project_root(str(resolved))
    in_project = root / config
    return in_project if in_project.exists() and not config.exists() else config, root


def choose_run(name: str) -> Path:
    """Return the run directory that a name means; of "latest", say on stderr which run that is."""
    from fedlora_app.runs.paths import LATEST, find_run
    from fedlora_app.runs.reading import describe_mode

    run_dir = find_run(name, find_project_root())
    if Path(name).name == LATEST:
        typer.echo(f"latest is {run_dir.name}, {describe_mode(run_dir)}", err=True)
    return run_dir


def open_model(
    run: str, server_round: int | None, combine: Combination | None = None
) -> SavedModel:
    """Return a run's adapters, to be asked or exported; nothing is loaded yet."""
    from fedlora_app.evaluation.saved_model import SavedModel
    from fedlora_app.runs.reading import load_run

    quiet_transformers()
    run_dir = choose_run(run)
    found = load_run(run_dir)
    chosen = found.final_round if server_round is None else server_round
    root = find_project_root(str(run_dir / "config.json"))
    return SavedModel(found, chosen, root, combine=combine)


def quiet_transformers() -> None:
    """Leave out its own progress bars; ours say what is going on."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
