from __future__ import annotations

import re

import pytest
from importing_rows import read, row, written

from fedlora_app.config.schema import SAFE_NAME, ConfigError
from fedlora_app.data.importing.rows import build_client_ids
from fedlora_app.data.importing.settings import ImportSettings
from fedlora_app.data.records import DataError

NAN = float("nan")


def test_a_row_becomes_an_alpaca_record_with_its_client():
    [record] = read(row(input=None, city=" Ayr ")).records
    assert record.fields == {"instruction": "Who mends lamps?", "input": "", "output": "Ann."}
    assert (record.client, record.question, record.answer) == ("Ayr", "who mends lamps", "ann")


def test_numbers_become_texts_and_what_is_missing_is_empty():
    [fields, _] = written(row(instruction=7, input=NAN, output=2.5), row(city=3.0))
    assert fields == {"instruction": "7", "input": "", "output": "2.5"}
    assert written(row(output=True))[0]["output"] == "true"  # as JSON has it
    values = read(row(city=3.0), row(city=4, output="Bob."), row(city=NAN), row(city=None))
    assert [record.client for record in values.records] == ["3", "4", "", ""]
    assert values.client_values == {"3": "3", "4": "4"}


def test_other_columns_are_mapped_and_kept():
    source = {"q": "Who?", "context": "Here.", "a": "Ann.", "city": "Ayr", "fact": 7}
    source |= {"distractors": '["Bob."]', "evaluation_guide": {"Ayr_keywords": ["Ann"], "x": None}}
    [fields] = written(
        source,
        instruction_column="q",
        input_column="context",
        output_column="a",
        keep_columns=("fact", "distractors", "evaluation_guide"),
    )
    assert fields == {
        "instruction": "Who?",
        "input": "Here.",
        "output": "Ann.",
        "fact": "7",
        "distractors": ["Bob."],
        "evaluation_guide": {"Ayr_keywords": ["Ann"]},
    }


def test_missing_columns_are_listed_with_suggestions():
    with pytest.raises(DataError) as caught:
        read(row(), client_column="citty", input_column="context", keep_columns=("fact",))
    message = str(caught.value)
    assert 'client_column: there is no column "citty". Did you mean "city"?' in message
    assert 'input_column: there is no column "context".' in message
    assert 'keep_columns: there is no column "fact".' in message
    assert message.endswith("Its columns: instruction, output, city. Name those that are meant.")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(output=" "), '"output" is empty'),
        (row(output=NAN), '"output" is missing'),
        ({k: v for k, v in row().items() if k != "city"}, 'has no "city" (client_column)'),
        (row(instruction=["a"]), '"instruction" is a list. Expected a string'),
        (row(output="\ud800"), "lone surrogate"),
        (row(city=["a"]), '"city" is a list. Expected text'),
        (row(distractors="[1"), '"distractors" is no JSON'),
        (row(distractors=[1]), '"distractors" is not a list of non-empty strings'),
        (row(extra={1, 2}), '"extra" is no JSON'),
        ({None: ["a", "b"], **row()}, "has 2 cells more than the header"),
        ("text", "is a string and not an object"),
    ],
)
def test_invalid_rows_are_faults_or_dropped_and_counted(bad, message):
    kept = {"keep_columns": ("distractors", "extra")}
    good = row(extra="x", distractors=["Bob."])
    with pytest.raises(DataError, match=f"rows.json, record 2: .*{re.escape(message)}"):
        read(good, bad, **kept)
    result = read(good, bad, skip_invalid=True, **kept)
    assert (len(result.records), result.num_invalid) == (1, 1)


def test_only_the_first_faults_are_shown():
    with pytest.raises(DataError) as caught:
        read(row(), *[row(output="")] * 12)
    message = str(caught.value)
    assert "rows.json: 12 of 13 records are invalid" in message
    assert "record 11:" in message
    assert "record 12:" not in message
    assert "and 2 more." in message
    assert "skip_invalid" in message
    with pytest.raises(DataError, match="holds no valid record"):
        read(row(output=""), skip_invalid=True)
    with pytest.raises(DataError, match="rows.json holds no record"):
        read()


