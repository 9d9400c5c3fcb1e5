"""``fedlora``, the command for everything but training.

Exit status 0 only if it did what was asked; 2 for what the user can fix.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click
import typer
from rich.console import Console

from fedlora_app.foundation.environment import prepare_environment
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import keep_files_private
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import show_progress
from fedlora_app.runs.paths import RunDirectoryError

if TYPE_CHECKING:
    from fedlora_app.evaluation.saved_model import SavedModel
    from fedlora_app.runs.reading import PartialRun
    from fedlora_app.serving.conversation import Conversation

LOOPBACK = "127.0.0.1"
INTERRUPTED = 130  # what Typer makes of Ctrl-C
CONTINUED = {"evaluate", "study"}  # commands that resume where they stopped

app = typer.Typer(
    name="fedlora",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help='A run directory, its name below results, or "latest".')
]
ServerRound = Annotated[
    int | None, typer.Option("--round", min=0, help="A complete round; the last by default.")
]
Scale = Annotated[float, typer.Option(help="Of the local adapter (lambda).")]
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
    """Plan, look at, evaluate, compare, ask, serve and export what flwr run trains."""


@app.command()
def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML.")],
    overrides: Annotated[str, typer.Option(help='As in run-config: "training.replay=0.5".')] = "",
    as_json: AsJson = False,
) -> None:
    """Check a configuration, its data and its question sets, without the model's weights.

    The model's tokenizer is used where it is on this machine. Example: fedlora check conf/demo.yaml
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
    from fedlora_app.config.loading import load_config
    from fedlora_app.data.client_files import load_all_files
    from fedlora_app.data.linter import describe_findings, lint
    from fedlora_app.evaluation.gold import find_unreachable_answers
    from fedlora_app.model.base import load_tokenizer
    from fedlora_app.model.pretrained import ModelError
    from fedlora_app.training.decay import describe_decay
    from fedlora_app.training.selection import describe_long_phases

    root = find_project_root(str(config.resolve()))
    path = config if config.exists() else root / config
    experiment = load_config(path, overrides)
    files = load_all_files(experiment, root)
    findings = lint(experiment, files, root)
    unchecked = ""
    try:
        tokenizer = load_tokenizer(experiment.model, root)
        findings += find_unreachable_answers(experiment, files, tokenizer, root)
    except ModelError as error:
        unchecked = (
            "Not checked, because the model's tokenizer cannot be used here: whether answers are "
            f"longer than evaluation.max_new_tokens, or changed by the chat template. {error}"
        )
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], ensure_ascii=False))
    else:
        typer.echo(f"{path}: the configuration and {len(experiment.client_ids)} clients' data.")
        counts = {c: (len(f.universal.records), len(f.local.records)) for c, f in files.items()}
        for line in (
            *describe_decay(experiment, counts),
            *describe_long_phases(experiment, counts),
        ):
            typer.echo(line)
        typer.echo(describe_findings(findings))
    if unchecked:
        typer.echo(unchecked, err=True)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(2)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML.")],
    gpu_memory: Annotated[
        str, typer.Option(help="24GB or 7.5GiB. Default: this machine's GPU, or 24GB.")
    ] = "",
    overrides: Annotated[str, typer.Option(help='As in run-config: "training.batch_size=2".')] = "",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Load the base and measure steps and answers here."),
    ] = False,
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="With --measure: random weights, from configuration and tokenizer."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict a run's memory, bytes per round and time, and say what would make it fit.

    No weights are loaded unless it is to measure. Example: fedlora plan conf/demo.yaml --measure
    """
    if measure and gpu_memory:
        raise typer.BadParameter("--measure is for this machine; leave out --gpu-memory.")
    if random and not measure:
        raise typer.BadParameter("--random needs --measure.")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
    if measure:
        prepare_environment()  # as a client has it, before torch is imported
    from fedlora_app.config.loading import load_config
    from fedlora_app.planning.plan import build_plan
    from fedlora_app.planning.text import describe_plan

    root = find_project_root(str(config.resolve()))
    path = config if config.exists() else root / config
    experiment = load_config(path, overrides)
    planned = build_plan(experiment, root, gpu_memory)
    if not measure:
        typer.echo(
            json.dumps(planned.dump(), ensure_ascii=False) if as_json else describe_plan(planned)
        )
        return
    from fedlora_app.planning.measured_text import describe_measurement
    from fedlora_app.planning.measurement import measure_run

    _quiet_transformers()
    with show_progress("parts", quiet=as_json) as show:
        found = measure_run(experiment, root, planned, is_random=random, report=show)
    if as_json:
        typer.echo(json.dumps({"plan": planned.dump(), "measured": found.dump()}))
    else:
        typer.echo(describe_measurement(experiment, planned, found))


@app.command()
def runs(
    folder: Annotated[
        Path | None, typer.Argument(help="Where the runs are; the project's results by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs with their state, mode, rounds and last figures, the newest first.

    Figures are means over clients of what they answer with. Example: fedlora runs
    """
    from fedlora_app.runs.paths import list_runs
    from fedlora_app.runs.reading import read_what_is_left

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

    A stopped evaluation resumes where it was. Example: fedlora evaluate latest
    """
    from fedlora_app.evaluation.choices import open_round
    from fedlora_app.evaluation.protocol import evaluate_round
    from fedlora_app.evaluation.text import describe_evaluation
    from fedlora_app.report.page import write_report
    from fedlora_app.runs.paths import find_run
    from fedlora_app.runs.reading import load_run

    run_dir = find_run(run, find_project_root())
    root = find_project_root(str(run_dir / "config.json"))  # the checkout that it lies in
    saved = open_round(load_run(run_dir), root, server_round)
    _quiet_transformers()
    with show_progress(quiet=as_json) as show:
        evaluation = evaluate_round(
            saved, show, full=full, membership=membership, semantic_model=semantic
        )
    path = saved.run.evaluation_path(saved.server_round)
    page = write_report(run_dir) if saved.server_round == saved.run.last_round else None
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

    Example: fedlora compare study-demo/dual-seed42 study-demo/fedavg-seed42
    """
    from fedlora_app.evaluation.comparison import compare_evaluations
    from fedlora_app.evaluation.comparison_text import describe_comparison
    from fedlora_app.runs.paths import find_run
    from fedlora_app.runs.reading import load_run

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
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, evaluated or not.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Default: report.html in the run, or comparison.html beside several."),
    ] = None,
) -> None:
    """Write one self-contained page per run, and one that puts several runs side by side.

    Damaged and half-finished runs are shown as far as they go. Example: fedlora report latest
    """
    from fedlora_app.report.page import COMPARISON_FILE, write_comparison, write_report
    from fedlora_app.runs.paths import find_run

    root = find_project_root()
    paths = list(dict.fromkeys(find_run(name, root) for name in runs))
    if len(paths) == 1:
        typer.echo(f"Report: {write_report(paths[0], output)}")
        return
    with show_progress("runs") as show:
        for number, path in enumerate(paths, 1):
            write_report(path)
            show(path.name, number, len(paths))
    page = output or Path(commonpath([path.parent for path in paths])) / COMPARISON_FILE
    typer.echo(f"Report: {write_comparison(paths, page)}")


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
    _quiet_transformers()
    with show_progress() as show:
        text = run_study(load_study(path), root, (root / output_dir).resolve(), show)
    typer.echo(text)


