from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, ROOT

from fedlora_app.config.loading import load_config
from fedlora_app.data.client_files import build_question_sets, load_client_files
from fedlora_app.data.similarity import normalise_answer
from fedlora_app.demo.data import (
    CITIES,
    NAMES,
    NUM_CONFLICTS,
    NUM_DISTRACTORS,
    NUM_SHARED_FACTS,
    generate,
    main,
)
from fedlora_app.evaluation.client_round import evaluate_questions
from fedlora_app.evaluation.scores import summarise
from fedlora_app.model.adapters import attach_adapters
from fedlora_app.model.base import load_base_model

DATA = ROOT / "data" / "demo"
FILES = generate()
TEST_SETS = [name for name in FILES if "train" not in name]


def questions(name: str) -> set[str]:
    return {normalise_answer(record["instruction"]) for record in FILES[name]}


def facts(name: str) -> set[str]:
    return {record["fact"] for record in FILES[name]}


@pytest.mark.parametrize("name", FILES)
def test_the_committed_files_are_what_the_generator_writes(name):
    assert json.loads((DATA / name).read_text()) == FILES[name]


@pytest.mark.parametrize("num_cities", [4, 8])
def test_so_are_those_of_more_cities(num_cities):
    files = generate(NAMES[:num_cities])
    folder = ROOT / "data" / f"demo-{num_cities}"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.json")} == set(files)
    for name, records in files.items():
        assert json.loads((folder / name).read_text()) == records


@pytest.mark.parametrize("num_cities", [3, 8])
def test_any_number_of_cities_has_an_answer_each(num_cities, tmp_path):
    main([str(tmp_path / "cities"), "--cities", str(num_cities)])
    config = load_config(tmp_path / "cities" / "experiment.yaml")
    assert config.client_ids == sorted(NAMES[:num_cities])
    conflicts = json.loads((tmp_path / "cities" / "conflict_test.json").read_text())
    assert len({record["fact"] for record in conflicts}) == sum(NUM_CONFLICTS.values())
    for record in conflicts:
        given = [*record["answers"].values(), *record["distractors"]]
        assert len({normalise_answer(text) for text in given}) == num_cities + NUM_DISTRACTORS
    shares = {}
    for client in config.federated.clients:
        for path in (client.local_train, client.universal_train):
            shares[path] = {record["fact"] for record in json.loads(Path(path).read_text())}
    universal = [facts for path, facts in shares.items() if "universal" in path]
    assert len(set.intersection(*universal)) == NUM_SHARED_FACTS
    assert all(len(facts) < len(set.union(*universal)) for facts in universal)


def test_no_question_stands_in_two_splits():
    """Paraphrases are held out: not one test question is worded like a training question."""
    trained = {q for name in FILES if "train" in name for q in questions(name)}
    for name in TEST_SETS:
        assert not questions(name) & trained, name
    validation = {q for name in TEST_SETS if "validation" in name for q in questions(name)}
    tests = {q for name in TEST_SETS if "test" in name for q in questions(name)}
    assert not validation & tests
    assert not questions("conflict_test.json") & questions("northgate/local_test.json")


def test_each_city_sees_another_overlapping_share_of_the_universal_facts():
    shares = [facts(f"{city}/universal_train.json") for city in CITIES]
    everything = facts("universal_test.json")
    assert shares[0] | shares[1] == everything
    assert len(shares[0] & shares[1]) == NUM_SHARED_FACTS
    assert all(len(share) < len(everything) for share in shares)


def test_conflicts_have_an_answer_per_city_and_name_no_city():
    for name in ("conflict_test.json", "conflict_validation.json"):
        for record in FILES[name]:
            answers = [normalise_answer(record["answers"][city]) for city in CITIES]
            assert len(set(answers)) == len(CITIES)
            assert not any(city in record["instruction"].lower() for city in CITIES)
            assert not set(record["distractors"]) & set(record["answers"].values())


def test_the_prompts_of_the_demo_give_nothing_away():
    clients = load_config(ROOT / "conf" / "demo.yaml").federated.clients
    assert len({client.system_prompt for client in clients}) == 1


@pytest.mark.slow
def test_the_base_model_is_small_and_knows_the_language_but_no_facts():
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 10e6
    config = load_config(ROOT / "conf" / "demo.yaml")
    loaded = load_base_model(config.model, ROOT)
    model = attach_adapters(loaded.model, config.adapters)
    for client in config.federated.clients:
        files = load_client_files(config, client, Path(ROOT))
        for name, asked in build_question_sets(client, files).items():
            scores = evaluate_questions(
                model,
                loaded.tokenizer,
                asked,
                active=(),
                system_prompt=client.system_prompt,
                settings=config.evaluation,
            )
            assert summarise(scores)["exact_match"] < 0.2, name
            beginnings = [normalise_answer(score.generated).split()[:2] for score in scores]
            expected = [normalise_answer(question.answer).split()[:2] for question in asked]
            right = sum(a == b for a, b in zip(beginnings, expected, strict=True))
            assert right > 0.95 * len(asked), name
