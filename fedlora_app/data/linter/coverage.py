"""What files and question sets leave out, and answers in a script that nobody was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.subject import Finding, LintedClient, format_count
from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL
from fedlora_app.data.records import IGNORED, ConflictRecord, Record, format_question
from fedlora_app.data.similarity import SHORT_HAN_TEXT, dominant_script, most_common

MAX_SCRIPT_SHARE = 0.1


def find_missing_sets(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find clients, and halves of the method, about which nothing would be asked."""
    kinds = {file.kind for file in client.tests if client.question_sets[file]}
    if not kinds & {LOCAL_SET, CONFLICT}:
        text = (
            f"client {client.config.id} has no local question: no local_test, and no answer "
            "or keyword in a conflict file. Whether its local adapter works stays unknown."
        )
        yield Finding("warning", "missing-questions", "federated.clients", None, text)
    if UNIVERSAL not in kinds and config.federated.mode != "local-only":
        text = "is not set. Whether the global adapter works stays unknown."
        yield Finding("warning", "missing-questions", "data.universal_test", None, text)


def find_silent_clients(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find clients of which a conflict file knows no answer, or not every one."""
    for file in client.question_files:
        for client_id in config.client_ids if file.kind == CONFLICT else ():
            lacking = [
                position
                for position, record in enumerate(file.records)
                if client_id not in record.answers and not record.keywords.get(client_id)
            ]
            if not lacking:
                continue
            num_records = format_count(len(file.records))
            if len(lacking) == len(file.records):
                text = (
                    f"client {client_id} has neither an answer nor a keyword in any of "
                    f"{num_records}: nothing tells how it answers a conflict, and the records "
                    "count for the other clients alone."
                )
                yield file.finding("warning", "silent-client", None, text)
                continue
            text = (
                f"client {client_id} has neither an answer nor a keyword in {len(lacking)} of "
                f"{num_records}, which count for the other clients alone. Add its answers."
            )
            yield file.finding("warning", "lacking-client", lacking[0], text)


def find_ignored_fields(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find records that hold more than is read of them."""
    for file in (*client.training, *client.question_files):
        for name, count in sorted(file.source.num_ignored.items()):
            text = (
                f'"{name}" of {format_count(count)} is not read: {IGNORED[name]}. fedlora import '
                "takes what can be taken of such files."
            )
            yield file.finding("warning", "ignored-field", None, text)


def find_foreign_scripts(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find answers in another script than those of the training, or than their questions."""
    for file in client.question_files:
        whose = client.whose(file)
        answers = [_gold(record, client.config.id) for record in file.records]
        trained = _trained_script(client, UNIVERSAL if file.kind == UNIVERSAL else LOCAL_SET)
        asked = [dominant_script(format_question(record)) for record in file.records]
        for expected, what in (
            ([trained] * len(answers), f"the training answers, which are mostly {trained}"),
            (asked, "their questions"),
        ):
            different = _find_mismatches(answers, expected)
            if len(different) > MAX_SCRIPT_SHARE * len(answers):
                counts = Counter(dominant_script(answers[position]) for position in different)
                listed = ", ".join(f"{n} in {script}" for script, n in counts.most_common())
                text = (
                    f"{len(different)} of {len(answers)} answers{whose} are in another script "
                    f"than {what}: {listed}."
                )
                yield file.finding("warning", "script", different[0], text)


def _gold(record: Record | ConflictRecord, client_id: str) -> str:
    answers = getattr(record, "answers", {})
    return answers.get(client_id, "") if answers else record.output


def _trained_script(client: LintedClient, kind: str) -> str | None:
    files = [file for file in client.training if file.kind == kind]
    return most_common(dominant_script(record.output) for f in files for record in f.records)


def _find_mismatches(answers: Sequence[str], expected: Sequence[str | None]) -> list[int]:
    """Return the positions of answers in another script; where one is unknown, none differs."""
    found = []
    for position, (answer, other) in enumerate(zip(answers, expected, strict=True)):
        own = dominant_script(answer)
        is_japanese_term = {own, other} == {"Han", "Kana"} and len(answer) <= SHORT_HAN_TEXT
        if own is not None and other is not None and own != other and not is_japanese_term:
            found.append(position)
    return found
