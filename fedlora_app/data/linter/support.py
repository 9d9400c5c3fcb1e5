"""Tests that cannot show what was learnt: of answers that nobody trains on, or of too few facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.subject import Finding, LintedClient, format_count
from fedlora_app.data.questions import CONFLICT, LOCAL_SET, PUBLIC, Question
from fedlora_app.data.records import Record
from fedlora_app.data.similarity import normalise_answer

MIN_FACTS = 10  # one answer more or less is then 10 points


def find_untrained_answers(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find right answers to local and conflict questions that no training record has."""
    trained = [r for file in client.training if file.kind != PUBLIC for r in file.records]
    for file, questions in client.question_sets.items():
        asked = [q for q in questions if q.answer is not None]
        missing = find_untrained(asked, trained) if file.kind in (LOCAL_SET, CONFLICT) else []
        if missing:
            text = (
                f"{len(missing)} of {len(asked)} right answers (client {client.config.id}) are in "
                "no training record, so nothing that the client learns can give them. Write two or "
                "more wordings of every question, and keep one of them for the test (fedlora "
                "import --fact-column does that)."
            )
            yield file.finding("warning", "untrained-answers", missing[0].record, text)


def find_untrained(questions: Iterable[Question], trained: Iterable[Record]) -> list[Question]:
    """Return the questions whose answer, or whose fact, no training record has."""
    answers, facts = set(), set()
    for record in trained:
        answers.add(normalise_answer(record.output))
        facts.add(record.fact)
    return [
        question
        for question in questions
        if normalise_answer(question.answer or "") not in answers
        and (question.fact is None or question.fact not in facts)
    ]


def find_small_sets(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find tests of so few facts that a share of them says little."""
    for file in client.tests:
        num_facts = count_facts(client.question_sets[file])
        if 0 < num_facts < MIN_FACTS:
            facts = f"{format_count(num_facts, 'fact')}{client.whose(file)}"
            text = (
                f"asks about {facts}: one answer more or less is {100 / num_facts:.0f} points. Add "
                "questions; of imported data, raise fedlora import --test."
            )
            yield file.finding("warning", "small-test", None, text)


def count_facts(questions: Sequence[Question]) -> int:
    """Return how many things are asked about; paraphrases of one fact are one."""
    return len({question.cluster for question in questions})
