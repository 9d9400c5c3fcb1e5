from __future__ import annotations

from dataclasses import replace

import pytest

from fedlora_app.data.questions import (
    Question,
    build_conflict_questions,
    build_questions,
)
from fedlora_app.data.records import ConflictRecord, Record

KEYWORDS = {"a": ("ka",), "b": ("kb", "kc"), "c": ("kc", "kd")}


def test_a_question_asks_the_instruction_and_the_input():
    records = [Record("Ask?", "Right.", input="About this."), Record("Ask?", "Right.")]
    assert [q.text for q in build_questions(records)] == ["Ask?\n\nAbout this.", "Ask?"]
    conflicts = [ConflictRecord("Ask?", input="About this.", answers={"a": "A"})]
    assert build_conflict_questions(conflicts, "a")[0].text == "Ask?\n\nAbout this."


def test_facts_without_training_records_are_unseen():
    records = [Record("q1", "a1", fact="f1"), Record("q2", "a2", fact="f2"), Record("q3", "a3")]
    flags = [question.is_unseen for question in build_questions(records, frozenset({"f1"}))]
    assert flags == [False, True, False]
    assert not any(question.is_unseen for question in build_questions(records))


def test_given_distractors_are_taken_as_they_are():
    records = [
        Record("q1", "a1", distractors=("x", "a1", "y", "x")),
        Record("q2", "a2"),
        Record("q3", "a3"),
    ]
    assert build_questions(records)[0].candidates == ("a1", "x", "y")


def test_distractors_are_drawn_without_the_answer_and_whatever_the_order():
    records = [Record(f"q{i}", f"a{i % 6}") for i in range(12)]
    one = {q.text: q.candidates for q in build_questions(records)}
    other = {q.text: q.candidates for q in build_questions(records[::-1])}
    assert one == other
    for record in records:
        candidates = one[record.instruction]
        assert candidates[0] == record.output and len(set(candidates)) == len(candidates) == 4


def test_distractors_differ_from_question_to_question():
    records = [Record(f"q{i}", f"a{i}") for i in range(20)]
    assert len({frozenset(q.candidates[1:]) for q in build_questions(records)}) > 10


def test_distractors_are_as_long_as_the_answer_and_of_its_kind():
    short = [Record(f"s{i}", f"{i} days.", fact=f"duration: {i}") for i in range(20, 30)]
    long = [
        Record(f"l{i}", f"The law of {i} says in full how each of us must act.", fact=f"law: {i}")
        for i in range(20, 30)
    ]
    fees = [Record(f"f{i}", f"{i} cents", fact=f"fee: {i}") for i in range(2, 4)]
    questions = {q.text: q for q in build_questions([*short, *long, *fees])}
    for record in (*short, *long):
        lengths = {len(text) for text in questions[record.instruction].candidates}
        assert lengths == {len(record.output)}
    # Of its own kind there is one; the rest are of the nearest length.
    own, *others = questions["f2"].candidates[1:]
    assert own == "3 cents" and all(text.endswith("days.") for text in others)
    assert len(questions["f2"].candidates) == 4


@pytest.mark.parametrize("end", [": ", "/", " | ", "："])
def test_a_kind_ends_at_chinese_signs_too(end):
    records = [Record("q", "a", fact=f"费用{end}狗"), Record("p", "abc", fact=f"费用{end}猫")]
    others = [Record(str(i), str(i), fact=f"时间{end}{i}") for i in range(9)]
    assert "abc" in build_questions([*records, *others])[0].candidates


def test_the_right_answer_in_other_signs_is_no_distractor():
    records = [Record("q1", "Yes."), Record("q2", "yes", fact="two"), Record("q3", "No")]
    assert build_questions(records)[0].candidates == ("Yes.", "No")
    given = [Record("q", "Yes.", distractors=("yes!", "No."))]
    assert build_questions(given)[0].candidates == ("Yes.", "No.")


def test_another_wording_of_the_right_answer_is_no_distractor():
    records = [Record(f"q{i}", f"wording {i}", fact="one") for i in range(4)]
    records += [Record("p1", "other 1", fact="two"), Record("p2", "other 2")]
    questions = build_questions(records)
    for question in questions[:4]:
        assert set(question.candidates[1:]) == {"other 1", "other 2"}
    assert len(questions[5].candidates) == 4  # where no fact is named, every other answer counts


@pytest.mark.parametrize(("outputs", "size"), [(["a"], 1), (["a", "a"], 1), (["a", "b"], 2)])
def test_a_small_set_gives_as_many_distractors_as_it_has(outputs, size):
    questions = build_questions([Record(f"q{i}", output) for i, output in enumerate(outputs)])
    assert [len(question.candidates) for question in questions] == [size] * len(outputs)


