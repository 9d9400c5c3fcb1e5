"""Write the demo's data: two cities or more, universal rules, local policies and conflicts.

    python -m fedlora_app.demo.data [DIR]                # two cities; default: data/demo
    python -m fedlora_app.demo.data DIR --cities 4       # up to eight, and an experiment.yaml

The files are a function of ``SEED`` and the number of cities alone. Those of two cities stand in
the repository; a test generates them again and compares. ``fact`` names the rule behind a record,
which lets the evaluation tell universal facts that a client trained on from those it never saw.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedlora_app.demo.civic import (
    COLLECTION,
    LOCAL_TEST_PHRASINGS,
    LOCAL_TOPICS,
    OPENING,
    PENALTY,
    TEST_PHRASINGS,
    TRAIN_PHRASINGS,
    UNIVERSAL_ATTRIBUTES,
    UNIVERSAL_TOPICS,
    VALIDATION_PHRASINGS,
    Attribute,
)
from fedlora_app.foundation.project import find_project_root

SEED = "fedlora demo, edition 1"
CITIES = ("northgate", "riverton")
NAMES = (*CITIES, "eastham", "lakeside", "millbrook", "oldport", "southfield", "westbury")
NUM_SHARED_FACTS = 16  # universal facts that all cities see in training
NUM_CONFLICTS = {PENALTY: 8, OPENING: 4, COLLECTION: 4}
NUM_DISTRACTORS = 3

Record = dict[str, Any]
Fact = tuple[Attribute, str, str]  # attribute, topic, value


def generate(cities: Sequence[str] = CITIES) -> dict[str, list[Record]]:
    """Return every file of the demo with these cities: relative path to its records."""
    rng = random.Random(SEED)
    universal = [
        (attribute, topic, rng.choice(attribute.values))
        for topic in UNIVERSAL_TOPICS
        for attribute in UNIVERSAL_ATTRIBUTES
    ]
    shares = _split_universal(cities, universal, rng)
    policies = _draw_policies(cities, rng)

    files = {
        "universal_validation.json": _records(universal, VALIDATION_PHRASINGS, rng),
        "universal_test.json": _records(universal, TEST_PHRASINGS, rng),
        "conflict_validation.json": _conflicts(policies, VALIDATION_PHRASINGS, rng),
        "conflict_test.json": _conflicts(policies, TEST_PHRASINGS, rng),
    }
    for city in cities:
        files |= {
            f"{city}/universal_train.json": _records(shares[city], TRAIN_PHRASINGS),
            f"{city}/local_train.json": _records(policies[city], TRAIN_PHRASINGS),
            f"{city}/local_validation.json": _records(policies[city], VALIDATION_PHRASINGS, rng),
            f"{city}/local_test.json": _records(policies[city], LOCAL_TEST_PHRASINGS, rng),
        }
    return files


def _split_universal(
    cities: Sequence[str], facts: list[Fact], rng: random.Random
) -> dict[str, list[Fact]]:
    """Give all cities the shared facts and each an equal part of the others."""
    shuffled = rng.sample(facts, len(facts))
    shared, rest = shuffled[:NUM_SHARED_FACTS], shuffled[NUM_SHARED_FACTS:]
    share = len(rest) // len(cities)
    return {
        city: shared + rest[index * share : (index + 1) * share]
        for index, city in enumerate(cities)
    }


def _draw_policies(cities: Sequence[str], rng: random.Random) -> dict[str, list[Fact]]:
    """Draw each city's policies: shared topics first, always with different values."""
    policies: dict[str, list[Fact]] = {city: [] for city in cities}
    for attribute, topics in LOCAL_TOPICS.items():
        num_shared = NUM_CONFLICTS[attribute]
        own = (len(topics) - num_shared) // len(cities)
        pools = _value_pools(cities, attribute)
        for topic in topics[:num_shared]:
            taken: set[str] = set()
            for city in cities:
                value = rng.choice([v for v in pools[city] if v not in taken])
                taken.add(value)
                policies[city].append((attribute, topic, value))
        for index, city in enumerate(cities):
            start = num_shared + index * own
            for topic in topics[start : start + own]:
                policies[city].append((attribute, topic, rng.choice(pools[city])))
    return policies


