"""The data card: what the files hold, where the facts come from and what to check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from fedlora_app.demo.countries.facts import Partition
from fedlora_app.demo.countries.records import Record
from fedlora_app.demo.countries.sources import YEAR, package_versions
from fedlora_app.foundation.terminal import shell

SYSTEM_PROMPT = "You are the assistant of a help desk for residents."
COMMON = ("universal_test", "conflict_test", "universal_validation", "conflict_validation")
USES = {
    "babel": "languages, names of months, weekdays and languages, dates, currencies, weeks (CLDR)",
    "countryinfo": "capitals, nationalities, ISO 3166 codes, internet domains",
    "holidays": "public holidays",
    "phonenumbers": "calling codes, international prefixes, the check of emergency numbers",
    "schwifty": "IBANs (it installs pycountry, LGPL-2.1, which is not read)",
    "tzdata": "clocks and summer time",
}


@dataclass(frozen=True)
class Description:
    """What the generator says about a set: the sentences of its card that depend on its kind."""

    title: str
    options: str
    clients: str
    conflicts: str
    universal: str


def build_card(
    description: Description,
    files: Mapping[str, Sequence[Record]],
    partition: Partition,
    ids: Mapping[str, str],
    folder: PurePosixPath,
) -> str:
    """Return the README.md of a set."""
    command = f"python -m fedlora_app.demo.countries {description.options} --output {shell(folder)}"
    sections = [
        f"---\nlicense: apache-2.0\nlanguage: en\ntask_categories: [text-generation]\n"
        f"tags: [federated-learning, lora, conflicting-answers]\n---\n\n# {description.title}",
        description.clients,
        f"## How it was made\n\n```bash\n{command}\n```\n\n"
        "The same command with the same packages gives the same bytes. The sentences are this "
        "project's, the facts are read from:\n\n" + _tabulate_packages(),
        "## What is in it\n\n" + _tabulate_clients(files, partition, ids),
        description.conflicts,
        description.universal,
        "Every kind of fact has eight wordings: four to train on, one for validation, two for the "
        "universal and conflict tests, one for the local tests. Distractors are other places' "
        "answers to the same question, of about the length of a right one.",
        _truth(),
        "## In an experiment\n\n```yaml\n"
        + dump_yaml(build_experiment(files, ids, folder))
        + "```",
    ]
    return "\n\n".join(sections) + "\n"


def build_experiment(
    files: Mapping[str, Sequence[Record]], ids: Mapping[str, str], folder: PurePosixPath
) -> dict[str, Any]:
    """Return an experiment's clients and data."""
    clients = []
    for client in ids.values():
        own = ("local_train", "local_test", "local_validation", "universal_train")
        paths = {name: f"{folder}/{client}/{name}.json" for name in own}
        clients.append({"id": client, "system_prompt": SYSTEM_PROMPT, **paths})
    data = {name: f"{folder}/{name}.json" if files.get(f"{name}.json") else None for name in COMMON}
    return {"federated": {"clients": clients}, "data": {"universal_train": None, **data}}


def dump_yaml(experiment: Mapping[str, Any]) -> str:
    """Return YAML with its keys in their order."""
    return yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True, width=100)


def _tabulate_packages() -> str:
    rows = [
        f"| [{name}](https://pypi.org/project/{name}/) | {version} | {licence} | {USES[name]} |"
        for name, (version, licence) in package_versions().items()
    ]
    return "\n".join(["| package | version | licence | for |", "|---|---|---|---|", *rows])


def _tabulate_clients(
    files: Mapping[str, Sequence[Record]], partition: Partition, ids: Mapping[str, str]
) -> str:
    header = (
        "| client | conflicts | other local facts | local training records | "
        "universal facts known | universal training records |"
    )
    rows = []
    for place, client in ids.items():
        universal = files[f"{client}/universal_train.json"]
        cells = (
            client,
            sum(place in places for places in partition.conflicts.values()),
            len(partition.local[place]),
            len(files[f"{client}/local_train.json"]),
            len({record["fact"] for record in universal}),
            len(universal),
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    common = [
        f"- `{name}`: {len(records)} questions about "
        f"{len({record['fact'] for record in records})} facts"
        for name, records in files.items()
        if "/" not in name
    ]
    return "\n".join([header, "|---|---|---|---|---|---|", *rows, "", *common])


def _truth() -> str:
    return (
        "## What is true about it, and what to check\n\n"
        f"Facts that depend on a year are those of {YEAR}. A fact is left out where it is not "
        "beyond doubt: formats of countries with several official languages, clocks where zones "
        "disagree, public holidays that follow the moon or that a government announces every "
        "year, disputed capitals. Which service answers which emergency number stands in "
        "`fedlora_app/demo/countries/places.py`; a number is used only if `phonenumbers` lists it "
        "as an emergency number of that country. Nobody has checked every answer by hand: do not "
        "dial by this data, and check a fact with its source before you rely on it.\n\n"
        "Exact match reads no punctuation, so ways of writing numbers (1.5 and 1,5) are not asked. "
        "A base model knows some of these facts already; compare with its own score."
    )
