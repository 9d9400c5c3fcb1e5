"""Question sets: what is asked, and which answers are right and wrong.

Three kinds: *universal* (rules that hold everywhere), *local* (a client's own policies) and
*conflict* (one question, another right answer at every client). The right answer stands first
among a question's candidates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_app.data.records import ConflictRecord, Record, format_question
from fedlora_app.foundation.seeds import derive_seed

UNIVERSAL, LOCAL_SET, CONFLICT = "universal", "local", "conflict"
UNIVERSAL_UNSEEN = "universal_unseen"
NUM_DRAWN_DISTRACTORS = 3


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
    outputs = sorted({record.output for record in records})
    right = _group_outputs(records)
    questions = []
    for position, record in enumerate(records):
        own_outputs = right.get(record.fact, set()) | {record.output}
        distractors = record.distractors or _draw_distractors(record, outputs, own_outputs)
        own, others = _split_keywords(record, client_id)
        questions.append(
            Question(
                text=format_question(record),
                candidates=_unique([record.output, *distractors]),
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
    candidates; one that has neither is left out.
    """
    questions = []
    for position, record in enumerate(records):
        own, others = _split_keywords(record, client_id)
        if client_id not in record.answers and not own:
            continue
        candidates: tuple[str, ...] = ()
        if client_id in record.answers:
            rivals = [answer for client, answer in record.answers.items() if client != client_id]
            candidates = _unique([record.answers[client_id], *rivals, *record.distractors])
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


def _split_keywords(
    record: Record | ConflictRecord, client_id: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a client's keywords and everybody else's, none where it has none of its own."""
    own = record.keywords.get(client_id, ()) if client_id else ()
    if not own:
        return (), ()
    others = [k for client, words in record.keywords.items() if client != client_id for k in words]
    return own, _unique(others)


def _group_outputs(records: Sequence[Record]) -> dict[str | None, set[str]]:
    """Return the answers to each named fact, which are right in one another's place."""
    outputs: dict[str | None, set[str]] = {}
    for record in records:
        if record.fact:
            outputs.setdefault(record.fact, set()).add(record.output)
    return outputs


def _draw_distractors(record: Record, outputs: Sequence[str], right: set[str]) -> list[str]:
    """Draw other facts' answers, the same ones whatever the order of the file."""
    others = [output for output in outputs if output not in right]
    rng = random.Random(derive_seed("distractors", record.instruction, record.input))
    return rng.sample(others, min(NUM_DRAWN_DISTRACTORS, len(others)))


def _unique(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
