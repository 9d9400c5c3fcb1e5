"""Commands on what was trained: ask it, serve it and export it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedlora_app.cli.root import Combine, RunName, Scale, ServerRound, app, open_model
from fedlora_app.foundation.terminal import show_progress

if TYPE_CHECKING:
    from fedlora_app.serving.conversation import Conversation

LOOPBACK = "127.0.0.1"


@app.command()
def ask(
    run: RunName,
    question: Annotated[str | None, typer.Argument(help="Leave it out for a conversation.")] = None,
    client: Annotated[str | None, typer.Option(help="Whose adapters answer.")] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Every client and the global adapter alone.")
    ] = False,
    scale: Scale = 1.0,
    combine: Combine = None,
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
    saved = open_model(run, server_round, combine)
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
    combine: Combine = None,
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
    saved = open_model(run, server_round, combine)
    run_server(saved, client, scale, host, port, key, lambda line: typer.echo(line, err=True))


@app.command()
def export(
    run: RunName,
    client: Annotated[str, typer.Option(help="Whose answers it is to give.")],
    output: Annotated[Path, typer.Option(help="A folder that is empty or not there.")],
    merged: Annotated[bool, typer.Option(help="Full weights instead of an adapter.")] = False,
    scale: Scale = 1.0,
    combine: Combine = None,
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

    saved = open_model(run, server_round, combine)
    if merged:
        written = export_merged(
            saved, client, output, scale, dtype, report=lambda line: typer.echo(line, err=True)
        )
    else:
        written = export_adapter(saved, client, output, scale, dtype or "float32")
    for note in written.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Written: {written.folder} ({', '.join(written.files)})")


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
