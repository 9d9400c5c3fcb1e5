from __future__ import annotations

import gzip
import json

import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedlora_app.data.importing.remarks import describe_unread
from fedlora_app.data.importing.source import LISTING, load_source
from fedlora_app.data.records import DataError
from fedlora_app.foundation.files import hash_file

ROWS = [
    {"instruction": "Who mends lamps?", "output": "Ann.", "year": 1998},
    {"instruction": "Who mends roads?", "output": "Bob.", "year": 2001},
]


def read(name, **how) -> list[dict]:
    source = load_source(str(name), **how)
    return [row for table in source.tables for row in table.read(["instruction", "output", "year"])]


def write_json(path, rows=ROWS):
    path.write_text(json.dumps(rows))
    return path


def write_lines(path, rows=ROWS):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_kind_of_file_has_the_same_rows(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for path in (
        write_json(tmp_path / "a.json"),
        write_lines(tmp_path / "a.jsonl"),
        tmp_path / "a.parquet",
    ):
        source = load_source(str(path))
        assert source.kind == "file"
        assert source.name == str(path)
        assert source.sha256 == {path.name: hash_file(path)}
        assert read(path) == ROWS


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_cells_of_a_csv_file_stay_the_texts_that_they_are(tmp_path, separator):
    path = tmp_path / "rows.CSV"
    cells = [["instruction", "output", "year"], ['"Say, ""a;b""\nnow?"', "NA", "007"]]
    path.write_text(
        "\ufeff" + "\r\n".join(separator.join(line) for line in cells), encoding="utf-8"
    )
    expected = {"instruction": 'Say, "a;b"\nnow?', "output": "NA", "year": "007"}
    assert read(path) == [expected]


def test_a_compressed_file_is_what_was_compressed(tmp_path):
    for path in (write_json(tmp_path / "a.json"), write_lines(tmp_path / "a.jsonl")):
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read(packed) == ROWS
        path.unlink()
    assert read(tmp_path, split="a") == ROWS + ROWS
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read(packed)


@pytest.mark.parametrize("key", ["data", "records"])
def test_a_list_may_stand_in_an_object(tmp_path, key):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", key: ROWS}, indent=1))
    assert read(path) == ROWS
    for line in (ROWS[0], ROWS[0] | {key: ["x"]}, ROWS[0] | {key: []}, ROWS[0] | {key: [{}]}):
        path.write_text(json.dumps(line))  # a record is no wrapper
        assert [row["output"] for row in read(path)] == ["Ann."]
    path.write_text(json.dumps({key: ROWS, "validation": ROWS}))  # of which one would be lost
    assert load_source(str(path)).tables[0].columns == [key, "validation"]


def test_one_line_of_json_lines_is_a_record_whatever_it_holds(tmp_path):
    row = {"question": "Who?", "answer": "Ann.", "data": [{"source": "x"}]}
    for path in (tmp_path / "a.jsonl", tmp_path / "b.JSONL"):
        write_lines(path, [row])
        assert load_source(str(path)).tables[0].rows == [row]


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("instruction,output,,\nWho?,Ann.,,\nWhy?,So.,,\n", ","),
        ("instruction,output\nWho?,Ann.,,\nWhy?,So.\n", ","),
        ("sep=|\r\ninstruction|output\r\nWho?|Ann.\r\nWhy?|So.\r\n", "|"),
        ('"sep=;"\ninstruction;output\nWho?;Ann.\nWhy?;So.\n', ";"),
    ],
)
def test_tables_as_spreadsheets_save_them(tmp_path, text, separator):
    (tmp_path / "a.csv").write_text(text, newline="")
    rows = [{"instruction": "Who?", "output": "Ann."}, {"instruction": "Why?", "output": "So."}]
    assert load_source(str(tmp_path / "a.csv")).tables[0].rows == rows


