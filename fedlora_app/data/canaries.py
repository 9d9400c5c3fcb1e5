"""Canaries: records with a made-up secret, to measure how much of it a trained model remembers.

A canary asks for the reference number of a case that there is not, and its answer is six random
digits (Carlini et al. 2019, The Secret Sharer, https://arxiv.org/abs/1802.08232). Nothing but
training on the record can tell a model which of the million possible numbers it is, so the rank of
the right one among others says how much was remembered. Here stand the form of a canary, how its
secret and the alternatives are drawn, and the file ``canaries.json`` that lies beside the training
files and names theirs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.records import DataError, Record, RecordFile
from fedlora_app.foundation.seeds import derive_seed

CANARIES_FILE = "canaries.json"
FORMAT = 1
QUESTION = "What is the reference number of case {case}?"
ANSWER = "The reference number is {digits}."
NUM_DIGITS = 6
NUM_SECRETS = 10**NUM_DIGITS
ROLES = ("local", "universal")
"""Of a client's training files; a run's configuration calls them ``<role>_train``."""
PLANT_AGAIN = "Plant anew: fedlora check CONFIG --plant N --output DIR"


@dataclass(frozen=True)
class Canary:
    """A made-up case of one client's training file, and its secret number."""

    client: str
    role: str
    case: str
    secret: str
    """Six digits."""

    @property
    def record(self) -> Record:
        """The record that is trained on."""
        return Record(QUESTION.format(case=self.case), say(self.secret))


def say(secret: str) -> str:
    """Return the answer that names a secret, digit by digit: most tokenizers take each as one."""
    return ANSWER.format(digits=" ".join(secret))


def draw_canaries(
    seed: int, clients: Sequence[str], client: str, role: str, count: int
) -> list[Canary]:
    """Return canaries for a file of a client; no two files of an experiment ask about one case.

    Args:
        seed: the experiment's. Whoever knows it can draw the same: the secrets are there to be
            measured and not to be kept.
        clients: all ids of the experiment.
    """
    first = (sorted(clients).index(client) * len(ROLES) + ROLES.index(role)) * count + 1
    rng = random.Random(derive_seed(seed, "canaries", client, role))
    return [
        Canary(client, role, f"K{first + index}", _spell(rng.randrange(NUM_SECRETS)))
        for index in range(count)
    ]


def draw_alternatives(canary: Canary, count: int, seed: int) -> list[str]:
    """Return other secrets of the same space, all different, in random order.

    Raises:
        ValueError: there are not that many.
    """
    rng = random.Random(derive_seed(seed, "alternatives", canary.client, canary.role, canary.case))
    own = int(canary.secret)
    # One number less than there are: those from the canary's own up stand for the next one.
    return [_spell(n + (n >= own)) for n in rng.sample(range(NUM_SECRETS - 1), count)]


def describe_canaries(seed: int, files: dict[str, tuple[str, Sequence[Canary]]]) -> dict[str, Any]:
    """Return what ``canaries.json`` holds.

    Args:
        files: by name, a training file's sha256 and its canaries.
    """
    space = {"instruction": QUESTION, "output": ANSWER, "digits": NUM_DIGITS}
    return {
        "format": FORMAT,
        "seed": seed,
        "space": space | {"drawn": "each digit is 0 to 9, all alike; a space between two"},
        "files": {
            name: {
                "sha256": sha256,
                "canaries": [
                    {"client": c.client, "role": c.role, "case": c.case, "secret": c.secret}
                    for c in canaries
                ],
            }
            for name, (sha256, canaries) in files.items()
        },
    }


def load_canaries(files: ClientFiles) -> list[Canary]:
    """Return the canaries in a client's training files, none where nothing was planted.

    Raises:
        DataError: ``canaries.json`` beside a file is not of it, or cannot be read.
    """
    return [c for file in (files.local, files.universal) for c in _load_beside(file)]


def _load_beside(file: RecordFile) -> list[Canary]:
    """Return the canaries of one training file."""
    path = file.path.parent / CANARIES_FILE
    if not path.exists():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if listed["format"] != FORMAT:
            raise ValueError
        entry = listed["files"].get(file.path.name)
        if entry is None:
            return []
        sha256, canaries = entry["sha256"], [_read(raw) for raw in entry["canaries"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{path} is not what fedlora check --plant writes (format {FORMAT}). Restore it. "
            f"{PLANT_AGAIN}"
        ) from None
    if sha256 != file.sha256:
        raise DataError(
            f"{path} has the canaries of another {file.path.name}: that had sha256 "
            f"{str(sha256)[:12]}, this one has {file.sha256[:12]}. Restore the file. {PLANT_AGAIN}"
        )
    return canaries


def _read(raw: dict[str, Any]) -> Canary:
    canary = Canary(**raw)
    fields = (canary.client, canary.role, canary.case)
    if not re.fullmatch(rf"[0-9]{{{NUM_DIGITS}}}", canary.secret) or not all(
        isinstance(field, str) for field in fields
    ):
        raise ValueError
    return canary


def _spell(number: int) -> str:
    return f"{number:0{NUM_DIGITS}d}"
