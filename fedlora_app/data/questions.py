"""Question sets: what is asked, and which answers are right and wrong.

Three kinds: *universal* (rules that hold everywhere), *local* (a client's own policies) and
*conflict* (one question, another right answer at every client). The right answer stands first
among a question's candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_app.data.distractors import Distractors
from fedlora_app.data.records import ConflictRecord, Record, format_question
from fedlora_app.data.similarity import normalise_answer

UNIVERSAL, LOCAL_SET, CONFLICT = "universal", "local", "conflict"
LOCAL_ANSWERS = "local_answers"
"""Local questions with wrong answers beside the right ones, for attacks."""
UNIVERSAL_UNSEEN = "universal_unseen"
PUBLIC = "public"  # records of nobody, which are not asked


@dataclass(frozen=True)
class Question:
    """A question with its candidate answers, the right one first.

    Without candidates only the keyword rule can be applied to what is generated.
    """

    text: str
    candidates: tuple[str, ...]
    is_unseen: bool = False
    """The client had no training record about this question's fact."""
    record: int = 0
    """Position of its record in the file."""
    fact: str | None = None
    own_keywords: tuple[str, ...] = ()
    other_keywords: tuple[str, ...] = ()

    @property
    def answer(self) -> str | None:
        """The right answer, where one is known."""
        return self.candidates[0] if self.candidates else None

    @property
    def cluster(self) -> str:
        """What is resampled together: the fact, of which several questions may be paraphrases."""
        return self.fact or self.text

    @property
    def chance(self) -> float | None:
        """How often guessing ranks the right answer first; None where there is nothing to rank."""
        return 1 / len(self.candidates) if len(self.candidates) > 1 else None


def build_questions(
    records: Sequence[Record],
    trained_facts: frozenset[str] | None = None,
    client_id: str | None = None,
) -> list[Question]:
    """Turn records into questions; distractors are drawn from the set where none are given.

    Args:
        trained_facts: facts of the client's training records, to tell what it never saw.
        client_id: whose keywords are its own in records that carry keywords.
    """
    drawn = Distractors(records)
    questions = []
    for position, record in enumerate(records):
        distractors = record.distractors or drawn.draw(record)
        own, others = _split_keywords(record, client_id)
        questions.append(
            Question(
                text=format_question(record),
                candidates=_rank_against(record.output, distractors),
                is_unseen=bool(trained_facts and record.fact and record.fact not in trained_facts),
                record=position,
                fact=record.fact,
                own_keywords=own,
                other_keywords=others,
            )
        )
    return questions


def build_conflict_questions(records: Sequence[ConflictRecord], client_id: str) -> list[Question]:
    """Turn conflict records into one client's questions: its answer against the others'.

    A record that has keywords of this client, but no answer, becomes a question without
    candidates, and so does one with keywords and the same answer for all clients, which says
    nothing. One that has neither is left out, and so is one that is no conflict.
    """
    questions = []
    for position, record in enumerate(records):
        own, others = _split_keywords(record, client_id)
        has_own_answer = client_id in record.answers and not _have_one_answer(record)
        if not has_own_answer and not own:
            continue
        candidates: tuple[str, ...] = ()
        if has_own_answer:
            rivals = [answer for client, answer in record.answers.items() if client != client_id]
            candidates = _rank_against(record.answers[client_id], [*rivals, *record.distractors])
        questions.append(
            Question(
                text=format_question(record),
                candidates=candidates,
                record=position,
                fact=record.fact,
                own_keywords=own,
                other_keywords=others,
            )
        )
    return questions


def cluster_of(record: Record | ConflictRecord) -> str:
    """Return the ``cluster`` of the questions that a record is made into."""
    return record.fact or format_question(record)


def is_agreed(record: ConflictRecord) -> bool:
    """Return whether a conflict record's clients all give the same answer, which is no conflict.

    One with keywords is left: those tell clients apart in what else an answer says.
    """
    return _have_one_answer(record) and not record.keywords


def _have_one_answer(record: ConflictRecord) -> bool:
    answers = list(map(normalise_answer, record.answers.values()))
    return len(answers) > 1 == len(set(answers))


def _split_keywords(
    record: Record | ConflictRecord, client_id: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a client's keywords and everybody else's, none where it has none of its own."""
    own = record.keywords.get(client_id, ()) if client_id else ()
    if not own:
        return (), ()
    others = [k for client, words in record.keywords.items() if client != client_id for k in words]
    return own, _unique(others)


def _rank_against(right: str, wrong: Sequence[str]) -> tuple[str, ...]:
    """Return the candidates, the right one first, without what is the right one once more."""
    same = normalise_answer(right)
    return _unique([right, *(text for text in wrong if normalise_answer(text) != same)])


def _unique(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
