"""What a client checks before it takes part: settings, data, base model and questions, all at once.

Nothing large is loaded for it. What quotes the data is printed here and stays here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.data.client_files import ClientFiles, load_client_files
from fedlora_app.data.dialogue import pin_date
from fedlora_app.data.linter import Finding, summarise_findings
from fedlora_app.data.records import DataError
from fedlora_app.model.base import ModelError, find_embedding_fault, load_tokenizer
from fedlora_app.model.kernels import find_missing_kernels
from fedlora_app.preflight import inspect_questions
from fedlora_app.runs.client_folder import ClientFolder
from fedlora_app.runs.paths import RunPaths
from fedlora_app.training.selection import data_owners

_SAID: set[tuple[Path, str]] = set()
"""What this process has printed of a run's data. In a simulation it serves one client after
another, and files that they share would be told again by each."""


def check_client(
    config: Config, client_id: str, run_dir: Path, root: Path, date: str, *, resumes: bool
) -> tuple[ClientFiles, PreTrainedTokenizerBase, list[Finding]]:
    """Return a client's files and tokenizer, and what is to be known about its questions.

    Args:
        date: the day that chat templates write.
        resumes: the run is continued, so the client's folder in it may be there.

    Raises:
        ConfigError: with all that is wrong with settings, files, base model and questions.
    """
    faults = _find_impossible_settings(config, root)
    folder = ClientFolder(RunPaths(run_dir), client_id, config.model.name)
    if folder.is_begun and not resumes:
        faults.append(
            f"{folder.path} exists already and is left as it is. Choose another name for the run."
        )
    files, tokenizer, findings = {}, None, []
    for owner in list_owners(config, client_id):
        try:
            files[owner] = load_client_files(config, config.client(owner), root)
        except DataError as error:
            faults.append(str(error))
    try:
        tokenizer = load_tokenizer(config.model, root)
        pin_date(tokenizer, date)
    except ModelError as error:
        faults.append(str(error))
    own = files.get(client_id)
    if own is not None:
        findings = inspect_questions(config, {client_id: own}, root, tokenizer)
        _print_news(client_id, run_dir, findings)
        faults += _describe_errors(config, findings)
    if faults:
        raise ConfigError("\n".join(faults))
    return own, tokenizer, findings


def list_owners(config: Config, client_id: str) -> list[str]:
    """Return whose data a client works with; its own are among them."""
    return list(dict.fromkeys([*data_owners(config, client_id), client_id]))


def _find_impossible_settings(config: Config, root: Path) -> list[str]:
    faults = []
    if config.training.optimizer == "paged_adamw_8bit" and not torch.cuda.is_available():
        faults.append(
            "training.optimizer: paged_adamw_8bit needs a GPU and this client has none. "
            "Set it to adamw."
        )
    faults += find_missing_kernels(config.training)
    try:
        fault = find_embedding_fault(config.model, root)
    except ModelError:
        fault = None  # a model that is not there is reported in its turn
    return faults + ([fault] if fault else [])


def _print_news(client_id: str, run_dir: Path, findings: list[Finding]) -> None:
    said = {(run_dir, line): line for line in summarise_findings(findings)}
    if new := [line for key, line in said.items() if key not in _SAID]:
        print("\n".join([f"{client_id}:", *new]), flush=True)
        _SAID.update(said)


def _describe_errors(config: Config, findings: list[Finding]) -> list[str]:
    """Return why a run is refused for its questions, in words that may leave the client."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors or config.data.on_lint_error != "stop":
        return []
    places = ", ".join(dict.fromkeys(f"{f.file}: {f.rule}" for f in errors))
    return [
        f"{len(errors)} errors in the question sets ({places}). See "
        "them with: fedlora check CONFIG. Fix them, or set data.on_lint_error: warn."
    ]
