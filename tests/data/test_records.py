from __future__ import annotations

import json

import pytest

from fedlora_app.data.records import DataError, format_question, load_conflicts, load_records

GOOD = {"instruction": "Ask?", "input": "", "output": "Answer.", "extra": 1, "fact": "f"}


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_json_and_json_lines_read_alike(tmp_path):
    as_list = write(tmp_path / "a.json", [GOOD, GOOD])
    as_lines = tmp_path / "a.jsonl"
    as_lines.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n", encoding="utf-8")
    one, two = load_records(as_list), load_records(as_lines)
    assert one.records == two.records and len(one.records) == 2
    assert one.sha256 != two.sha256
    assert one.records[0].fact == "f"


@pytest.mark.parametrize("instruction", [{}, {"instruction": ""}, {"instruction": None}])
def test_the_question_may_stand_in_the_input_alone(tmp_path, instruction):
    alone = instruction | {"input": "Ask?", "output": "Answer."}
    [record] = load_records(write(tmp_path / "a.json", [alone])).records
    assert (record.instruction, record.input) == ("Ask?", "")
    conflict = instruction | {"input": "Ask?", "answers": {"a": "Yes."}}
    [record] = load_conflicts(write(tmp_path / "c.json", [conflict]), ["a"]).records
    assert format_question(record) == "Ask?"
    with pytest.raises(DataError, match='"instruction" is'):
        load_records(write(tmp_path / "b.json", [alone | {"input": " "}]))


def test_the_list_may_stand_in_an_object(tmp_path):
    path = write(tmp_path / "a.json", {"about": "x", "data": [GOOD, GOOD]})
    assert len(load_records(path).records) == 2


def test_every_invalid_record_is_named_with_its_field(tmp_path):
    path = write(
        tmp_path / "a.json",
        [GOOD, GOOD | {"output": " "}, {"instruction": "x"}, 3, GOOD | {"input": 5}],
    )
    with pytest.raises(DataError) as caught:
        load_records(path)
    text = str(caught.value)
    assert "4 of 5 records are invalid" in text
    assert 'record 2: "output" is empty' in text
    assert 'record 3: "output" is missing' in text
    assert "record 4: is a number and not an object" in text
    assert 'record 5: "input" is a number' in text
    assert "data.skip_invalid: true" in text
    skipped = load_records(path, skip_invalid=True)
    assert (len(skipped.records), skipped.num_skipped) == (1, 4)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no record"),
        (b"[]", "holds no record"),
        (b"[{]", "is not valid JSON"),
        (b'{"instruction": "a"', "line 1 is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"\x1f\x8b\x08\x00", "is compressed with gzip. Unpack it"),
    ],
)
def test_broken_files_say_what_is_broken(tmp_path, content, expected):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        load_records(path)


def test_line_separators_inside_a_record_do_not_end_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a\u2028b\u0085c", "output": "d"}\n', encoding="utf-8")
    assert load_records(path).records[0].instruction == "a\u2028b\u0085c"


def test_text_that_cannot_be_encoded_and_depth_without_end_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "a", "output": "b", "distractors": ["\\ud800"]}]')
    with pytest.raises(DataError, match='"distractors" holds a lone surrogate'):
        load_records(path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not valid JSON"):
        load_records(path)


def test_space_around_a_fact_makes_no_other_fact(tmp_path):
    """It would be one that no client was trained on; a blank one is none at all."""
    facts = ["fee: a dog", " fee: a dog ", "  ", ""]
    path = write(tmp_path / "a.json", [GOOD | {"fact": fact} for fact in facts])
    read = [record.fact for record in load_records(path).records]
    assert read == ["fee: a dog", "fee: a dog", None, None]
    path = write(tmp_path / "c.json", [{"instruction": "q", "answers": {"a": "1"}, "fact": " x"}])
    assert load_conflicts(path, ["a"]).records[0].fact == "x"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        load_records(tmp_path / "nowhere.json")


def test_conflict_records_of_both_forms(tmp_path):
    path = write(
        tmp_path / "c.json",
        [
            {"instruction": "q", "answers": {"a": "1", "b": "2"}, "distractors": ["3"]},
            {"instruction": "q", "output": "", "evaluation_guide": {"a_keywords": ["可以"]}},
        ],
    )
    first, second = load_conflicts(path, ["a", "b"]).records
    assert first.answers == {"a": "1", "b": "2"} and first.distractors == ("3",)
    assert second.keywords == {"a": ("可以",)} and not second.answers


def test_conflicts_of_unknown_clients_are_refused(tmp_path):
    path = write(tmp_path / "c.json", [{"instruction": "q", "answers": {"z": "1"}}])
    with pytest.raises(DataError, match="names 'z', which is not a client. Clients: a, b"):
        load_conflicts(path, ["a", "b"])
    path = write(tmp_path / "d.json", [{"instruction": "q"}])
    with pytest.raises(DataError, match='neither "answers" nor'):
        load_conflicts(path, ["a"])


def test_the_input_stands_below_the_instruction(tmp_path):
    record = load_records(write(tmp_path / "a.json", [GOOD | {"input": "more"}])).records[0]
    assert format_question(record) == "Ask?\n\nmore"
