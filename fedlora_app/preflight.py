"""All that can be told of an experiment before it is started: configuration, data, base model.

Needs no weights, and torch for the adapters' modules and packing alone. ``fedlora check`` shows it;
``fedlora train`` stops at its errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientFiles, load_all_files
from fedlora_app.data.lengths import find_long_examples
from fedlora_app.data.linter import Finding, lint, summarise_findings
from fedlora_app.evaluation.gold import find_unreachable_answers
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.pretrained import (
    ModelError,
    ModelNotHereError,
    has_weights,
    load_model_config,
    local_folder,
    read_context,
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
    faults, notes, tokenizer, files, findings = [], [], None, {}, []
    with _collecting(faults):
        files = load_all_files(config, root)
    try:
        tokenizer = load_tokenizer(config.model, root)
        if not has_weights(config.model, root):
            if (folder := local_folder(config.model, root)) is not None:
                raise ModelError(f"model.name: {folder} holds no weights (model.safetensors).")
            command = download(config)
            notes.append(
                f"The weights of {config.model.name} are not on this machine. Run: {command}"
            )
    except ModelError as error:
        if needs_model or not isinstance(error, ModelNotHereError):
            faults.append(str(error))
        notes.append(
            f"The base model {config.model.name} is not on this machine. Run: {download(config)}\n"
            "Not checked without its tokenizer: whether answers are longer than "
            "evaluation.max_new_tokens, or changed by the chat template; records longer than "
            "training.max_seq_length; the adapters' modules, and packing."
        )
    if tokenizer is not None:
        with _collecting(faults):
            context = read_context(load_model_config(config.model, root))
            findings += find_long_examples(config, files, tokenizer, root, context)
        with _collecting(faults):
            notes += _try_base(config, root)
    if faults:
        raise UserError("\n".join(faults))
    findings += inspect_questions(config, files, root, tokenizer)
    return Preflight(files, findings, "\n".join(notes))


@contextmanager
def _collecting(faults: list[str]) -> Iterator[None]:
    """Go on after a fault, and keep what it says."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


def _try_base(config: Config, root: Path) -> list[str]:
    """Raise where a base model cannot have these adapters, or take packed examples.

    Returns:
        What was not looked at.
    """
    if find_spec("torch") is None:
        return [
            "Not checked without torch: whether the base model has the adapters' modules, and "
            "whether it takes packed examples."
        ]
    from fedlora_app.training.shapes import build_shapes

    _, faults = build_shapes(config, root)
    if faults:
        raise UserError("\n".join(faults))
    return []


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
