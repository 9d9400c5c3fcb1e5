"""What a set of questions leaves out, and answers in a script that nobody was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.subject import Finding, LintedClient, format_count
from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, build_conflict_questions
from fedlora_app.data.records import ConflictRecord, Record, format_question
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
    if UNIVERSAL not in kinds:
        text = "is not set. Whether the global adapter works stays unknown."
        yield Finding("warning", "missing-questions", "data.universal_test", None, text)


def find_silent_clients(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find clients of which a conflict file knows no answer."""
    for file in client.question_files:
        for client_id in config.client_ids if file.kind == CONFLICT else ():
            if not build_conflict_questions(file.records, client_id):
                text = (
                    f"client {client_id} has neither an answer nor a keyword in any of "
                    f"{format_count(len(file.records))}, so no conflict question can pass for all "
                    "clients."
                )
                yield file.finding("warning", "silent-client", None, text)


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
