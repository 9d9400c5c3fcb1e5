"""Questions that are asked twice: in training and test, in test and validation, in one file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.subject import Finding, LintedClient, LintedFile, Severity
from fedlora_app.data.questions import CONFLICT, PUBLIC
from fedlora_app.data.records import ConflictRecord, Record
from fedlora_app.data.similarity import match_nearly, normalise_question


def find_repeated_questions(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find test and validation questions that were trained on or chosen on."""
    for trained in client.training:
        for file in client.tests:
            yield from _compare(file, trained, "test-in-training", "error")
        for file in client.validations:
            yield from _compare(file, trained, "validation-in-training", "error")
    for file in client.tests:
        for chosen in client.validations:
            yield from _compare(file, chosen, "test-in-validation", "warning")
    learnt = [file for file in client.training if file.kind != PUBLIC]
    for public in (file for file in client.training if file.kind == PUBLIC):
        for file in learnt:  # which the penalty would have answered as the global adapter does
            yield from _compare(public, file, "public-in-training", "warning")


def find_duplicates(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find questions that a file asks twice, with one answer or with two."""
    for file in client.training:  # instruction data may well have several answers
        yield from _find_duplicates(file, contradiction="warning")
    for file in client.question_files:
        yield from _find_duplicates(file, contradiction="error")


def _compare(
    file: LintedFile, other: LintedFile, rule: str, severity: Severity
) -> Iterator[Finding]:
    rest: dict[str, list[int]] = defaultdict(list)
    for position, question in enumerate(file.questions):
        found = other.first_positions.get(question)
        if found is None:
            rest[question].append(position)
            continue
        text = f"the question also stands in {other.place(found)}. Remove one of the two."
        yield file.finding(severity, rule, position, text)
    for question, twin in match_nearly(list(rest), list(other.first_positions)):
        place = other.place(other.first_positions[twin])
        for position in rest[question]:
            text = f"nearly the same question stands in {place}. Remove one of the two."
            yield file.finding("warning", f"near-{rule}", position, text)


def _find_duplicates(file: LintedFile, contradiction: Severity) -> Iterator[Finding]:
    for position, question in enumerate(file.questions):
        first = file.first_positions[question]
        if first == position:
            continue
        if _answers(file.records[first]) == _answers(file.records[position]):
            text = f"asks the same as record {first + 1} and has the same answer. Remove one."
            yield file.finding("warning", "duplicate", position, text)
            continue
        severity = "warning" if file.kind == CONFLICT else contradiction
        text = f"asks the same as record {first + 1} but has another answer. Keep the right one."
        yield file.finding(severity, "contradiction", position, text)


def _answers(record: Record | ConflictRecord) -> dict[str, str]:
    answers = {"": record.output, **getattr(record, "answers", {})}
    return {client: normalise_question(answer) for client, answer in answers.items()}
