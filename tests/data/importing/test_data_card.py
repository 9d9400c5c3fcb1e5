from __future__ import annotations

from pathlib import Path

import yaml

from fedlora_app.config.loading import parse_config
from fedlora_app.data.importing.data_card import (
    Holding,
    ImportResult,
    build_card,
    describe_import,
    escape,
)
from fedlora_app.data.importing.experiment import Base, build_experiment
from fedlora_app.data.importing.settings import ImportSettings
from fedlora_app.data.importing.source import Source, Table

HOSTILE = "a|b\n# <script>alert(1)</script> [x](http://y) `z` \x1b[31m\u202e*"
SETTINGS = ImportSettings(client_column="city")
RECORDS = [{"instruction": "What is the fee?", "input": "", "output": "Two dollars."}]
FILES = {"ann/local_train.json": 8, "ann/local_test.json": 1, "universal_train.json": 5}


def build_result(**changes) -> ImportResult:
    values = {
        "output_dir": Path("data/towns"),
        "files": FILES,
        "clients": {"ann": Holding(HOSTILE, {"train": 8, "test": 1}, 9, 3.25)},
        "universal": Holding("", {"train": 5}, 5, 2),
        "num_read": 20,
        "num_invalid": 1,
        "num_duplicates": 5,
        "num_unassigned": 0,
        "num_shared": 0,
        "num_groups": 2,
        "largest_group": 3,
        "num_contradictions": 4,
        "sha256": "ab12",
        "experiment": "model: {name: x}",
    }
    return ImportResult(**values | changes)


def build(result: ImportResult, settings: ImportSettings = SETTINGS, name: str = "rows.csv") -> str:
    source = Source(name, "file", [Table("rows.csv", [])], {"rows.csv": "cd34"})
    return build_card(result, source, settings)


def test_the_card_has_metadata_and_every_number():
    card = build(build_result())
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "unknown"
    assert metadata["size_categories"] == ["n<1K"]
    assert "federated-learning" in metadata["tags"]
    assert "language" not in metadata
    for line in (
        "- rows.csv (file)",
        "- sha256 of rows.csv: cd34",
        "- 20 rows read",
        "- 1 invalid rows dropped",
        "- 5 duplicates dropped (same client, question and answer)",
        "- 4 questions with several answers (kept, for training only)",
        "- 2 groups of near-duplicates",
        "| (universal) |  | 5 | 0 | 0 | 5 | 2.0 |",
        "train 92.9 % (asked for: 80.0 %), validation 0.0 % (asked for: 10.0 %), test 7.1 %",
        "client_column: city\n",
        "seed: 42\n",
    ):
        assert line in card


def test_sizes_are_those_of_the_hub():
    def category(num: int) -> str:
        holding = Holding("", {"train": num}, num, 1)
        card = build(build_result(clients={"ann": holding}, universal=None))
        return yaml.safe_load(card.split("---\n")[1])["size_categories"][0]

    assert [category(n) for n in (999, 1000, 50_000, 100_000, 2_000_000)] == [
        "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "n>1M",
    ]  # fmt: skip


def test_texts_of_unknown_origin_cannot_change_the_card():
    card = build(build_result(), name=HOSTILE)
    row = next(line for line in card.splitlines() if line.startswith("| ann"))
    assert row.replace("\\|", "").count("|") == 8
    assert "\\<script\\>alert\\(1\\)\\</script\\>" in row
    assert not any(char in card for char in "\x1b\u202e")
    assert "\n# <" not in card
    assert len(escape("x" * 1000)) == 200
    assert escape(" a \ud800\t b ") == "a b"


def test_labels_are_listed_by_client():
    labels = {f"topic|{number:02}": 30 - number for number in range(25)}
    holding = Holding("", {"train": 9}, 9, 3, labels)
    settings = ImportSettings(partition="label", num_clients=1, label_column="topic")
    card = build(build_result(clients={"ann": holding}, universal=None), settings)
    assert "- ann: topic\\|00 30, topic\\|01 29" in card
    assert "and 5 more" in card
    assert "partition label, drawn with seed 42: these clients are made up" in card
    assert "## Labels" not in build(build_result())


def test_the_experiment_stands_in_for_what_is_missing():
    def read(*files: str) -> dict:
        raw = yaml.safe_load(build_experiment(["ann"], dict.fromkeys(files, RECORDS), "d", Base()))
        return parse_config(raw).dump()

    local = read("ann/local_train.json", "ann/local_test.json")
    [client] = local["federated"]["clients"]
    assert client["local_test"] == "d/ann/local_test.json"
    assert client["local_validation"] is None
    assert local["federated"]["mode"] == "local-only"  # so that nothing of its own is shared
    assert client["universal_train"] == client["local_train"] == "d/ann/local_train.json"
    assert local["data"]["universal_test"] is None
    shares = read("ann/universal_train.json", "universal_test.json")
    [client] = shares["federated"]["clients"]
    assert shares["federated"]["mode"] == "fedavg"
    assert client["local_train"] == client["universal_train"] == "d/ann/universal_train.json"
    assert shares["data"]["universal_train"] is None
    assert shares["data"]["universal_test"] == "d/universal_test.json"
    both = read("ann/local_train.json", "universal_train.json")
    assert both["federated"]["mode"] == "dual"
    assert both["data"]["universal_train"] == "d/universal_train.json"


def test_what_was_imported_is_told_in_a_few_lines():
    many = {f"c{number:02}": Holding("", {"train": 1}, 1, 1) for number in range(25)}
    text = describe_import(build_result(clients=many, warnings=("mind the gap.",)))
    lines = text.splitlines()
    assert lines[0] == "c00: train 1, validation 0, test 0"
    assert "and 6 more" in lines
    assert "5 duplicates dropped (same client, question and answer)" in lines
    assert "0 records" not in text
    assert lines[-2:] == ["warning: mind the gap.", "Written: data/towns"]