@app.command()
def ask(
    run: RunName,
    question: Annotated[str | None, typer.Argument(help="Leave it out for a conversation.")] = None,
    client: Annotated[str | None, typer.Option(help="Whose adapters answer.")] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Every client and the global adapter alone.")
    ] = False,
    scale: Scale = 1.0,
    system: Annotated[
        str | None, typer.Option(help="Another system prompt than the client's own.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of an answer.")] = None,
    server_round: ServerRound = None,
) -> None:
    """Put a question to a client's adapters, or the same one to all clients' side by side.

    Example: fedlora ask latest --client northgate "How is parking on the pavement punished?"
    """
    from fedlora_app.serving.conversation import (
        answer_side_by_side,
        open_conversation,
        tabulate_sides,
    )

    if all_ == (client is not None):
        raise typer.BadParameter("Name one client with --client, or ask all of them with --all.")
    if all_ and question is None:
        raise typer.BadParameter("--all needs a question.")
    saved = _open_model(run, server_round)
    if client is not None:
        _converse(open_conversation(saved, client, scale, system, max_new_tokens), client, question)
        return
    clients = len(saved.run.config.client_ids) + 1
    with show_progress("answers") as show:
        done = iter(range(clients))
        sides = answer_side_by_side(
            saved,
            question,
            scale,
            system,
            max_new_tokens,
            report=lambda who: show(who, next(done), clients),
        )
    Console().print(tabulate_sides(sides))


