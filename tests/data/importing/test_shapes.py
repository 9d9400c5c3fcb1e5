"""How questions and answers stand in the files that people bring."""

from __future__ import annotations

import json

import pytest
from importing_rows import read, row, written

from fedlora_app.data.importing.settings import ImportSettings
from fedlora_app.data.importing.shapes import choose_shape
from fedlora_app.data.records import DataError

WHO = {"instruction": "Who?", "input": "", "output": "Ann."}
TURNS = [("system", "Be kind."), ("user", "Who?"), ("assistant", "Ann.")]
MORE = [*TURNS, ("user", "And then?"), ("assistant", "Bob.")]
TOLD = "User: Who?\nAssistant: Ann.\nUser: And then?"


def chat(turns, role="role", content="content", names=None):
    return [{role: (names or {}).get(who, who), content: text} for who, text in turns]


def sharegpt(turns):
    return chat(turns, "from", "value", {"user": "human", "assistant": "gpt"})


def in_parts(turns):
    return chat([(who, [{"type": "text", "text": t} for t in text]) for who, text in turns])


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("shape", [chat, sharegpt, in_parts])
def test_conversations_are_read_in_every_shape(column, shape):
    assert written({column: shape(TURNS), "city": "Ayr"}) == [WHO]


def test_a_question_of_its_own_comes_before_a_conversation():
    assert written(row(messages=chat(TURNS)))[0]["instruction"] == "Who mends lamps?"


def test_a_column_of_conversations_can_be_named():
    assert written({"log": chat(TURNS), "city": "Ayr"}, messages_column="log") == [WHO]


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Who?", "Ann."), (chat(TURNS[:2]), chat(TURNS[2:])), (chat(TURNS[1:2]), "Ann.")],
    ids=["texts", "messages", "both"],
)
def test_prompt_and_completion_are_read(question, answer):
    assert written({"prompt": question, "completion": answer, "city": "Ayr"}) == [WHO]


def test_of_several_questions_nothing_is_lost_unasked():
    told = {"messages": chat(MORE), "city": "Ayr"}
    with pytest.raises(DataError, match="is a conversation of 2 questions.*--turns last.*split"):
        read(told)
    last = {"instruction": TOLD, "input": "", "output": "Bob."}
    assert written(told, turns="last") == [last]
    assert written(told, turns="split") == [WHO, last]
    split = read(told, told | {"messages": chat(TURNS)}, turns="split")
    assert [record.row for record in split.records] == [0, 0, 1]
    assert split.num_rows == 2


@pytest.mark.parametrize("history", [[["Who?", "Ann."]], '[["Who?", "Ann."]]'])
def test_what_came_before_a_question_is_not_lost(history):
    asked = row(instruction="And then?", output="Bob.", input="Today.", history=history)
    with pytest.raises(DataError, match="is a conversation of 2 questions"):
        read(asked)
    [fields] = written(asked, turns="last")
    assert fields == {"instruction": TOLD, "input": "Today.", "output": "Bob."}
    for nothing in (None, [], ""):
        assert written(row(history=nothing)) == written(row())


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("Who?", "its messages are not a list of {role, content}"),
        (["Who?"], "its messages are not a list of {role, content}"),
        ([], "is a conversation of no turns"),
        (chat(TURNS[:2]), "is a conversation of user. Expected turns of user and assistant"),
        (chat([*TURNS, ("tool", "7")]), "is a conversation of user, assistant, tool"),
        (chat([*TURNS[:2], ("assistant", [{"type": "image"}])]), "parts that are not text"),
        (chat([("user", None), ("assistant", "Ann.")]), '"instruction" is missing'),
    ],
)
def test_what_is_no_conversation_is_a_fault(turns, message):
    with pytest.raises(DataError, match=message):
        read({"messages": turns, "city": "Ayr"})


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_the_question_may_stand_in_the_input_alone(empty):
    assert written(row(instruction=empty, input="Who?", output="Ann.")) == [WHO]
    without = {"input": "Who?", "output": "Ann.", "city": "Ayr"}
    assert written(without) == [WHO]


def test_usual_names_of_columns_are_taken_and_told():
    records = read({"question": "Who?", "context": "Here.", "response": "Ann.", "city": "Ayr"})
    assert records.records[0].fields == WHO | {"input": "Here."}
    assert records.notes == (
        '"question" is read as instruction.',
        '"context" is read as input.',
        '"response" is read as output.',
    )
    with pytest.raises(DataError, match=r"output_column: .*It may be response or answer\."):
        read({"question": "Who?", "response": "Ann.", "answer": "Bob.", "city": "Ayr"})


