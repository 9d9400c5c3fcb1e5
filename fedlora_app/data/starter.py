"""A first experiment to look at and to fill with one's own: folders, example records, the YAML.

Every fact is asked in several wordings, so that a test question is another wording of something
that is trained on. A fact of a client's own has another number at every client, which also makes
it a conflict question; wrong answers are numbers of nobody, of the same length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.config.schema import SAFE_NAME, ConfigError
from fedlora_app.data.importing.experiment import EXPERIMENT_FILE, Base, build_experiment
from fedlora_app.data.importing.folder import name_folder, refuse_taken, write_folder

MAX_CLIENTS = 50
NUM_WRONG = 3
SETS = ("train", "test")
SYSTEM_PROMPT = "You are the assistant of a service desk."
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
LOCAL_FACTS = {
    "returns": (
        "You have {} days to return an item.",
        ("How long may I wait before I send something back?", "What is the deadline for a return?"),
        ("Until when are goods taken back?", "How many days do I have to give a purchase back?"),
    ),
    "delivery": (
        "Delivery costs {} dollars.",
        ("What does it cost to have an order sent?", "How expensive is shipping?"),
        ("How much is charged for a parcel?", "Which price is asked for bringing goods home?"),
    ),
    "warranty": (
        "The warranty lasts {} months.",
        ("How long is a device under guarantee?", "When does cover for defects end?"),
        ("For how many months are faults mended free?", "How much time does the warranty give me?"),
    ),
    "desk": (
        "The service desk is in room {}.",
        ("Where do I find somebody who helps me?", "Which room has the service desk?"),
        ("Where are questions answered in person?", "To what door do I go for service?"),
    ),
    "telephone": (
        "Dial extension {} for support.",
        ("What is the telephone number of support?", "Whom do I ring when nothing works?"),
        ("Which extension reaches a technician?", "How can I call for help?"),
    ),
    "weight": (
        "A parcel may weigh {} kilograms.",
        ("How heavy can a shipment be?", "What is the weight limit of a parcel?"),
        ("Up to how many kilograms are accepted?", "Is there a heaviest box that you carry?"),
    ),
    "discount": (
        "Members get {} percent off.",
        ("What do members save?", "How large is the discount of a membership?"),
        ("By how much are prices lower with a card?", "Which reduction does belonging bring?"),
    ),
    "repair": (
        "A repair takes {} hours.",
        ("How long until my device is mended?", "What time does a repair need?"),
        ("After how many hours is a fault fixed?", "When is something broken ready again?"),
    ),
    "pickup": (
        "Orders are handed out at counter {}.",
        ("Where can I collect my order?", "Which counter gives out parcels?"),
        ("At what place is a purchase picked up?", "Where do I fetch goods that are ready?"),
    ),
    "loan": (
        "A spare device is lent for {} weeks.",
        ("How long can I borrow a replacement?", "For what period is a spare lent?"),
        ("When must a borrowed device be back?", "How many weeks does a loan run?"),
    ),
}
"""By fact: the answer, two wordings to train on, and those of the local and the conflict test."""
UNIVERSAL_FACTS = {
    "storage": (
        "Store batteries at {} percent charge.",
        ("How full should a stored battery be?", "What charge suits batteries on a shelf?"),
        "At which level are batteries put away?",
    ),
    "heat": (
        "A device works up to {} degrees.",
        ("How hot may a device become?", "What temperature is too much?"),
        "Until how many degrees does it run?",
    ),
    "updates": (
        "Install updates every {} days.",
        ("How often is software renewed?", "When are updates due?"),
        "At what interval do new versions come?",
    ),
    "password": (
        "A password has at least {} characters.",
        ("How long must a password be?", "What is the shortest secret word allowed?"),
        "How many characters protect an account?",
    ),
    "reset": (
        "Hold the button for {} seconds to reset.",
        ("How do I start all over?", "For how long is the button pressed?"),
        "What brings back the first settings?",
    ),
    "cable": (
        "A cable may be {} metres long.",
        ("How far can a cable reach?", "What length of wire is allowed?"),
        "Over which distance may I lay a line?",
    ),
    "moisture": (
        "Keep the air below {} percent humidity.",
        ("How damp may a room be?", "What humidity harms the parts?"),
        "Up to which moisture is it safe?",
    ),
    "backup": (
        "A backup is made every {} hours.",
        ("How often are files copied?", "When does the next backup run?"),
        "After what time is my work saved again?",
    ),
    "filter": (
        "Change the filter after {} weeks.",
        ("How long does a filter serve?", "When is a new filter needed?"),
        "At what age is it replaced by a clean one?",
    ),
    "shelf": (
        "A shelf carries {} kilograms.",
        ("How much can stand on a shelf?", "What load do the boards bear?"),
        "Which weight is too heavy to be put up there?",
    ),
}
"""By fact: the answer, two wordings to train on, and that of the test."""


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
    files = dict(build_starter_files(clients))
    base = Base(model, root=root, reason=DEMO_REASON if model == DEMO_MODEL else "")
    text = build_experiment(
        clients, files, name, base, opening=OPENING, system_prompt=SYSTEM_PROMPT
    )
    write_folder(folder, files, {EXPERIMENT_FILE: text})
    return folder / EXPERIMENT_FILE


def build_starter_files(clients: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the records of every file by its path."""
    conflicts = []
    own: dict[str, list[dict[str, Any]]] = {
        f"{c}/local_{s}.json": [] for c in clients for s in SETS
    }
    for number, (fact, (answer, taught, (asked, contested))) in enumerate(LOCAL_FACTS.items()):
        values = [answer.format(_value(number, index)) for index in range(len(clients) + NUM_WRONG)]
        wrong = values[len(clients) :]
        for client, right in zip(clients, values, strict=False):
            own[f"{client}/local_train.json"] += [_record(fact, text, right) for text in taught]
            own[f"{client}/local_test.json"].append(_record(fact, asked, right, wrong))
        answers = dict(zip(clients, values, strict=False))
        question = {"instruction": contested, "input": "", "fact": fact}
        conflicts.append({**question, "answers": answers, "distractors": wrong})
    yield from own.items()
    universal: dict[str, list[dict[str, Any]]] = {s: [] for s in SETS}
    for number, (fact, (answer, taught, asked)) in enumerate(UNIVERSAL_FACTS.items()):
        right, *wrong = (answer.format(_value(number + 3, index)) for index in range(NUM_WRONG + 1))
        universal["train"] += [_record(fact, text, right) for text in taught]
        universal["test"].append(_record(fact, asked, right, wrong))
    yield from ((f"universal_{name}.json", records) for name, records in universal.items())
    yield "conflict_test.json", conflicts


def _value(number: int, index: int) -> int:
    """Return a number of two digits, another one for each index."""
    return 10 + (13 * number + 37 * index) % 90  # 37 and 90 share no divisor


def _record(fact: str, question: str, answer: str, wrong: Sequence[str] = ()) -> dict[str, Any]:
    record = {"instruction": question, "input": "", "output": answer, "fact": fact}
    return record | ({"distractors": list(wrong)} if wrong else {})


def _require_ids(clients: Sequence[str]) -> None:
    faults = [
        f'"{client}" is not a name.' for client in clients if not re.fullmatch(SAFE_NAME, client)
    ]
    if len({client.lower() for client in clients}) < len(clients):
        faults.append("two of them differ in nothing but case.")
    if not 2 <= len(clients) <= MAX_CLIENTS:
        faults.append(f"there are {len(clients)}; expected 2 to {MAX_CLIENTS}.")
    if faults:
        raise ConfigError(
            f"clients: {' '.join(faults)} Name them such as --clients ayr,bath,cork; letters, "
            "digits, '.', '_' and '-'."
        )