def test_clients_are_needed_where_every_record_is_somebodys_share():
    with pytest.raises(DataError, match="record 2: .*client_column.* is empty"):
        read(row(), row(city=""), role="universal")
    with pytest.raises(DataError, match="is empty in every record"):
        read(row(city=" "))
    with pytest.raises(DataError, match=r"\(label_column\) is empty"):
        read(row(city=""), client_column=None, partition="dirichlet", num_clients=2,
             label_column="city")  # fmt: skip


def test_client_ids_are_safe_names():
    values = ["Ayr", "San José", "../../etc/passwd", "a\x00b\nc", "北京", "..", "x" * 99]
    ids = build_client_ids(values)
    assert all(re.fullmatch(SAFE_NAME, client) for client in ids.values())
    assert len(set(ids.values())) == len(values)
    assert ids["Ayr"] == "Ayr"
    assert ids["San José"] == "San-Jose"
    assert ids["../../etc/passwd"] == "etc-passwd"
    assert ids["a\x00b\nc"] == "a-b-c"
    assert ids["北京"].startswith("client-")


@pytest.mark.parametrize("rivals", [("a b", "a-b"), ("Ayr", "AYR")])
def test_values_that_make_the_same_id_are_refused(rivals):
    with pytest.raises(DataError, match="would all be client"):
        build_client_ids([*rivals, "other"])


def test_the_names_of_the_imports_own_files_are_refused():
    for name in ("readme.MD", "experiment.yaml"):
        with pytest.raises(DataError, match=f"'{name}' is the name of a file of the import"):
            build_client_ids([name])


def test_settings_tell_all_their_faults_at_once():
    with pytest.raises(ConfigError) as caught:
        ImportSettings(
            partition="dirichlet",
            client_column="city",
            validation=0.6,
            test=0.4,
            dirichlet_alpha=0,
            keep_columns=("output",),
        )
    message = str(caught.value)
    for part in (
        "give either client_column or partition",
        "num_clients: partition dirichlet needs",
        "label_column: partition dirichlet needs",
        "dirichlet_alpha: expected a positive",
        "they leave nothing to train on",
        'keep_columns: "output" is written anyway',
    ):
        assert part in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either client_column or partition"),
        ({"partition": "idd", "num_clients": 2}, "'idd' is none of iid, label"),
        ({"partition": "iid", "num_clients": 0}, "num_clients"),
        ({"partition": "sizes"}, "one positive number for each client"),
        ({"partition": "sizes", "sizes": (0.5, 0.6)}, "the shares sum to 1.1"),
        ({"partition": "sizes", "sizes": (2, 1.5)}, "whole numbers of records"),
        ({"partition": "sizes", "sizes": (2, 1), "num_clients": 3}, "sizes has 2 numbers"),
        ({"client_column": "city", "role": "globl"}, "'globl' is none of local, universal"),
        ({"client_column": "city", "test": 1.0}, "test: expected a share"),
        ({"client_column": "city", "encoding": "rot13"}, "encoding: 'rot13' is not known"),
        ({"client_column": "city", "encoding": "cp-125"}, "encoding: 'cp-125' is not known"),
        ({"client_column": "city", "turns": "first"}, "turns: 'first' is none of refuse"),
        ({"partition": "label", "num_clients": 2, "label_column": "l", "labels_per_client": 0},
         "labels_per_client"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImportSettings(**settings)


def test_settings_without_effect_are_known():
    settings = ImportSettings(client_column="city", num_clients=3, dirichlet_alpha=0.1)
    assert settings.idle == ["num_clients", "dirichlet_alpha"]
    assert ImportSettings(partition="iid", num_clients=2).idle == []
