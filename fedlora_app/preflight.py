"""All that can be told of an experiment before it is started: configuration, data, base model.

Needs no torch and no weights. ``fedlora check`` shows it; ``fedlora train`` stops at its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientFiles, load_all_files
from fedlora_app.data.linter import Finding, lint, summarise_findings
from fedlora_app.data.records import DataError
from fedlora_app.evaluation.gold import find_unreachable_answers
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.pretrained import (
    ModelError,
    ModelNotHereError,
    has_weights,
    local_folder,
)
from fedlora_app.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Preflight:
    """What was found."""

    files: Mapping[str, ClientFiles]
    findings: list[Finding]
    note: str = ""
    """What could not be looked at, and what to do about it."""

    @property
    def has_errors(self) -> bool:
        """Whether a finding makes a result wrong."""
        return any(finding.severity == "error" for finding in self.findings)


def inspect_experiment(config: Config, root: Path, *, needs_model: bool = False) -> Preflight:
    """Read the clients' data and the base model's tokenizer, and look for what is wrong.

    Args:
        needs_model: a base model that is not on this machine and cannot be had is a fault as well.

    Raises:
        UserError: files are missing or have faults, or the base model cannot be used; with all
            that is wrong with both.
    """
    faults, note, tokenizer, files = [], "", None, {}
    try:
        files = load_all_files(config, root)
    except DataError as error:
        faults.append(str(error))
    try:
        tokenizer = load_tokenizer(config.model, root)
        if not has_weights(config.model, root):
            if (folder := local_folder(config.model, root)) is not None:
                raise ModelError(f"model.name: {folder} holds no weights (model.safetensors).")
            command = download(config)
            note = f"The weights of {config.model.name} are not on this machine. Run: {command}"
    except ModelError as error:
        if needs_model or not isinstance(error, ModelNotHereError):
            faults.append(str(error))
        note = (
            f"The base model {config.model.name} is not on this machine. Run: {download(config)}\n"
            "Not checked without its tokenizer: whether answers are longer than "
            "evaluation.max_new_tokens, or changed by the chat template."
        )
    if faults:
        raise UserError("\n".join(faults))
    return Preflight(files, inspect_questions(config, files, root, tokenizer), note)


def inspect_questions(
    config: Config,
    files: Mapping[str, ClientFiles],
    root: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Finding]:
    """Return what is wrong with clients' question sets.

    Args:
        tokenizer: None where there is none; answers that nobody can give are then not looked for.
    """
    findings = lint(config, files, root)
    if tokenizer is not None:
        findings += find_unreachable_answers(config, files, tokenizer, root)
    return findings


def require_sound(config: Config, root: Path) -> None:
    """Raise where a run of this experiment would be refused.

    Raises:
        UserError: naming all that is wrong.
    """
    found = inspect_experiment(config, root, needs_model=True)
    errors = [finding for finding in found.findings if finding.severity == "error"]
    if errors and config.data.on_lint_error == "stop":
        listing = "\n".join(summarise_findings(errors))
        raise UserError(
            f"The question sets have errors:\n{listing}\nFix them, or set data.on_lint_error: warn."
        )


def download(config: Config) -> str:
    """Return the command that brings the base model to this machine."""
    revision = f" --revision {config.model.revision}" if config.model.revision else ""
    return f"hf download {config.model.name}{revision}"
