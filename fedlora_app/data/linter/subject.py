"""What the linter's checks look at: a client with its files, and what they find there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedlora_app.config.schema import ClientConfig, Config
from fedlora_app.data.questions import (
    CONFLICT,
    LOCAL_SET,
    UNIVERSAL,
    Question,
    build_conflict_questions,
    build_questions,
)
from fedlora_app.data.records import ConflictRecord, Record, RecordFile, format_question
from fedlora_app.data.similarity import normalise_question

if TYPE_CHECKING:
    from fedlora_app.data.client_files import ClientFiles

Severity = Literal["error", "warning"]

MAX_WORDS_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing to fix or to know. ``record`` counts from 1, None for a whole file."""

    severity: Severity
    rule: str
    file: str
    record: int | None
    text: str

    def __str__(self) -> str:
        """Return the finding on one line."""
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{self.severity}: {place}: {self.text}"


@dataclass(frozen=True, eq=False)
class LintedFile:
    """A data file as the checks see it; ``kind`` is the question set or the training data."""

    name: str
    kind: str
    source: RecordFile

    @property
    def records(self) -> list[Record | ConflictRecord]:
        """The records that are valid."""
        return self.source.records

    @cached_property
    def questions(self) -> list[str]:
        """The normalised questions in the order of the records."""
        return [normalise_question(format_question(record)) for record in self.records]

    @cached_property
    def first_positions(self) -> dict[str, int]:
        """Where each question stands first."""
        positions: dict[str, int] = {}
        for position, question in enumerate(self.questions):
            positions.setdefault(question, position)
        return positions

    def finding(self, severity: Severity, rule: str, position: int | None, text: str) -> Finding:
        """Return a finding about the record at ``position`` (from 0), or about the whole file."""
        if position is None:
            return Finding(severity, rule, self.name, None, text)
        return Finding(severity, rule, self.name, position + 1, f"{text}{self._numbering}")

    def place(self, position: int) -> str:
        """Return a record's file and number for a reader."""
        return f"{self.name}, record {position + 1}{self._numbering}"

    @property
    def _numbering(self) -> str:
        skipped = self.source.num_skipped
        return f" (counted without the {skipped} invalid ones of this file)" if skipped else ""


@dataclass(frozen=True)
class LintedClient:
    """A client with its files by what they are for."""

    config: ClientConfig
    training: list[LintedFile]
    tests: list[LintedFile]
    validations: list[LintedFile]

    @property
    def question_files(self) -> list[LintedFile]:
        """The files of tests and validations."""
        return [*self.tests, *self.validations]

    @cached_property
    def question_sets(self) -> dict[LintedFile, list[Question]]:
        """The questions of every file that the client is asked from, tests first."""
        return {
            file: build_conflict_questions(file.records, self.config.id)
            if file.kind == CONFLICT
            else build_questions(file.records, client_id=self.config.id)
            for file in self.question_files
        }

    def whose(self, file: LintedFile) -> str:
        """Return whose answers are meant, where a file's depend on the client."""
        return "" if file.kind == UNIVERSAL else f" (client {self.config.id})"


def collect_clients(
    config: Config, files: Mapping[str, ClientFiles], root: Path | None
) -> list[LintedClient]:
    """Return the clients; a file that several of them have is one object."""
    known: dict[tuple[Path, str], LintedFile] = {}

    def wrap(kind: str, source: RecordFile) -> LintedFile:
        return known.setdefault(
            (source.path, kind), LintedFile(_relative(source.path, root), kind, source)
        )

    def wrap_all(sources: Mapping[str, RecordFile]) -> list[LintedFile]:
        return [wrap(kind, source) for kind, source in sources.items()]

    return [
        LintedClient(
            config.client(client_id),
            wrap_all({UNIVERSAL: own.universal, LOCAL_SET: own.local} | own.extra),
            wrap_all(own.tests),
            wrap_all(own.validations),
        )
        for client_id, own in files.items()
    ]


def list_words(words: Counter[str]) -> str:
    """Return the most frequent words, quoted."""
    ordered = sorted(words, key=lambda word: (-words[word], word))
    more = len(ordered) - MAX_WORDS_SHOWN
    listed = ", ".join(f'"{word}"' for word in ordered[:MAX_WORDS_SHOWN])
    return f"{listed} and {more} more" if more > 0 else listed


def format_percent(part: int, whole: int) -> str:
    """Return "12 %"."""
    return f"{100 * part / whole:.0f} %"


def format_count(number: int, noun: str = "record") -> str:
    """Return "1 record" or "2 records"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _relative(path: Path, root: Path | None) -> str:
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path)