def test_conflict_candidates_are_own_answer_then_the_others():
    records = [
        ConflictRecord("q", answers={"a": "A", "b": "B", "c": "C"}, distractors=("D", "B")),
        ConflictRecord("q", answers={"b": "B"}),
        ConflictRecord("q", keywords={"b": ("k",)}, output="A or B"),
    ]
    questions = build_conflict_questions(records, "a")
    assert [question.candidates for question in questions] == [("A", "B", "C", "D")]
    assert build_conflict_questions(records, "c")[0].candidates == ("C", "A", "B", "D")
    assert [question.answer for question in build_conflict_questions(records, "b")] == [
        "B",
        "B",
        None,
    ]


def test_an_answer_that_clients_share_is_no_rival():
    records = [ConflictRecord("q", answers={"a": "A", "b": "A", "c": "C"})]
    assert build_conflict_questions(records, "a")[0].candidates == ("A", "C")
    assert build_conflict_questions(records[:1], "b")[0].candidates == ("A", "C")


def test_what_all_clients_answer_alike_is_no_conflict():
    agreed = ConflictRecord("q", answers={"a": "Yes.", "b": "yes"})
    records = [agreed, ConflictRecord("p", answers={"a": "Yes.", "b": "No."})]
    assert [q.record for q in build_conflict_questions(records, "a")] == [1]
    with_keywords = [replace(agreed, keywords={"a": ("yes",)})]
    (question,) = build_conflict_questions(with_keywords, "a")
    assert question.own_keywords == ("yes",) and not question.candidates  # no answer to match
    assert build_conflict_questions(with_keywords, "b") == []
    assert build_conflict_questions([ConflictRecord("q", answers={"a": "Alone."})], "a")


def test_a_record_with_keywords_only_is_a_question_without_candidates():
    records = [
        ConflictRecord("q0", answers={"b": "B"}),
        ConflictRecord("q1", keywords=KEYWORDS, output="Gold.", distractors=("D",), fact="f"),
        ConflictRecord("q2", keywords={"b": ("kb",), "a": ()}),
    ]
    questions = build_conflict_questions(records, "a")
    assert questions == [
        Question(
            "q1", (), record=1, fact="f", own_keywords=("ka",), other_keywords=("kb", "kc", "kd")
        )
    ]
    assert questions[0].answer is None


def test_keywords_are_the_clients_own_and_everybody_elses():
    answers = {client: client.upper() for client in "abcd"}
    records = [ConflictRecord("q", answers=answers, keywords=KEYWORDS)]
    splits = {
        client: (question.own_keywords, question.other_keywords)
        for client in "abcd"
        for question in build_conflict_questions(records, client)
    }
    assert splits == {
        "a": (("ka",), ("kb", "kc", "kd")),
        "b": (("kb", "kc"), ("ka", "kc", "kd")),  # kc stays on both sides: it tells nothing
        "c": (("kc", "kd"), ("ka", "kb", "kc")),
        "d": ((), ()),
    }


def test_ordinary_records_may_have_keywords_too():
    records = [Record("q1", "a1", keywords=KEYWORDS), Record("q2", "a2")]
    with_client = build_questions(records, client_id="a")
    assert with_client[0].own_keywords == ("ka",)
    assert with_client[0].other_keywords == ("kb", "kc", "kd")
    assert with_client[1].own_keywords == with_client[1].other_keywords == ()
    assert build_questions(records)[0].own_keywords == ()


def test_a_question_knows_its_record_though_others_are_left_out():
    conflicts = [ConflictRecord(f"q{i}", answers={"ab"[i % 2]: "A"}) for i in range(5)]
    assert [question.record for question in build_conflict_questions(conflicts, "b")] == [1, 3]
    assert [q.record for q in build_questions([Record("q", "a"), Record("q", "b")])] == [0, 1]


def test_paraphrases_of_a_fact_are_one_cluster():
    records = [
        Record("How much?", "30.", fact="fee"),
        Record("What does it cost?", "30.", fact="fee"),
        Record("Where?", "There."),
        Record("Where?", "There.", input="The town hall."),
    ]
    clusters = [question.cluster for question in build_questions(records)]
    assert clusters == ["fee", "fee", "Where?", "Where?\n\nThe town hall."]
    conflicts = [ConflictRecord("q", answers={"a": "A"}, fact="f")]
    assert build_conflict_questions(conflicts, "a")[0].cluster == "f"
