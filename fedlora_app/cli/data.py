"""Commands that make an experiment with its data: init, import."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedlora_app.cli.root import app
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import shell, show_progress

if TYPE_CHECKING:
    from fedlora_app.data.importing.settings import ImportSettings

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="JSON, JSON Lines, CSV, Parquet, a saved dataset, or a hub id."
    ),
]
Output = Annotated[Path, typer.Option(help="A folder that is empty or not there.")]
ClientColumn = Annotated[
    str | None, typer.Option(help="Says whose a row is; empty cells are universal data.")
]
FactColumn = Annotated[
    str | None,
    typer.Option(help="Says which rows are wordings of one fact; at least one is trained on."),
]
Model = Annotated[
    str, typer.Option(help="Base model, a hub id or a folder. Default: by the device that is here.")
]
PartitionName = Annotated[
    Literal["iid", "label", "dirichlet", "sizes", "linear", "square", "exponential"] | None,
    typer.Option(help="Make clients where no column names them."),
]
NumClients = Annotated[int | None, typer.Option(min=1, help="Number of clients to make.")]
Sizes = Annotated[
    list[float] | None, typer.Option(help="For sizes, once per client: records, or a share.")
]
LabelColumn = Annotated[str | None, typer.Option(help="For label and dirichlet.")]
LabelsPerClient = Annotated[int, typer.Option(min=1, help="For label.")]
Alpha = Annotated[float, typer.Option(help="The smaller, the more unlike the clients.")]
RoleName = Annotated[
    Literal["local", "universal"], typer.Option(help="What the clients' records are.")
]
Validation = Annotated[float, typer.Option(help="Share for choosing settings.")]
Test = Annotated[float, typer.Option(help="Share for the final figures.")]
TurnsName = Annotated[
    Literal["refuse", "last", "split"],
    typer.Option(help="Which questions of a longer conversation become records."),
]
Encoding = Annotated[str, typer.Option(help="Of JSON and CSV files, such as cp1252.")]
Keep = Annotated[
    list[str] | None, typer.Option(help="A further column to keep, such as distractors.")
]
Split = Annotated[str | None, typer.Option(help="Of a dataset; all together if left out.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")]
Revision = Annotated[str | None, typer.Option(help="Of a hub dataset.")]
Seed = Annotated[int, typer.Option(help="Of partition and splits.")]
SkipInvalid = Annotated[bool, typer.Option(help="Drop and count invalid records.")]
SETTING_OF_OPTION = {"keep": "keep_columns", "clients": "num_clients", "size": "sizes"}
"""Where an option has another name than its setting."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty folder, or a new one.")],
    clients: Annotated[str, typer.Option(help="Their ids, separated by commas.")],
    model: Annotated[
        str, typer.Option(help="Base model, a hub id or a folder. Default: the demo's.")
    ] = "",
) -> None:
    """Write an experiment to fill with your own: a commented YAML, folders and example records.

    It trains as it is, with the demo's tiny base model on a CPU in minutes.
    Example: fedlora init my-desk --clients ayr,bath,cork
    """
    from fedlora_app.demo.starter import DEMO_MODEL, start_experiment

    root = find_project_root()
    ids = [name.strip() for name in clients.split(",") if name.strip()]
    _require_model(model, root)
    path = start_experiment(folder, ids, root, model or DEMO_MODEL)
    typer.echo(f"Written: {folder}")
    _show_what_is_next(path, root)


@app.command("import")
def import_(
    source: Source,
    output: Output,
    client_column: ClientColumn = None,
    fact_column: FactColumn = None,
    model: Model = "",
    partition: PartitionName = None,
    clients: NumClients = None,
    size: Sizes = None,
    label_column: LabelColumn = None,
    labels_per_client: LabelsPerClient = 2,
    dirichlet_alpha: Alpha = 0.5,
    role: RoleName = "local",
    validation: Validation = 0.1,
    test: Test = 0.1,
    instruction_column: Annotated[str, typer.Option(help="Of questions.")] = "instruction",
    input_column: Annotated[str, typer.Option(help="Of what questions are about.")] = "input",
    output_column: Annotated[str, typer.Option(help="Of answers.")] = "output",
    messages_column: Annotated[str, typer.Option(help="Of whole conversations.")] = "messages",
    turns: TurnsName = "refuse",
    encoding: Encoding = "utf-8",
    keep: Keep = None,
    split: Split = None,
    subset: Subset = None,
    revision: Revision = None,
    seed: Seed = 42,
    skip_invalid: SkipInvalid = False,
) -> None:
    """Turn a table or dataset into per-client Alpaca files and an experiment that trains on them.

    Example: fedlora import faq.csv --client-column city --output data/faq
    """
    options = locals()
    import datasets

    from fedlora_app.data.importing.data_card import describe_import
    from fedlora_app.data.importing.experiment import EXPERIMENT_FILE
    from fedlora_app.data.importing.importer import import_data

    datasets.disable_progress_bars()
    root, memory = find_project_root(), _read_gpu_memory()
    _require_model(model, root)
    with _speaking_of_options(), show_progress("records") as show:
        settings = _build_settings(options)
        result = import_data(
            source, output, settings, show, root=root, model=model, gpu_bytes=memory
        )
    typer.echo(describe_import(result))
    _show_what_is_next(output / EXPERIMENT_FILE, root)


def _require_model(name: str, root: Path) -> None:
    """Raise where a base model's name can only be a folder, and it is not there."""
    from fedlora_app.config.schema import ModelConfig
    from fedlora_app.model.pretrained import require_folder

    if name:
        require_folder(ModelConfig(name=name), root)


@contextmanager
def _speaking_of_options() -> Iterator[None]:
    """Give settings in an error the names of the options that they are here."""
    from fedlora_app.data.importing.settings import ImportSettings

    options = {setting: option for option, setting in SETTING_OF_OPTION.items()}
    names = {setting.name: setting.name for setting in fields(ImportSettings)} | options
    # A plain word such as test means the setting only where a fault begins with it.
    words = "|".join(f"{name}(?=:)" if "_" not in name else name for name in names)
    try:
        yield
    except UserError as error:
        text = re.sub(
            rf"(?m)(?<![\w\"'./-])({words})(?![\w\"'/-])",
            lambda match: f"--{names[match[1]].replace('_', '-')}",
            str(error),
        )
        raise type(error)(text) from error


def _build_settings(options: Mapping[str, Any]) -> ImportSettings:
    from fedlora_app.data.importing.settings import ImportSettings

    known = {setting.name for setting in fields(ImportSettings)}
    named = {SETTING_OF_OPTION.get(name, name): value for name, value in options.items()}
    for name in ("keep_columns", "sizes"):
        named[name] = tuple(named[name] or ())
    return ImportSettings(**{name: value for name, value in named.items() if name in known})


def _read_gpu_memory() -> int | None:
    """Return the bytes of this machine's GPU, None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def _show_what_is_next(path: Path, root: Path) -> None:
    """Say what fedlora check finds in an experiment that was written, and how to go on."""
    from fedlora_app.config.loading import load_config
    from fedlora_app.data.client_files import load_all_files
    from fedlora_app.data.linter import describe_findings, lint
    from fedlora_app.model.pretrained import has_weights, names_folder
    from fedlora_app.preflight import download

    config = load_config(path)
    typer.echo(describe_findings(lint(config, load_all_files(config, root), root)))
    typer.echo(f"Base model: {config.model.name}; why, and all settings, in {path}. Next:")
    if not names_folder(config.model, root) and not has_weights(config.model, root):
        typer.echo(f"  {download(config)}")
    typer.echo(f"  fedlora train {shell(path)}")