def test_every_column_that_is_left_out_is_named():
    notes = read(row(system="Be kind.", tools=[], id=7, year=1998, fact="lamps"),
                 keep_columns=("fact",)).notes  # fmt: skip
    assert notes == (
        '"system" is left out: a client has one system prompt, which the experiment names.',
        '"tools" is left out: the use of tools is not trained here.',
        'Left out: "id", "year". --keep COLUMN keeps one in the records.',
    )
    [note] = read({"messages": chat(TURNS), "city": "Ayr"}).notes
    assert note.startswith("System messages of 1 conversations are left out: ")
    assert read(row()).notes == ()


def test_a_named_column_is_no_usual_one():
    settings = ImportSettings(client_column="city", output_column="reply")
    shape, faults = choose_shape(["instruction", "response", "city"], settings)
    assert faults == ['  output_column: there is no column "reply".']
    assert "output" not in shape.columns


def test_a_key_that_stands_twice_is_a_fault_as_in_data_files(tmp_path):
    from fedlora_app.data.importing.rows import read_records
    from fedlora_app.data.importing.source import load_source

    path = tmp_path / "twice.json"
    path.write_text(json.dumps([row()]).replace('"city":', '"city": "Bath", "city":'))
    with pytest.raises(DataError, match="record 1: the key 'city' is there more than once"):
        read_records(load_source(str(path)), ImportSettings(client_column="city"), lambda *_: None)


@pytest.mark.parametrize(
    "earlier",
    [("user", None), ("user", {"a": 1}), ("user", 3), ("user", " ")],
)
def test_what_was_said_before_must_be_text(earlier):
    told = chat([earlier, ("assistant", "Ann."), *MORE[3:]])
    for turns in ("last", "split"):
        with pytest.raises(DataError, match="an earlier question or answer without text"):
            read({"messages": told, "city": "Ayr"}, turns=turns)
    with pytest.raises(DataError, match="without text"):
        read(row(instruction=None, history=[["Who?", "Ann."]]), turns="last")


def test_prompts_of_messages_lose_nothing_either():
    records = read(
        {
            "prompt": chat(TURNS[:2]),
            "completion": chat(TURNS[2:]),
            "context": "Here.",
            "history": [["Where?", "There."]],
            "city": "Ayr",
        },
        turns="last",
    )
    [fields] = [record.fields for record in records.records]
    asked = "User: Where?\nAssistant: There.\nUser: Who?"
    assert fields == {"instruction": asked, "input": "Here.", "output": "Ann."}
    assert records.notes[-1].startswith("System messages of 1 conversations are left out: ")


def test_other_entries_of_turns_are_named_or_refused():
    turns = chat(TURNS)
    turns[2] |= {"reasoning_content": "R", "weight": 0, "name": None}
    assert read({"messages": turns, "city": "Ayr"}).notes[-1] == (
        'Left out of turns: "reasoning_content", "weight".'
    )
    turns[2] |= {"tool_calls": [{"function": "f"}]}
    with pytest.raises(DataError, match="calls a tool"):
        read({"messages": turns, "city": "Ayr"})
    with pytest.raises(DataError, match="both content and value"):
        read({"messages": [chat(TURNS)[1] | {"value": "x"}, chat(TURNS)[2]], "city": "Ayr"})


def test_a_named_column_of_conversations_comes_first_and_must_be_there():
    both = row(log=chat(TURNS))
    assert written(both, messages_column="log") == [WHO]
    with pytest.raises(DataError, match=r'messages_column: there is no column "lgo"\. Did you'):
        read(both, messages_column="lgo")


def test_a_column_with_another_purpose_is_no_text():
    fields = {"question": "Who?", "answer": "Ann.", "context": "Ayr"}
    [record] = read(fields, client_column="context").records
    assert record.fields == WHO and record.client == "Ayr"


def test_a_name_that_no_terminal_can_show_is_escaped():
    [note] = read(row(**{"c\ud800": "v"})).notes
    assert note.encode() and "c\\ud800" in note


def test_an_unnamed_column_is_nobodys_text():
    """``pandas.DataFrame.to_csv`` writes the rows' numbers under no name."""
    assert written({"": "0", "question": "Who?", "answer": "Ann.", "city": "Ayr"}) == [WHO]
    assert written({"": "0", **row(), "history": None})[0]["input"] == row().get("input", "")
