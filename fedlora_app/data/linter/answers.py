"""Right answers that are none, or that another candidate or another client gives as well."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.subject import Finding, LintedClient, LintedFile, format_count
from fedlora_app.data.questions import CONFLICT, UNIVERSAL, is_agreed
from fedlora_app.data.records import ConflictRecord, Record
from fedlora_app.data.similarity import normalise_answer


def find_agreed_conflicts(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find conflict records to which all clients give the same answer."""
    for file in client.question_files:
        agreed = [n for n, record in _conflicts(file) if is_agreed(record)]
        if agreed:
            text = (
                f"{len(agreed)} of {format_count(len(file.records))} hold the same answer for "
                "every client, so they are no conflict and are not counted. Ask them as universal "
                "questions, or give each client its own answer."
            )
            yield file.finding("warning", "equal-answers", agreed[0], text)


def find_empty_answers(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find right answers of which nothing is left to compare, such as "..."."""
    for file in client.question_files:
        empty = [
            n
            for n, record in enumerate(file.records)
            if any(answer and _is_empty(answer) for answer in _right_answers(record, client))
        ]
        if empty:
            text = (
                f"{len(empty)} right answers{client.whose(file)} hold nothing but punctuation, "
                "so no answer can match them. Write the answers out, or remove the records."
            )
            yield file.finding("warning", "empty-answer", empty[0], text)


def find_right_distractors(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find wrong answers that are the right one."""
    for file in client.question_files:
        told = [
            n
            for n, record in enumerate(file.records)
            if set(map(normalise_answer, record.distractors))
            & {normalise_answer(answer) for answer in _right_answers(record, client) if answer}
        ]
        if told:
            text = (
                f"{format_count(len(told))}{client.whose(file)} hold the right answer among the "
                '"distractors" too, where it is left out. Put a wrong answer in its place.'
            )
            yield file.finding("warning", "right-distractor", told[0], text)


def find_missing_facts(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find universal questions of which nobody can tell whether the client trained on them."""
    data = config.data
    shares = {other.universal_train or data.universal_train for other in config.federated.clients}
    trained = (file for file in client.training if file.kind == UNIVERSAL)
    are_named = any(record.fact for file in trained for record in file.records)
    for file in (file for file in client.tests if file.kind == UNIVERSAL and len(shares) > 1):
        if are_named and any(record.fact for record in file.records):
            continue
        where = f" of the training records of client {client.config.id}" * (not are_named)
        text = (
            f'no record{where} has a "fact", so "universal, never seen" stays empty: nothing tells '
            "which rules the client learnt from the others. Name the rule of each record in "
            '"fact", in training and test alike.'
        )
        yield file.finding("warning", "missing-facts", None, text)


def _conflicts(file: LintedFile) -> Iterator[tuple[int, ConflictRecord]]:
    if file.kind == CONFLICT:
        yield from enumerate(file.records)


def _right_answers(record: Record | ConflictRecord, client: LintedClient) -> list[str]:
    if isinstance(record, ConflictRecord):
        return [record.answers.get(client.config.id, "")]
    return [record.output]


def _is_empty(answer: str) -> bool:
    """Return whether an answer is nothing but sentence punctuation and invisible characters."""
    seen = "".join(char for char in answer if unicodedata.category(char) != "Cf")
    return not normalise_answer(seen)
