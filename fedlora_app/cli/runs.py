"""Commands on run directories: list, evaluate and compare them, and write their pages."""

from __future__ import annotations

import json
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora_app.cli.root import (
    AsJson,
    Combine,
    RunName,
    ServerRound,
    app,
    choose_run,
    quiet_transformers,
)
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import shell, show_progress
from fedlora_app.runs.paths import RunDirectoryError

if TYPE_CHECKING:
    from fedlora_app.config.combination import Combination
    from fedlora_app.runs.partial import PartialRun


@app.command()
def runs(
    folder: Annotated[
        Path | None, typer.Argument(help="Where the runs are; the project's results by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs with their state, mode, rounds and last figures, the newest first.

    Figures are means over all clients' answers. Example: fedlora runs
    """
    from fedlora_app.runs.partial import read_what_is_left
    from fedlora_app.runs.paths import list_runs

    place = folder or find_project_root() / "results"
    if folder is not None and not folder.is_dir():
        raise RunDirectoryError(f"{folder} is not a folder.")
    found = [read_what_is_left(path) for path in list_runs(place)]
    rows = [
        {
            "run": run.path.relative_to(place).as_posix(),
            "state": run.state,
            "mode": run.mode,
            "round": run.last_round,
            "rounds": run.num_rounds,
            "figures": _read_figures(run),
        }
        for run in found
    ]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        done = "no round" if row["round"] is None else f"round {row['round']}/{row['rounds']}"
        typer.echo(f"{row['run']}: {row['mode']}, {row['state']}, {done}")
        typer.echo(f"    {row['figures'] or 'not evaluated'}")
    if not rows:
        typer.echo(f"No runs in {place}. Start one with flwr run.")


@app.command()
def evaluate(
    run: RunName,
    server_round: ServerRound = None,
    combine: Combine = None,
    membership: Annotated[
        bool, typer.Option(help="Also infer which records the global adapter was trained on.")
    ] = False,
    full: Annotated[
        bool | None,
        typer.Option("--full/--core", help="All of the protocol, or its core; as configured."),
    ] = None,
    semantic: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A sentence-embedding model, a hub id or a folder in the project, that compares "
            "answers in meaning too.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the evaluation protocol on a round of a run and write evaluation.json.

    With another --combine than the run's own it is evaluation_COMBINE.json, of another round than
    the final one evaluation_round_NNN.json; the report stays as it is then.
    A stopped evaluation resumes where it was. Example: fedlora evaluate latest
    """
    from fedlora_app.evaluation.choices import open_round
    from fedlora_app.evaluation.protocol import evaluate_round
    from fedlora_app.evaluation.text import describe_evaluation
    from fedlora_app.report.page import write_report
    from fedlora_app.runs.reading import load_run

    run_dir = choose_run(run)
    root = find_project_root(str(run_dir / "config.json"))  # the checkout that it lies in
    saved = open_round(load_run(run_dir), root, server_round, combine)
    quiet_transformers()
    with show_progress(quiet=as_json) as show:
        evaluation = evaluate_round(
            saved, show, full=full, membership=membership, semantic_model=semantic
        )
    path = saved.evaluation_path
    page = write_report(run_dir) if path == saved.run.paths.evaluation else None
    if as_json:
        typer.echo(json.dumps(evaluation, ensure_ascii=False))
    else:
        typer.echo(describe_evaluation(evaluation))
        if membership and not evaluation["membership"]:
            typer.echo("Nothing is shared in this mode, so no membership was inferred.")
        typer.echo(f"Written: {path}")
        if page is not None:
            typer.echo(f"Report: {page}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Evaluated runs.")],
    as_json: AsJson = False,
) -> None:
    """Compare evaluated runs with the first one: differences, intervals, p-values.

    RUN:COMBINE is the run's evaluation with another --combine than its own.
    Example: fedlora compare study-demo/dual-seed42 study-demo/fedavg-seed42
    """
    from fedlora_app.evaluation.comparison import compare_evaluations
    from fedlora_app.evaluation.comparison_text import describe_comparison
    from fedlora_app.runs.reading import load_run

    evaluations = {}
    for name in runs:
        asked, combination, option = _split_combination(name)
        run = load_run(choose_run(asked))
        label = run.name + (f":{combination}" if combination else "")
        if label in evaluations:
            raise RunDirectoryError(f"{label} is given twice; name different runs.")
        evaluation = run.find_evaluation(run.final_round, combination)
        if evaluation is None:
            how = option and f" with{option}"
            raise RunDirectoryError(
                f"Round {run.final_round}, the final one of {run.path}, is not evaluated yet{how}. "
                f"Run: fedlora evaluate {shell(asked)}{option}"
            )
        evaluations[label] = evaluation
    if len(evaluations) < 2:
        raise RunDirectoryError("One run has nothing to be compared with; name two or more.")
    comparison = compare_evaluations(evaluations)
    typer.echo(
        json.dumps(comparison, ensure_ascii=False) if as_json else describe_comparison(comparison)
    )


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, evaluated or not.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Default: report.html in the run, or comparison.html beside several."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep one run's page current until the run ends.")
    ] = False,
) -> None:
    """Write one self-contained page per run, and one that puts several runs side by side.

    Damaged and half-finished runs are shown as far as they go. Example: fedlora report latest
    """
    from fedlora_app.report.page import COMPARISON_FILE, write_comparison, write_report

    paths = list(dict.fromkeys(map(choose_run, runs)))
    if watch:
        from fedlora_app.report.watching import watch_report

        if len(paths) > 1:
            raise typer.BadParameter("--watch follows one run; name one.")
        typer.echo(f"Report: {watch_report(paths[0], output, typer.echo)}")
        return
    if len(paths) == 1:
        typer.echo(f"Report: {write_report(paths[0], output)}")
        return
    with show_progress("runs") as show:
        for number, path in enumerate(paths, 1):
            write_report(path)
            show(path.name, number, len(paths))
    page = output or Path(commonpath([path.parent for path in paths])) / COMPARISON_FILE
    typer.echo(f"Report: {write_comparison(paths, page)}")


def _split_combination(name: str) -> tuple[str, Combination | None, str]:
    """Return the run of RUN or RUN:COMBINE, the combination, and evaluate's option for it."""
    from fedlora_app.config.combination import COMBINATIONS

    run, _, combination = name.rpartition(":")
    if combination not in COMBINATIONS:
        return name, None, ""
    return run, combination, f" --combine {combination}"


def _read_figures(run: PartialRun) -> str:
    """Return a run's last figures on one line; what is damaged in one hides no other run."""
    from fedlora_app.evaluation.reported import describe_headline

    for evaluation in (run.evaluation, None):
        try:
            return describe_headline(run.result_history, evaluation)
        except (AttributeError, LookupError, TypeError, ValueError):
            continue  # written by another version, or damaged
    return "its figures cannot be read"