def _value_pools(cities: Sequence[str], attribute: Attribute) -> dict[str, tuple[str, ...]]:
    """Northgate fines its offenders and Riverton teaches them, and so on by turns.

    Hours and days are open.
    """
    if attribute is not PENALTY:
        return {city: attribute.values for city in cities}
    fines = tuple(value for value in attribute.values if "fine" in value)
    lessons = tuple(value for value in attribute.values if "fine" not in value)
    return {city: (fines, lessons)[index % 2] for index, city in enumerate(cities)}


def _records(facts: list[Fact], phrasings: slice, rng: random.Random | None = None) -> list[Record]:
    """Return one record per fact and phrasing, with distractors where ``rng`` is given."""
    records = []
    for attribute, topic, value in facts:
        for phrasing in range(len(attribute.questions))[phrasings]:
            record = {
                "instruction": attribute.ask(topic, phrasing),
                "input": "",
                "output": attribute.reply(topic, value),
                "fact": _fact_id(attribute, topic),
            }
            if rng is not None:
                record["distractors"] = _distractors(attribute, topic, {value}, rng)
            records.append(record)
    return records


def _conflicts(
    policies: dict[str, list[Fact]], phrasings: slice, rng: random.Random
) -> list[Record]:
    """Return the questions that every city answers in its own way."""
    answers: dict[tuple[Attribute, str], dict[str, str]] = {}
    for city, facts in policies.items():
        for attribute, topic, value in facts:
            answers.setdefault((attribute, topic), {})[city] = value
    return [
        {
            "instruction": attribute.ask(topic, phrasing),
            "input": "",
            "answers": {city: attribute.reply(topic, value) for city, value in values.items()},
            "distractors": _distractors(attribute, topic, set(values.values()), rng),
            "fact": _fact_id(attribute, topic),
        }
        for (attribute, topic), values in answers.items()
        if len(values) == len(policies)
        for phrasing in range(len(attribute.questions))[phrasings]
    ]


def _distractors(
    attribute: Attribute, topic: str, true_values: set[str], rng: random.Random
) -> list[str]:
    wrong = [value for value in attribute.values if value not in true_values]
    return [attribute.reply(topic, value) for value in rng.sample(wrong, NUM_DISTRACTORS)]


def _fact_id(attribute: Attribute, topic: str) -> str:
    return f"{attribute.name}: {topic}"


def build_experiment(cities: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the demo's experiment with these cities, whose data lie in ``folder``."""
    path = find_project_root() / "conf" / "demo.yaml"
    text = path.read_text(encoding="utf-8").replace("data/demo/", f"{folder}/")
    raw = yaml.safe_load(text)
    first, *_ = raw["federated"]["clients"]
    raw["experiment"]["name"] = folder.name
    raw["model"]["name"] = "data/demo/base_model"
    raw["federated"]["clients"] = [
        {key: value.replace(first["id"], city) for key, value in first.items()} for city in cities
    ]
    return raw


def main(arguments: Sequence[str] | None = None) -> None:
    """Write every file of the demo below a folder."""
    parser = argparse.ArgumentParser(prog="python -m fedlora_app.demo.data")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/demo"))
    counts = range(2, len(NAMES) + 1)
    parser.add_argument("--cities", type=int, choices=counts, default=2, metavar="N")
    given = parser.parse_args(arguments)
    cities = NAMES[: given.cities]
    for name, records in generate(cities).items():
        path = given.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(records)} records")
    if len(cities) > 2:
        path = given.folder / "experiment.yaml"
        experiment = build_experiment(cities, given.folder)
        path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
        print(f"{path}: fedlora train {path}")


if __name__ == "__main__":
    main()
