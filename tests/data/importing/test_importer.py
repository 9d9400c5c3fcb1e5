from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from rapidfuzz import fuzz

from fedlora_app.config.loading import parse_config
from fedlora_app.data.client_files import load_all_files
from fedlora_app.data.importing.data_card import describe_import, escape
from fedlora_app.data.importing.importer import import_data
from fedlora_app.data.importing.settings import ImportSettings
from fedlora_app.data.linter import lint
from fedlora_app.data.records import DataError

CITIES = ("Ayr", "Bath", "Cork")
NEARLY = 85  # percent
BY_CITY = ImportSettings(client_column="city")


def make_words(rng: random.Random, num: int) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(num))


def make_rows(seed: int = 0, num: int = 30) -> list[dict]:
    """Questions of three cities and universal ones: own, near-duplicate, and shared ones."""
    rng = random.Random(seed)
    shared = [make_words(rng, 8) for _ in range(num)]
    rows = []
    for city in (*CITIES, ""):
        for index in range(num):
            question = make_words(rng, 8)
            rows.append({"city": city, "instruction": question, "output": make_words(rng, 3)})
            if index % 3 == 0:
                changed = rng.choice([f"Please {question}?", question[:-1], question.upper()])
                owner = rng.choice((*CITIES, ""))
                answer = make_words(rng, 3)
                rows.append({"city": owner, "instruction": changed, "output": answer})
        if city:
            answers = [f"{city} says so", "everyone says so"]
            rows += [
                {"city": city, "instruction": q, "output": answers[i % 2]}
                for i, q in enumerate(shared)
            ]
    rng.shuffle(rows)
    return [{"id": number, "topic": f"t{number % 4}", **row} for number, row in enumerate(rows)]


ROWS = make_rows()