@app.command()
def serve(
    run: RunName,
    client: Annotated[str, typer.Option(help="Whose adapters answer.")],
    host: Annotated[str, typer.Option(help="Any but a loopback address needs a key.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    scale: Scale = 1.0,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable with the key to ask for."),
    ] = None,
    server_round: ServerRound = None,
) -> None:
    """Serve a client's adapters by OpenAI's chat completions, with the answers that ask gives.

    Example: fedlora serve latest --client northgate
    """
    from fedlora_app.serving.server import read_key
    from fedlora_app.serving.server import serve as run_server

    key = read_key(api_key_env, host)
    saved = _open_model(run, server_round)
    run_server(saved, client, scale, host, port, key, lambda line: typer.echo(line, err=True))


@app.command()
def export(
    run: RunName,
    client: Annotated[str, typer.Option(help="Whose answers it is to give.")],
    output: Annotated[Path, typer.Option(help="A folder that is empty or not there.")],
    merged: Annotated[bool, typer.Option(help="Full weights instead of an adapter.")] = False,
    scale: Scale = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the weights. An adapter: float32; merged: as the base's."),
    ] = None,
    server_round: ServerRound = None,
) -> None:
    """Write standard LoRA adapters, or a whole model, that answer as a client's pair does.

    One adapter; with adapters.gate, two and the router that chooses between them.
    Example: fedlora export latest --client northgate --output northgate-adapter
    """
    from fedlora_app.serving.export import export_adapter, export_merged

    saved = _open_model(run, server_round)
    if merged:
        written = export_merged(
            saved, client, output, scale, dtype, report=lambda line: typer.echo(line, err=True)
        )
    else:
        written = export_adapter(saved, client, output, scale, dtype or "float32")
    for note in written.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Written: {written.folder} ({', '.join(written.files)})")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="JSON, JSON Lines, CSV, Parquet, a saved dataset, or a hub id."
        ),
    ],
    output: Annotated[Path, typer.Option(help="A folder that is empty or not there.")],
    client_column: Annotated[
        str | None, typer.Option(help="Says whose a row is; empty cells are universal data.")
    ] = None,
    partition: Annotated[
        Literal["iid", "label", "dirichlet", "sizes", "linear", "square", "exponential"] | None,
        typer.Option(help="Make clients where no column names them."),
    ] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Number of clients to make.")] = None,
    size: Annotated[
        list[float] | None, typer.Option(help="For sizes, once per client: records, or a share.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="For label and dirichlet.")] = None,
    labels_per_client: Annotated[int, typer.Option(min=1, help="For label.")] = 2,
    dirichlet_alpha: Annotated[
        float, typer.Option(help="The smaller, the more unlike the clients.")
    ] = 0.5,
    role: Annotated[
        Literal["local", "universal"], typer.Option(help="What the clients' records are.")
    ] = "local",
    validation: Annotated[float, typer.Option(help="Share for choosing settings.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share for the final figures.")] = 0.1,
    instruction_column: str = "instruction",
    input_column: str = "input",
    output_column: str = "output",
    messages_column: str = "messages",
    turns: Annotated[
        Literal["refuse", "last", "split"],
        typer.Option(help="Which questions of a longer conversation become records."),
    ] = "refuse",
    encoding: Annotated[str, typer.Option(help="Of JSON and CSV files, such as cp1252.")] = "utf-8",
    keep: Annotated[
        list[str] | None, typer.Option(help="A further column to keep, such as fact.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a dataset; all together if left out.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub dataset.")] = None,
    seed: Annotated[int, typer.Option(help="Of partition and splits.")] = 42,
    skip_invalid: Annotated[bool, typer.Option(help="Drop and count invalid records.")] = False,
) -> None:
    """Turn a table or dataset into per-client Alpaca files, split without near-duplicates.

    Example: fedlora import faq.csv --client-column city --output data/faq
    """
    import datasets

    from fedlora_app.data.importing.data_card import describe_import
    from fedlora_app.data.importing.importer import import_data
    from fedlora_app.data.importing.settings import ImportSettings

    datasets.disable_progress_bars()
    settings = ImportSettings(
        split=split,
        subset=subset,
        revision=revision,
        instruction_column=instruction_column,
        input_column=input_column,
        output_column=output_column,
        messages_column=messages_column,
        turns=turns,
        encoding=encoding,
        keep_columns=tuple(keep or ()),
        client_column=client_column,
        partition=partition,
        num_clients=clients,
        sizes=tuple(size or ()),
        label_column=label_column,
        labels_per_client=labels_per_client,
        dirichlet_alpha=dirichlet_alpha,
        role=role,
        validation=validation,
        test=test,
        seed=seed,
        skip_invalid=skip_invalid,
    )
    with show_progress("records") as show:
        result = import_data(source, output, settings, show, root=find_project_root())
    typer.echo(describe_import(result))


def _read_figures(run: PartialRun) -> str:
    """Return a run's last figures on one line; what is damaged in one hides no other run."""
    from fedlora_app.evaluation.reported import describe_headline

    for evaluation in (run.evaluation, None):
        try:
            return describe_headline(run.history, evaluation)
        except (AttributeError, LookupError, TypeError, ValueError):
            continue  # written by another version, or damaged
    return "its figures cannot be read"


def _open_model(run: str, server_round: int | None) -> SavedModel:
    """Return a run's adapters, to be asked or exported; nothing is loaded yet."""
    from fedlora_app.evaluation.saved_model import SavedModel
    from fedlora_app.runs.paths import find_run
    from fedlora_app.runs.reading import load_run

    _quiet_transformers()
    run_dir = find_run(run, find_project_root())
    found = load_run(run_dir)
    chosen = found.last_round if server_round is None else server_round
    return SavedModel(found, chosen, find_project_root(str(run_dir / "config.json")))


def _converse(conversation: Conversation, client: str, question: str | None) -> None:
    """Answer one question, or those that are typed until an empty line or the end of input."""
    from fedlora_app.serving.conversation import QuestionError

    if question is not None:
        _answer(conversation, question)
        return
    if sys.stdin.isatty():
        typer.echo(f"A conversation with {client}; an empty line ends it.", err=True)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not question.strip():
            return
        try:
            _answer(conversation, question)
        except QuestionError as error:
            typer.echo(f"Error: {error}", err=True)


def _answer(conversation: Conversation, question: str) -> None:
    reply = conversation.ask(question, lambda text: typer.echo(text, nl=False))
    typer.echo()
    if reply.is_cut_off:
        typer.echo("(cut off: --max-new-tokens allows longer answers)", err=True)
    if reply.num_dropped:
        typer.echo(f"({reply.num_dropped} oldest turns were forgotten for room)", err=True)


def main() -> None:
    """Run the command; what the user can fix ends in one message and status 2."""
    keep_files_private()
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


def _quiet_transformers() -> None:
    """Leave out its own progress bars; ours say what is going on."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
