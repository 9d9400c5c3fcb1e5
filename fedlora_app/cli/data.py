"""Commands that make an experiment's data: import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedlora_app.cli.root import app
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import show_progress


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
