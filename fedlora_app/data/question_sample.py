"""Some questions of each set, the same ones in every round and at every client.

Which ones depends on the experiment's seed, the set, and what the records say. They are chosen of a
file's records and not of a client's questions, so that all clients are asked the same conflicts.
As many facts as possible are asked about: a second wording of one only where all have a first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedlora_app.data.questions import Question, is_agreed
from fedlora_app.data.records import ConflictRecord, Record, RecordFile, format_question
from fedlora_app.foundation.seeds import derive_seed


def sample_question_sets(
    sets: Mapping[str, list[Question]], files: Mapping[str, RecordFile], limit: int, seed: int
) -> dict[str, list[Question]]:
    """Return at most ``limit`` questions of each set, in their order; 0: all of them.

    Args:
        files: what the sets were made from, by their names.
        seed: the experiment's.
    """
    if limit == 0:
        return dict(sets)
    chosen = {name: choose_records(files[name].records, limit, seed, name) for name in sets}
    sampled = {name: [q for q in sets[name] if q.record in chosen[name]] for name in sets}
    return {name: questions for name, questions in sampled.items() if questions}


def choose_records(
    records: Sequence[Record | ConflictRecord], limit: int, seed: int, name: str
) -> set[int]:
    """Return the positions of at most ``limit`` records that make questions."""

    def draw(*parts: object) -> int:
        return derive_seed(seed, "sample", name, *parts)

    by_fact: dict[str, list[int]] = defaultdict(list)
    for position, record in enumerate(records):
        if not (isinstance(record, ConflictRecord) and is_agreed(record)):
            by_fact[record.fact or format_question(record)].append(position)
    turns = []
    for fact, positions in by_fact.items():
        positions.sort(key=lambda position: draw(fact, format_question(records[position])))
        turns += [(turn, draw(fact), position) for turn, position in enumerate(positions)]
    return {position for _, _, position in sorted(turns)[:limit]}
