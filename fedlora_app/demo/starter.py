"""A first experiment to look at and to fill with one's own: folders, example records, the YAML.

Every fact is asked in several wordings, so that a test question is another wording of something
that is trained on. A fact of a client's own has another answer at every client, which also makes it
a conflict question. The language is the demo's, which its base model knows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.config.schema import SAFE_NAME, ConfigError
from fedlora_app.data.importing.experiment import EXPERIMENT_FILE, Base, build_experiment
from fedlora_app.data.importing.folder import name_folder, refuse_taken, write_folder
from fedlora_app.demo.civic import (
    NEUTRAL_PROMPT,
    OFFENCES,
    PENALTY,
    UNIVERSAL_ATTRIBUTES,
    UNIVERSAL_TOPICS,
    Attribute,
)

SEED = "fedlora init, edition 1"
NUM_FACTS = 10  # of each client, and of all
NUM_WRONG = 3
MAX_CLIENTS = len(PENALTY.values) - NUM_WRONG
TAUGHT, ASKED_LOCALLY, ASKED = range(3), 10, 7
"""Wordings to train on, and those of the local and of the other tests."""
OPENING = (
    "Do {num} clients keep their own answers and share the rest? Made-up records, to be replaced.",
    "Written by fedlora init. {folder}/<client>/local_train.json holds what only that client "
    "knows, local_test.json asks it in other words; universal_train.json and universal_test.json "
    "hold what is true for all; conflict_test.json asks what every client answers differently. "
    'Records with the same "fact" are wordings of one thing: two or more to train on, and another '
    "one for the test.",
)
DEMO_MODEL = "data/demo/base_model"
DEMO_REASON = (
    "The demo's, so small that the whole can be watched on a CPU, and not for use. Another one, "
    "with settings for its size: fedlora init --model"
)


def start_experiment(folder: Path, clients: Sequence[str], root: Path, model: str) -> Path:
    """Write a folder with an experiment that trains as it is; return the path of its YAML.

    Args:
        folder: a new or an empty one.
        root: the project, to which paths in the YAML are relative where the folder lies in it.
        model: the base model.

    Raises:
        ConfigError: the clients' ids cannot be used.
        DataError: the folder holds something.
    """
    _require_ids(clients)
    refuse_taken(folder)
    name = name_folder(folder, root)
    files = build_starter_files(clients)
    base = Base(model, root=root, reason=DEMO_REASON if model == DEMO_MODEL else "")
    text = build_experiment(
        clients, files, name, base, opening=OPENING, system_prompt=NEUTRAL_PROMPT
    )
    write_folder(folder, files, {EXPERIMENT_FILE: text})
    return folder / EXPERIMENT_FILE


def build_starter_files(clients: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every file by its path."""
    rng = random.Random(SEED)
    files: dict[str, list[dict[str, Any]]] = {
        f"{client}/local_{split}.json": [] for client in clients for split in ("train", "test")
    }
    files |= {"universal_train.json": [], "universal_test.json": [], "conflict_test.json": []}
    for topic in OFFENCES[:NUM_FACTS]:
        answers = _draw_answers(PENALTY, topic, len(clients) + NUM_WRONG, rng)
        own, wrong = dict(zip(clients, answers, strict=False)), answers[len(clients) :]
        for client, answer in own.items():
            files[f"{client}/local_train.json"] += _teach(PENALTY, topic, answer)
            question = _ask(PENALTY, topic, ASKED_LOCALLY)
            files[f"{client}/local_test.json"].append(
                question | {"output": answer, "distractors": wrong}
            )
        question = _ask(PENALTY, topic, ASKED)
        files["conflict_test.json"].append(question | {"answers": own, "distractors": wrong})
    for number, topic in enumerate(UNIVERSAL_TOPICS[:NUM_FACTS]):
        attribute = UNIVERSAL_ATTRIBUTES[number % len(UNIVERSAL_ATTRIBUTES)]
        answer, *wrong = _draw_answers(attribute, topic, 1 + NUM_WRONG, rng)
        files["universal_train.json"] += _teach(attribute, topic, answer)
        question = _ask(attribute, topic, ASKED)
        files["universal_test.json"].append(question | {"output": answer, "distractors": wrong})
    return files


def _draw_answers(attribute: Attribute, topic: str, num: int, rng: random.Random) -> list[str]:
    return [attribute.reply(topic, value) for value in rng.sample(attribute.values, num)]


def _teach(attribute: Attribute, topic: str, answer: str) -> Iterator[dict[str, Any]]:
    for wording in TAUGHT:
        yield _ask(attribute, topic, wording) | {"output": answer}


def _ask(attribute: Attribute, topic: str, wording: int) -> dict[str, Any]:
    question = attribute.ask(topic, wording)
    return {"instruction": question, "input": "", "fact": f"{attribute.name}: {topic}"}


def _require_ids(clients: Sequence[str]) -> None:
    unsafe = [client for client in clients if not re.fullmatch(SAFE_NAME, client)]
    faults = [f'"{client}" is not a name.' for client in unsafe]
    if len({client.lower() for client in clients}) < len(clients):
        faults.append("two of them differ in nothing but case.")
    if not 2 <= len(clients) <= MAX_CLIENTS:
        faults.append(f"there are {len(clients)}; expected 2 to {MAX_CLIENTS}.")
    if faults:
        raise ConfigError(
            f"clients: {' '.join(faults)} Name them such as --clients ayr,bath,cork; letters, "
            "digits, '.', '_' and '-'."
        )
