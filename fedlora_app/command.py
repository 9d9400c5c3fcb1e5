"""``fedlora``, the command for everything but training.

Exit status 0 only if it did what was asked; 2 for what the user can mend.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedlora_app.config import ConfigError
from fedlora_app.data import DataError
from fedlora_app.project import ProjectNotFoundError, find_project_root
from fedlora_app.run_directory import RunDirectoryError

INTERVAL_SECONDS = 5.0
INTERRUPTED = 130  # what Typer makes of Ctrl-C

app = typer.Typer(
    name="fedlora",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Check, evaluate and compare what flwr run trains.",
)

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help='A run directory, its name below results, or "latest".')
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML.")],
    overrides: Annotated[str, typer.Option(help='As in run-config: "training.replay=0.5".')] = "",
    as_json: AsJson = False,
) -> None:
    """Check a configuration, its data and its question sets, without any model.

    Example: fedlora check conf/demo.yaml
    """
    from fedlora_app.client_data import load_all_files
    from fedlora_app.config_file import load_config
    from fedlora_app.evaluation.linter import describe_findings, lint

    root = find_project_root(str(config.resolve()))
    path = config if config.exists() else root / config
    experiment = load_config(path, overrides)
    findings = lint(experiment, load_all_files(experiment, root), root)
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], ensure_ascii=False))
    else:
        typer.echo(f"{path}: the configuration and {len(experiment.client_ids)} clients' data.")
        typer.echo(describe_findings(findings))
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(2)


@app.command()
def evaluate(
    run: RunName,
    server_round: Annotated[
        int | None, typer.Option("--round", min=0, help="A complete round; the last by default.")
    ] = None,
    membership: Annotated[
        bool, typer.Option(help="Also infer which records the global adapter was trained on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole evaluation protocol on a round of a run and write evaluation.json.

    A stopped evaluation goes on where it was. Example: fedlora evaluate latest
    """
    from fedlora_app.evaluation.answering import open_round
    from fedlora_app.evaluation.protocol import evaluate_round
    from fedlora_app.evaluation.text import describe_evaluation
    from fedlora_app.saved_run import find_run, load_run

    run_dir = find_run(run, find_project_root())
    root = find_project_root(str(run_dir / "config.json"))  # the checkout that it lies in
    saved = open_round(load_run(run_dir), root, server_round)
    with _progress(quiet=as_json) as report:
        evaluation = evaluate_round(saved, report, membership=membership)
    path = saved.run.evaluation_path(saved.server_round)
    if as_json:
        typer.echo(json.dumps(evaluation, ensure_ascii=False))
    else:
        typer.echo(describe_evaluation(evaluation))
        if membership and not evaluation["membership"]:
            typer.echo("Nothing is shared in this mode, so no membership was inferred.")
        typer.echo(f"Written: {path}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Evaluated runs.")],
    as_json: AsJson = False,
) -> None:
    """Compare evaluated runs with the first one: differences, intervals, p-values.

    Example: fedlora compare study-demo/dual-seed42 study-demo/fedavg-seed42
    """
    from fedlora_app.evaluation.comparison import compare_evaluations
    from fedlora_app.evaluation.comparison_text import describe_comparison
    from fedlora_app.saved_run import find_run, load_run

    root = find_project_root()
    evaluations = {}
    for name in runs:
        run = load_run(find_run(name, root))
        if run.name in evaluations:
            raise RunDirectoryError(f"{run.name} is given twice; name different runs.")
        if run.evaluation is None:
            raise RunDirectoryError(
                f"{run.path} is not evaluated yet. Run: fedlora evaluate {name}"
            )
        evaluations[run.name] = run.evaluation
    if len(evaluations) < 2:
        raise RunDirectoryError("One run has nothing to be compared with; name two or more.")
    comparison = compare_evaluations(evaluations)
    typer.echo(
        json.dumps(comparison, ensure_ascii=False) if as_json else describe_comparison(comparison)
    )


@app.command()
def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML.")],
    output_dir: Annotated[
        Path, typer.Option(help="Where its folder goes, relative to the project.")
    ] = Path("results"),
) -> None:
    """Run and evaluate every variant and seed of a study, and write one summary table.

    What is finished is not repeated. Example: fedlora study conf/study-demo.yaml
    """
    from fedlora_app.study import load_study, run_study

    root = find_project_root(str(config.resolve()))
    path = config if config.exists() else root / config
    with _progress() as report:
        text = run_study(load_study(path), root, (root / output_dir).resolve(), report)
    typer.echo(text)


def main() -> None:
    """Run the command; what the user can mend ends in one message and status 2."""
    import transformers

    from fedlora_app.adapters import AdapterError
    from fedlora_app.model import ModelError

    transformers.utils.logging.disable_progress_bar()

    mendable = (
        ConfigError,
        DataError,
        ModelError,
        AdapterError,
        RunDirectoryError,
        ProjectNotFoundError,
    )
    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:
            typer.echo("Stopped; the same command goes on from here.", err=True)
        sys.exit(status)
    except click.ClickException as error:  # a mistyped command or option
        error.show()
        sys.exit(error.exit_code)
    except mendable as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"Error: {error.filename or 'The disk'}: {error.strerror}.", err=True)
        sys.exit(2)


@contextmanager
def _progress(*, quiet: bool = False) -> Iterator:
    """Yield a callback that shows a bar on a terminal and a line now and then elsewhere."""
    if sys.stderr.isatty() and not quiet:
        from rich.console import Console

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("loading", total=None)
            yield lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            )
        return
    last = started = time.monotonic()
    first: tuple[int, int] = (0, 0)  # what was done, of how many, when the clock was started

    def report(what: str, done: int, total: int) -> None:
        nonlocal last, started, first
        now = time.monotonic()
        if first[1] != total:
            first, started = (done, total), now
        if quiet or now - last < INTERVAL_SECONDS:
            return
        last = now
        left = (now - started) / max(done - first[0], 1) * (total - done)
        typer.echo(f"{what}: {done}/{total} prompts, about {left:.0f} s left", err=True)

    yield report


if __name__ == "__main__":
    main()