def test_a_header_may_have_line_breaks_and_cells_without_a_name_are_not_lost(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"instruction\n(short, clear)";"the, ""output"""\nWho?;Ann.\n')
    [row] = load_source(str(path)).tables[0].rows
    assert row == {"instruction\n(short, clear)": "Who?", 'the, "output"': "Ann."}
    path.write_text("instruction,output,\nWho?,Ann.,note\n")
    assert load_source(str(path)).tables[0].rows[0][None] == ["note"]  # which rows refuse


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1252", "Straße"), ("gb18030", "北京"), ("utf-16", "Straße")]
)
def test_another_encoding_is_said_or_taken(tmp_path, encoding, text):
    path = tmp_path / "a.csv"
    path.write_bytes(f"instruction,output\nWho?,{text}\n".encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8 text.*CSV UTF-8.*--encoding"):
        load_source(str(path))
    source = load_source(str(path), encoding=encoding)
    assert source.tables[0].rows == [{"instruction": "Who?", "output": text}]


def test_a_listed_folder_is_read_as_its_list_says(tmp_path):
    """LLaMA-Factory's folders: their list names files, columns and data sets of the hub."""
    write_json(tmp_path / "a.json", [{"q": "Who?", "a": "Ann.", "before": []}])
    write_json(tmp_path / "unlisted.json", [{"x": 1}])
    Dataset.from_list([{"q": "Who?", "output": "Bob."}]).to_parquet(tmp_path / "b.parquet")
    columns = {"prompt": "q", "response": "a", "history": "before"}
    listed = {
        "first": {"file_name": "a.json", "columns": columns},
        "second": {"file_name": "b.parquet", "columns": {"prompt": "q"}},
        "remote": {"hf_hub_url": "owner/name"},
        "gone": {"file_name": "gone.json"},
    }
    write_json(tmp_path / "dataset_info.json", listed)
    source = load_source(str(tmp_path), split="first")
    [table] = source.tables
    assert table.name == "first" and source.unread == ()
    assert table.rows == [{"instruction": "Who?", "output": "Ann.", "history": []}]
    [table] = load_source(str(tmp_path), split="second").tables
    assert table.read(table.columns) == [{"instruction": "Who?", "output": "Bob."}]
    with pytest.raises(DataError, match=r"gone\.json cannot be read: No such file"):
        load_source(str(tmp_path))
    del listed["gone"]
    write_json(tmp_path / "dataset_info.json", listed)
    source = load_source(str(tmp_path))
    assert source.unread == ("unlisted.json", '"remote" of dataset_info.json')
    [note] = describe_unread(source)
    assert note.startswith('Not read in the folder: unlisted.json, "remote" of dataset_info.json.')
    write_json(tmp_path / "dataset_info.json", {"features": {"x": {"dtype": "int64"}}})
    assert load_source(str(tmp_path), split="unlisted").tables[0].rows == [{"x": 1}]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"instruction": "i", "q": "q"}, {"prompt": "q"}, "several the same name"),
        ({"q": "q"}, {"prompt": "q", "query": "q"}, "several the same name"),
        ({"instruction": "i"}, ["x"], None),
        ({"instruction": "i"}, {"prompt": 5}, None),
    ],
)
@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_list_that_cannot_be_meant(tmp_path, row, columns, message, ending):
    if ending == "json":
        write_json(tmp_path / "a.json", [row])
    else:
        Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    write_json(tmp_path / LISTING, {"a": {"file_name": f"a.{ending}", "columns": columns}})
    if message:
        with pytest.raises(DataError, match=message):
            load_source(str(tmp_path))
    else:
        [table] = load_source(str(tmp_path)).tables
        assert list(table.read(table.columns)) == [row]


def test_a_folder_of_files_is_read_in_the_order_of_names_and_by_split(tmp_path):
    write_json(tmp_path / "test.json", ROWS[:1])
    write_lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:])
    write_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    (tmp_path / ".hidden.json").write_text("no")
    (tmp_path / "README.md").write_text("no data")
    write_json(tmp_path / "more.xlsx")
    (tmp_path / "2024").mkdir()
    assert read(tmp_path) == [ROWS[0], ROWS[0], ROWS[1]]
    assert load_source(str(tmp_path)).unread == ("2024/", "more.xlsx")
    assert read(tmp_path, split="train") == ROWS
    message = r'no split "trian"\. Did you mean "train"\? It has: test, train\.'
    with pytest.raises(DataError, match=message):
        read(tmp_path, split="trian")


def test_saved_datasets_are_read_with_the_names_of_their_classes(tmp_path):
    features = Features({"instruction": Value("string"), "year": ClassLabel(names=["old", "new"])})
    rows = [{"instruction": "One?", "year": 0}, {"instruction": "Two?", "year": -1}]
    dataset = Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "both")
    named = [{"instruction": "One?", "year": "old"}, {"instruction": "Two?", "year": None}]
    assert read(tmp_path / "one") == named
    assert read(tmp_path / "both") == [*named, named[0]]
    assert read(tmp_path / "both", split="test") == named[:1]
    source = load_source(str(tmp_path / "both"))
    assert source.kind == "saved dataset"
    assert [table.name for table in source.tables] == ["train", "test"]
    assert set(source.sha256) == {f"{n}/data-00000-of-00001.arrow" for n in ("train", "test")}
    with pytest.raises(DataError, match='no split "tests". Did you mean "test"'):
        load_source(str(tmp_path / "both"), split="tests")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", "", "of a kind that cannot be read. Expected .json, .jsonl, .csv"),
        ("rows.parquet", "PAR", "cannot be read as Parquet"),
        ("rows.json", "[1,", "is not valid JSON"),
        ("rows.csv", "a,a\n1,2\n", "several columns 'a'"),
        ("rows.csv", "a,,,b\n1,2,3,4\n", "several columns ''"),
        ("rows.csv", 'a,b\n"1,2\n', "not valid CSV after line 1"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_source(str(tmp_path / name))
    assert name in str(caught.value)


def test_tables_without_rows_and_with_columns_of_the_same_name(tmp_path):
    Dataset.from_dict({"instruction": [], "output": []}).to_parquet(tmp_path / "empty.parquet")
    assert load_source(str(tmp_path / "empty.parquet")).tables[0].rows == []
    table = pyarrow.table([["q"], ["a"]], names=["output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="read as Parquet: .*output"):
        load_source(str(tmp_path / "twice.parquet"))


def test_other_encodings_and_broken_saved_datasets_are_named(tmp_path):
    (tmp_path / "rows.csv").write_bytes("a\nZürich\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_source(str(tmp_path / "rows.csv"))
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        load_source(str(tmp_path / "saved"))


def test_a_source_that_is_nowhere_is_told_what_could_be(tmp_path):
    with pytest.raises(DataError, match=r"does not exist. Expected a file \(.json"):
        load_source(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="typo.json does not exist"):
        load_source("typo.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        load_source(str(tmp_path / "empty"))


def test_a_dataset_of_the_hub_without_a_network_says_what_to_do():
    with pytest.raises(DataError, match="Couldn't reach 'owner/name' on the Hub") as caught:
        load_source("owner/name", split="train", revision="v1")
    assert "load_dataset('owner/name').save_to_disk(FOLDER)" in str(caught.value)
