from __future__ import annotations

from collections import Counter
from pathlib import Path

from fedlora_app.data.question_sample import choose_records, sample_question_sets
from fedlora_app.data.questions import build_conflict_questions, build_questions
from fedlora_app.data.records import ConflictRecord, Record, RecordFile

CLIENTS = ("ann", "bob")


def conflicts(count: int) -> list[ConflictRecord]:
    """Of which bob has no answer to every third, and every fifth is none."""
    found = []
    for number in range(count):
        answers = {"ann": f"Ann says {number}.", "bob": f"Bob says {number}."}
        if number % 3 == 0:
            del answers["bob"]
        elif number % 5 == 0:
            answers["bob"] = answers["ann"]
        found.append(ConflictRecord(f"What about {number}?", answers=answers))
    return found


def file_of(records) -> RecordFile:
    return RecordFile(Path("test.json"), "0" * 64, records)


def test_all_clients_are_asked_the_same_conflicts():
    file = file_of(conflicts(60))
    asked = {
        client: sample_question_sets(
            {"conflict": build_conflict_questions(file.records, client)}, {"conflict": file}, 12, 1
        )["conflict"]
        for client in CLIENTS
    }
    records = {client: {q.record for q in questions} for client, questions in asked.items()}
    assert len(records["ann"]) == 12 and 4 < len(records["bob"]) < 12
    assert records["bob"] == {n for n in records["ann"] if n % 3}
    assert not any(number % 5 == 0 and number % 3 for number in records["ann"])


def test_as_many_facts_as_possible_are_asked_about():
    records = [
        Record(f"Wording {w} of {f}?", f"{f}.", fact=str(f))
        for f in range(6)
        for w in range(1 if f == 0 else 4)
    ]
    for limit, most in ((4, 1), (6, 1), (9, 2), (21, 4), (99, 4)):
        chosen = choose_records(records, limit, 7, "local")
        counts = Counter(records[position].fact for position in chosen)
        assert len(chosen) == min(limit, 21) and max(counts.values()) == most
        assert len(counts) == min(limit, 6)


def test_the_choice_is_of_the_seed_the_set_and_what_is_said():
    records = [Record(f"Question {n}?", "Yes.") for n in range(40)]
    chosen = choose_records(records, 10, 1, "local")
    assert chosen == choose_records(records, 10, 1, "local")
    assert chosen != choose_records(records, 10, 2, "local")
    assert chosen != choose_records(records, 10, 1, "universal")
    backwards = {39 - position for position in choose_records(records[::-1], 10, 1, "local")}
    assert chosen == backwards
    assert choose_records(records, 20, 1, "local") > chosen  # a larger sample holds a smaller one


def test_no_limit_asks_all_and_candidates_are_those_of_all():
    file = file_of([Record(f"Question {n}?", f"Answer {n}.") for n in range(9)])
    sets = {"local": build_questions(file.records)}
    assert sample_question_sets(sets, {"local": file}, 0, 1) == sets
    sampled = sample_question_sets(sets, {"local": file}, 3, 1)["local"]
    assert len(sampled) == 3 and sampled == [q for q in sets["local"] if q in sampled]
