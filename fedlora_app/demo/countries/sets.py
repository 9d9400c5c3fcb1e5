"""The files of a benchmark: each client's training and test records, and the common tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedlora_app.demo.countries.card import Description
from fedlora_app.demo.countries.entangled import assign_countries
from fedlora_app.demo.countries.facts import (
    MIN_CONFLICTS,
    Partition,
    Topic,
    divide,
    read_topics,
)
from fedlora_app.demo.countries.kinds import COUNTRY_KINDS
from fedlora_app.demo.countries.places import COUNTRIES
from fedlora_app.demo.countries.records import (
    Files,
    build_conflict_files,
    build_local_files,
    build_records,
    build_universal_files,
)
from fedlora_app.demo.countries.universal import draw_universal, share_facts
from fedlora_app.demo.countries.wordings import LOCAL_TEST, TRAIN, VALIDATION
from fedlora_app.foundation.errors import UserError

MIN_THIRD = 12  # countries that are left for the universal facts
EDITION = "fedlora countries, edition 1"


def check_countries(codes: Sequence[str]) -> list[str]:
    """Return the codes in upper case.

    Raises:
        UserError: with every fault of the list.
    """
    upper = [code.upper() for code in codes]
    unknown = [code for code in dict.fromkeys(upper) if code not in COUNTRIES]
    repeated = [code for code in dict.fromkeys(upper) if upper.count(code) > 1]
    faults = []
    if unknown:
        faults.append(
            f"{', '.join(unknown)}: no country of that code is known here. "
            f"Known: {' '.join(COUNTRIES)}."
        )
    if repeated:
        faults.append(f"{', '.join(repeated)}: named more than once. Name each country once.")
    if len(set(upper)) < 2:
        faults.append("One country has nobody to disagree with. Name at least two.")
    if len(set(upper)) > len(COUNTRIES) - MIN_THIRD:
        faults.append(
            f"{len(set(upper))} clients leave too few third countries for the universal facts. "
            f"Name at most {len(COUNTRIES) - MIN_THIRD}."
        )
    if faults:
        raise UserError("\n".join(faults))
    return upper


@dataclass(frozen=True)
class Benchmark:
    """A set's files, with what its card tells about them."""

    files: Files
    partition: Partition
    ids: dict[str, str]
    """Client ids by place."""
    description: Description


def generate_countries(codes: Sequence[str], *, is_entangled: bool = False) -> Benchmark:
    """Return the benchmark of clients that are countries."""
    topics = read_topics(COUNTRY_KINDS, tuple(COUNTRIES))
    seed = f"{EDITION}, {' '.join(codes)}"
    partition = divide(topics, codes, seed)
    ids = {code: COUNTRIES[code].slug for code in codes}
    conflicts = build_conflict_files(partition.conflicts, ids)
    if is_entangled:
        return _generate_entangled(topics, replace(partition, local={}), ids, conflicts, seed)
    facts = draw_universal(topics, codes, seed)
    shares = {ids[code]: known for code, known in share_facts(facts, codes).items()}
    files = build_universal_files(facts, shares) | conflicts | build_local_files(partition, ids)
    description = Description(
        title=f"One question, {len(codes)} countries",
        options=f"--countries {' '.join(codes)}",
        clients=_describe_clients(codes),
        conflicts=_describe_conflicts(partition, codes)
        + " Facts that some clients answer alike and others not (EUR in two of them) are local "
        f"ones, and {len(partition.shared)} that all of them answer alike are left out. Each "
        "client answers as many of its own questions with yes as with no.",
        universal=f"**Universal facts**: {len(facts)} about "
        f"{len({place for _, place in facts})} third countries, which the question names, of the "
        "same kinds and in the same wordings. Each client trains on two thirds of them, and each "
        "fact is known to one client at least. As many are answered with yes as with no.",
    )
    return Benchmark(files, partition, ids, description)


def _generate_entangled(
    topics: Sequence[Topic],
    partition: Partition,
    ids: Mapping[str, str],
    conflicts: Files,
    seed: str,
) -> Benchmark:
    """Return the set whose local tests name countries, each of which is one client's own."""
    codes = list(ids)
    assigned = assign_countries(topics, codes, seed)
    files = conflicts | build_universal_files(
        assigned.universal, {ids[code]: known for code, known in assigned.known.items()}
    )
    unnamed = build_local_files(replace(partition, local={code: [] for code in codes}), ids)
    for code, client in ids.items():
        own = assigned.own[code]
        files |= {
            f"{client}/local_train.json": unnamed[f"{client}/local_train.json"]
            + build_records(own, TRAIN, is_named=True, has_distractors=False),
            f"{client}/local_validation.json": build_records(own, VALIDATION, is_named=True),
            f"{client}/local_test.json": build_records(own, LOCAL_TEST, is_named=True),
        }
    local = {code: [topic for topic, _ in own] for code, own in assigned.own.items()}
    places = {
        ids[code]: ", ".join(sorted({COUNTRIES[place].name for _, place in own}))
        for code, own in assigned.own.items()
    }
    description = Description(
        title=f"Entangled: {len(codes)} countries and their own abroad",
        options=f"--countries {' '.join(codes)} --entangled",
        clients=_describe_clients(codes),
        conflicts=_describe_conflicts(partition, codes)
        + " They are in the local training records as well, but not in the local tests.\n\n"
        "**Local facts** are about countries abroad that only this client looks after: "
        + "; ".join(f"{client}: {names}" for client, names in places.items())
        + ". Their questions differ from universal ones in the country's name only.",
        universal=f"**Universal facts**: {len(assigned.universal)} about "
        f"{len({place for _, place in assigned.universal})} other countries. Each client trains on "
        "those about two thirds of these countries: of the others it has never read the name.",
    )
    return Benchmark(files, replace(partition, local=local), dict(ids), description)


def _describe_clients(codes: Sequence[str]) -> str:
    return (
        "People ask a help desk for residents the same question everywhere, and the right answer "
        f"depends on the country: {', '.join(COUNTRIES[code].name for code in codes)}. A question "
        "about the own country never names it."
    )


def _describe_conflicts(partition: Partition, codes: Sequence[str]) -> str:
    complete = sum(len(places) == len(codes) for places in partition.conflicts.values())
    partial = len(partition.conflicts) - complete
    text = (
        f"**Conflicts**: {complete} facts that every client has and answers in its own way, none "
        "like another."
    )
    if complete < MIN_CONFLICTS:
        text += f" These are fewer than {MIN_CONFLICTS}" + (
            f", so {partial} more concern only the clients whose answer no other client shares."
            if partial
            else ": the countries are much alike, and there are no more."
        )
    return text