@pytest.fixture
def rows_path(tmp_path, monkeypatch) -> Path:
    """A source beside an empty project, which is the working directory."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def run(source, settings: ImportSettings = BY_CITY, name: str = "data/towns"):
    return import_data(str(source), Path(name), settings)


def read(folder: str = "data/towns") -> dict[str, list[dict]]:
    root = Path(folder)
    return {p.relative_to(root).as_posix(): json.loads(p.read_text()) for p in root.rglob("*.json")}


def plain(question: str) -> str:
    return re.sub(r"\W+", " ", question.lower()).strip()


def split_of(path: str) -> str:
    return path.removesuffix(".json").rsplit("_", 1)[-1]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_the_records_of_every_client_and_split_stand_in_files_with_a_card(rows_path):
    result = run(rows_path)
    files = read()
    expected = {
        f"{city}/local_{s}.json" for city in CITIES for s in ("train", "validation", "test")
    }
    expected |= {f"universal_{split}.json" for split in ("train", "validation", "test")}
    expected |= {"conflict_validation.json", "conflict_test.json"}
    assert set(files) == expected
    assert result.files == {path: len(records) for path, records in files.items()}
    assert sum(result.splits.values()) == len(ROWS) - result.num_duplicates
    assert result.warnings == ()
    for split, share in BY_CITY.shares.items():
        assert abs(result.splits[split] / sum(result.splits.values()) - share) < 0.03
    given = {(row["instruction"], row["output"]) for row in ROWS}
    for path, records in files.items():
        for record in records if not path.startswith("conflict") else []:
            assert (record["instruction"], record["output"]) in given
    card = Path("data/towns/README.md").read_text()
    for city in CITIES:
        counts = [len(files[f"{city}/local_{s}.json"]) for s in ("train", "validation", "test")]
        assert f"| {city} | {city} | {' | '.join(map(str, counts))} |" in card
    assert str(Path.cwd()) not in card


def test_no_near_duplicate_crosses_splits(rows_path):
    run(rows_path)
    questions: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for path, records in read().items():
        questions[split_of(path)] |= {
            plain(record["instruction"]).removeprefix("please ") for record in records
        }
    for one, other in combinations(questions.values(), 2):
        for a, b in product(one, other):
            assert a[:5] != b[:5]
            assert fuzz.ratio(a, b) < NEARLY


def test_questions_that_clients_answer_differently_become_conflicts(rows_path):
    run(rows_path)
    files = read()
    for split in ("validation", "test"):
        answers: dict[str, dict[str, str]] = {}
        for city in CITIES:
            for record in files[f"{city}/local_{split}.json"]:
                answers.setdefault(plain(record["instruction"]), {})[city] = record["output"]
        expected = {q: a for q, a in answers.items() if len(set(a.values())) > 1}
        conflicts = files[f"conflict_{split}.json"]
        found = {plain(record["instruction"]): record["answers"] for record in conflicts}
        assert found == expected
        assert found
        assert all(set(record) == {"instruction", "input", "answers"} for record in conflicts)


def test_fields_that_all_clients_agree_on_stand_in_a_conflict(rows_path, tmp_path):
    rows = [
        {
            "city": city,
            "instruction": f"rule {index}",
            "output": city,
            "fact": f"f{index}",
            "n": city,
        }
        for index in range(20)
        for city in CITIES
    ]
    settings = ImportSettings(client_column="city", keep_columns=("fact", "n"))
    run(write(tmp_path / "rules.json", rows), settings)
    [record, *_] = read()["conflict_test.json"]
    index = record["instruction"].removeprefix("rule ")
    assert record == {
        "instruction": f"rule {index}",
        "input": "",
        "fact": f"f{index}",
        "answers": {city: city for city in CITIES},
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": "iid", "num_clients": 3},
        {"partition": "sizes", "sizes": (0.5, 0.3, 0.2)},
        {"partition": "linear", "num_clients": 3},
        {"partition": "label", "num_clients": 3, "label_column": "topic"},
        {"partition": "dirichlet", "num_clients": 3, "label_column": "topic"},
    ],
)
def test_partitions_give_every_record_to_one_client_and_split(tmp_path, rows_path, settings):
    def share(seed: int) -> dict[str, list[int]]:
        name = f"{settings['partition']}-{seed}"
        run(rows_path, ImportSettings(**settings, seed=seed, keep_columns=("id",)), name)
        return {path: [r["id"] for r in records] for path, records in read(name).items()}

    files = share(1)
    assert {path.split("/")[0] for path in files} == {"client-1", "client-2", "client-3"}
    ids = [number for numbers in files.values() for number in numbers]
    assert len(ids) == len(set(ids))
    first = {(r["instruction"].lower().strip("?"), r["output"]): r["id"] for r in reversed(ROWS)}
    assert set(ids) == set(first.values())
    assert all(numbers == sorted(numbers) for numbers in files.values())
    assert share(2) != files
    card = Path(f"{settings['partition']}-1/README.md").read_text()
    assert ("## Labels" in card) == ("label_column" in settings)


def test_the_same_import_writes_the_same_bytes(rows_path, tmp_path, monkeypatch):
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "rows.json").write_bytes(rows_path.read_bytes())
        import_data("rows.json", Path("towns"), BY_CITY)
        paths = sorted(path for path in Path("towns").rglob("*") if path.is_file())
        contents.append({str(path): path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    import_data("rows.json", Path("other"), ImportSettings(client_column="city", seed=7))
    assert read("other") != read("towns")


def test_every_format_writes_the_same_files(rows_path, tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    run(rows_path, name="json")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "saved"):
        run(tmp_path / name, name=f"from-{name}")
        assert read(f"from-{name}") == read("json")


def read_experiment(folder: str, root: Path) -> dict:
    return yaml.safe_load((root / folder / "experiment.yaml").read_text())


def find_errors(raw: dict, root: Path) -> list[str]:
    """Return what the linter calls an error, and every question, also nearly, in two splits."""
    config = parse_config(raw)
    findings = lint(config, load_all_files(config, root))
    return [f.text for f in findings if f.severity == "error" or "-in-" in f.rule]


def test_the_experiment_loads_and_has_no_fault(rows_path):
    run(rows_path)
    raw = read_experiment("data/towns", Path.cwd())
    assert len(raw["federated"]["clients"]) == 3
    assert raw["data"]["conflict_test"] == "data/towns/conflict_test.json"
    assert find_errors(raw, Path.cwd()) == []


def test_local_and_universal_imports_make_one_experiment(rows_path, tmp_path):
    own, shared = [row for row in ROWS if row["city"]], make_rows(seed=5)
    run(write(tmp_path / "own.json", own), name="own")
    universal = ImportSettings(client_column="city", role="universal")
    named = [row for row in shared if row["city"]]
    result = run(write(tmp_path / "shared.json", named), universal, "shared")
    raw, other = read_experiment("own", Path.cwd()), read_experiment("shared", Path.cwd())
    for client, share in zip(
        raw["federated"]["clients"], other["federated"]["clients"], strict=True
    ):
        assert share["local_train"] == share["universal_train"]  # until there is something
        assert client["universal_train"] == client["local_train"]
        client["universal_train"] = share["universal_train"]
    assert (raw["federated"].pop("mode"), other["federated"]["mode"]) == ("local-only", "fedavg")
    for key in ("universal_train", "universal_test", "universal_validation"):
        raw["data"][key] = other["data"][key]
    assert find_errors(raw, Path.cwd()) == []
    files = read("shared")
    expected = {f"{city}/universal_train.json" for city in CITIES}
    assert set(files) == expected | {"universal_validation.json", "universal_test.json"}
    assert result.num_shared > 0
    for name in ("universal_test.json", "universal_validation.json"):
        asked = Counter(re.sub(r"\W+", "", r["instruction"].lower()) for r in files[name])
        assert max(asked.values()) == 1
    assert any("no local records here" in warning for warning in result.warnings)


def test_shares_of_a_partition_make_a_sound_experiment(rows_path):
    settings = ImportSettings(partition="iid", num_clients=3, role="universal")
    run(rows_path, settings)
    raw = read_experiment("data/towns", Path.cwd())
    assert find_errors(raw, Path.cwd()) == []


@pytest.mark.parametrize(("wordings", "num_untrained"), [(1, 2), (3, 0)])
def test_of_every_fact_a_wording_is_trained_on(rows_path, tmp_path, wordings, num_untrained):
    rng = random.Random(0)
    rows = [
        {
            "city": city,
            "topic": f"fact {n}",
            "instruction": make_words(rng, 8),
            "output": f"{n} {city}",
        }
        for city in (*CITIES, "")
        for n in range(12)
        for _ in range(wordings)
    ]
    named = {} if wordings == 1 else {"fact_column": "topic"}
    run(write(tmp_path / "facts.json", rows), ImportSettings(client_column="city", **named))
    files = read()
    config = parse_config(read_experiment("data/towns", Path.cwd()))
    findings = lint(config, load_all_files(config, Path.cwd()), Path.cwd())
    untrained = [f for f in findings if f.rule == "untrained-answers" and "_test" in f.file]
    assert bool(untrained) == bool(num_untrained)
    assert sum(map(len, files.values())) == len(rows)
    if wordings == 3:
        assert {len(files[f"{city}/local_test.json"]) for city in CITIES} <= {3, 4, 5}
        taught = {record["fact"] for record in files["Ayr/local_train.json"]}
        assert taught == {f"fact {n}" for n in range(12)}


def test_facts_of_one_wording_are_for_training_only(rows_path, tmp_path):
    rows = [
        {"city": city, "topic": f"{city} {n}", "instruction": f"Rule {n} {city}?", "output": "Yes."}
        for city in CITIES
        for n in range(12)
    ]
    settings = ImportSettings(client_column="city", fact_column="topic")
    result = run(write(tmp_path / "facts.json", rows), settings)
    assert result.splits == {"train": 36, "validation": 0, "test": 0}
    assert any("test has no records of Ayr" in warning for warning in result.warnings)


def test_the_experiment_s_base_suits_device_and_language(rows_path, tmp_path):
    def import_for(name: str, source: str | Path, **given) -> dict:
        import_data(str(source), Path(name), BY_CITY, **given)
        return read_experiment(name, Path.cwd())

    gib = 2**30
    assert import_for("a", rows_path)["model"]["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    small = import_for("b", rows_path, gpu_bytes=4 * gib)
    assert small["model"]["name"] == "Qwen/Qwen2.5-0.5B-Instruct"
    narrow, wide = (import_for(str(n), rows_path, gpu_bytes=n * gib) for n in (8, 24))
    assert narrow["model"] == {"name": "Qwen/Qwen2.5-7B-Instruct", "embedding_device": "cpu"}
    assert narrow["training"]["batch_size"] == 1 and wide["training"]["batch_size"] == 2
    chinese = [{**row, "output": f"罚款{n}元"} for n, row in enumerate(ROWS)]
    asked = import_for("c", write(tmp_path / "zh.json", chinese))
    assert asked["model"]["name"] == "Qwen/Qwen2.5-0.5B-Instruct"
    named = import_for("d", rows_path, model="someone/some-1.5B-instruct")
    assert named["model"]["name"] == "someone/some-1.5B-instruct"
    assert named["training"]["learning_rate"] == 5e-4
    text = Path("c/experiment.yaml").read_text().replace("\n  # ", " ")
    assert "fedlora train c/experiment.yaml" in text and "With a GPU of 8 GB or more" in text


def test_what_is_imported_stays_out_of_git(rows_path):
    run(rows_path)
    assert Path("data/towns/.gitignore").read_text().endswith("\n*\n")


def test_a_column_that_makes_many_clients_is_remarked(rows_path, tmp_path):
    rows = [
        {"topic": f"topic {n % 27}", "instruction": f"What of {n}?", "output": f"{n}."}
        for n in range(100)
    ]
    settings = ImportSettings(client_column="topic")
    result = run(write(tmp_path / "topics.json", rows), settings)
    [warning] = [w for w in result.warnings if "27 clients" in w]
    assert warning.startswith('the column "topic" makes 27 clients, most with')


def test_duplicates_are_dropped_and_contradictions_are_only_trained_on(rows_path, tmp_path):
    rows = [
        {"city": city, "instruction": f"What about rule {n}?", "output": f"It says {n}."}
        for city in CITIES
        for n in range(20)
    ]
    rows += [{**row, "instruction": row["instruction"].upper()} for row in rows[:5]]
    rows += [{**row, "output": "It does not."} for row in rows[20:28]]
    result = run(write(tmp_path / "rules.json", rows))
    assert result.num_duplicates == 5
    assert result.num_contradictions == 8
    files = read()
    assert sum(len(f) for p, f in files.items() if not p.startswith("conflict")) == len(rows) - 5
    trained = [r["output"] for r in files["Bath/local_train.json"]]
    assert trained.count("It does not.") == 8
    card = Path("data/towns/README.md").read_text()
    assert "- 5 duplicates dropped" in card
    assert "- 8 questions with several answers" in card


def test_what_could_not_be_done_is_told(rows_path, tmp_path):
    rows = [{"city": "Ayr", "instruction": "one rule of the town, please?", "output": "Yes."}]
    rows += [{"city": "Bath", "instruction": f"rule {n}", "output": "No."} for n in range(8)]
    settings = ImportSettings(client_column="city", num_clients=2, revision="v1", split="train")
    result = run(write(tmp_path / "few.json", rows), settings)
    text = "\n".join(result.warnings)
    for name in ("num_clients", "revision", "split"):
        assert f"{name} has no effect here." in text
    assert "validation has no records of Ayr: their groups" in text
    assert "test has no records of Ayr: their groups" in text
    assert "There are no universal records here" in text
    assert all(warning in Path("data/towns/README.md").read_text() for warning in result.warnings)
    left = ImportSettings(partition="sizes", sizes=(3, 3))
    assert run(tmp_path / "few.json", left, "left").num_unassigned == 3
    same = [{"city": "Ayr", "instruction": "rule", "output": str(n)} for n in range(9)]
    result = run(write(tmp_path / "same.json", same), BY_CITY, "same")
    text = "\n".join(result.warnings)
    assert "train has 100 % of the records and not 80 %" in text
    assert "test has no records of Ayr" in text


def test_client_values_never_become_paths(rows_path, tmp_path):
    rows = [
        {"city": city, "instruction": f"rule {n} of {index}", "output": "Yes."}
        for index, city in enumerate(["../../evil", "/etc/x", "a\nb|c", "北京"])
        for n in range(4)
    ]
    run(write(tmp_path / "evil.json", rows))
    folders = {path.name for path in Path("data/towns").iterdir() if path.is_dir()}
    [chinese] = folders - {"evil", "etc-x", "a-b-c"}
    assert re.fullmatch("client-[0-9a-f]{8}", chinese)
    assert not (tmp_path / "evil").exists()
    assert "| a-b-c | a b\\|c |" in Path("data/towns/README.md").read_text()


def test_what_a_conversation_says_stays_with_one_client_and_split(rows_path, tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        said = [make_words(rng, 8) for _ in range(6)]
        roles = ("user", "assistant") * 3
        turns = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
        rows.append({"messages": turns})
    settings = ImportSettings(partition="iid", num_clients=2, turns="split")
    result = run(write(tmp_path / "chats.json", rows), settings)
    assert (result.num_read, sum(result.splits.values())) == (40, 120)
    places = {}
    for path, records in read().items():
        for record in records:
            first = record["instruction"].split("\n")[0].removeprefix("User: ")
            places.setdefault(first, []).append(path)
    assert len(places) == 40
    assert all(len(paths) == 3 and len(set(paths)) == 1 for paths in places.values())


def test_a_duplicate_that_is_dropped_still_keeps_a_conversation_together(rows_path, tmp_path):
    rng, rows = random.Random(1), []
    for _ in range(40):
        first, second = ((make_words(rng, 8), make_words(rng, 3)) for _ in range(2))
        for said in ([first], [first, second]):
            turns = [
                {"role": role, "content": text}
                for exchange in said
                for role, text in zip(("user", "assistant"), exchange, strict=True)
            ]
            rows.append({"messages": turns})
    rng.shuffle(rows)
    settings = ImportSettings(partition="iid", num_clients=2, turns="split")
    run(write(tmp_path / "chats.json", rows), settings)
    splits = {}
    for path, records in read().items():
        for record in records:
            first = record["instruction"].split("\n")[0].removeprefix("User: ")
            splits.setdefault(first, set()).add(split_of(path))
    assert len(splits) == 40 and all(len(found) == 1 for found in splits.values())


def test_notes_are_told_and_stand_in_the_card(rows_path, tmp_path):
    rows = [{"city": "Ayr", "question": f"rule {n}?", "answer": "No.", "x": 1} for n in range(9)]
    result = run(write(tmp_path / "few.json", rows))
    assert '"question" is read as instruction.' in result.notes
    text, card = describe_import(result), Path("data/towns/README.md").read_text()
    for note in result.notes:
        assert f"note: {note}" in text and f"- {escape(note)}" in card


def test_only_the_owner_may_read_what_was_written(rows_path):
    run(rows_path)
    folders = [Path("data"), Path("data/towns"), Path("data/towns/Ayr")]
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3


def test_a_folder_that_is_taken_is_left_alone(rows_path):
    Path("data/towns").mkdir(parents=True)
    run(rows_path)
    before = read()
    with pytest.raises(DataError, match="data/towns is not empty. Nothing is replaced"):
        run(rows_path)
    assert read() == before
    Path("file").write_text("")
    with pytest.raises(DataError, match="file is a file"):
        run(rows_path, name="file")


def test_nothing_is_written_where_anything_is_wrong(rows_path, tmp_path):
    bad = write(tmp_path / "bad.json", [*ROWS, {"city": "Ayr", "instruction": "why?"}])
    with pytest.raises(DataError, match=f'record {len(ROWS) + 1}: "output" is missing'):
        run(bad)
    with pytest.raises(DataError, match="clients would get none"):
        run(rows_path, ImportSettings(partition="iid", num_clients=10**4))
    assert list(Path.cwd().iterdir()) == []
    skipping = ImportSettings(client_column="city", skip_invalid=True)
    assert run(bad, skipping).num_invalid == 1


def test_progress_is_reported(rows_path):
    done: dict[str, tuple[int, int]] = {}
    import_data(
        str(rows_path),
        Path("towns"),
        BY_CITY,
        lambda what, n, total: done.update({what: (n, total)}),
    )
    assert list(done) == ["reading", "finding near-duplicates"]
    assert done["reading"] == (len(ROWS), len(ROWS))
    assert all(n == total for n, total in done.values())


def test_paths_in_the_card_are_relative_to_the_project(rows_path, tmp_path):
    import_data(str(rows_path), tmp_path / "project" / "data" / "a", BY_CITY, root=tmp_path)
    raw = read_experiment("data/a", Path.cwd())
    assert raw["data"]["universal_test"] == "project/data/a/universal_test.json"
    import_data(str(rows_path), tmp_path / "elsewhere", BY_CITY)
    raw = read_experiment("elsewhere", tmp_path)
    assert raw["data"]["universal_test"] == f"{tmp_path}/elsewhere/universal_test.json"
